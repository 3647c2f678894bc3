// PackedKernels in one instruction set: included by kernels_*.cpp after packed_expand.inl.

namespace {

inline uint32_t word_at(const uint8_t *mask, size_t word) {
    uint32_t bits;
    memcpy(&bits, mask + 4 * word, sizeof bits);
    return bits;
}

// Call body with a value of the type that holds `dtype`.
template <class Body>
inline void typed_float(int dtype, const Body &body) {
    if (dtype == SPARC3_FP32)
        body(0.0f);
    else if (dtype == SPARC3_BF16)
        body(BFloat16{});
    else
        body(Float16{});
}

size_t prepared_element(int dtype) {
    size_t size = 0;
    typed_float(dtype, [&](auto type) {
        size = sizeof(typename Format<decltype(type)>::X);
    });
    return size;
}

void prepare(int dtype, const void *x, size_t columns, void *prepared) {
    typed_float(dtype, [&](auto type) {
        using T = decltype(type);
        using X = typename Format<T>::X;
        // The last word first, as an order within words may leave holes anywhere in it.
        const size_t last = columns / 32 * 32;
        if (last < columns) memset((X *)prepared + last, 0, 32 * sizeof(X));
        Format<T>::prepare((const T *)x, columns, (X *)prepared);
    });
}

// Four words of mask bits, where the values of each but the first start, and how many there are in all. All of them
// before any expansion: the counts are the only chain from step to step.
struct Starts {
    uint32_t bits[4];
    int second, third, fourth, all;

    explicit Starts(const uint8_t *mask) {
        uint64_t low, high;
        memcpy(&low, mask, 8);
        memcpy(&high, mask + 8, 8);
        bits[0] = (uint32_t)low, bits[1] = (uint32_t)(low >> 32);
        bits[2] = (uint32_t)high, bits[3] = (uint32_t)(high >> 32);
        second = bits_in(bits[0]), third = __builtin_popcountll(low);
        fourth = third + bits_in(bits[2]), all = third + __builtin_popcountll(high);
    }
};

// Values and mask bits stream from memory once: they are fetched so many bytes ahead, which hides most of its latency.
constexpr size_t kAhead = 4096, kMasksAhead = 2048;
// Of a panel of CSR rows: about a block, so that it arrives while the other rows are expanded and multiplied.
constexpr size_t kAheadOfIndices = 1024;

template <class T, int batch>
bool dot_row(const uint8_t *mask, size_t words, const T *v, const T *end, const typename Format<T>::X *x,
             size_t stride, float *y) {
    using F = Format<T>;
    constexpr int kChains = batch == 1 ? 4 : batch == 2 ? 2 : 1;  // sums a vector: more hide the latency of adding
    typename F::Accumulator sum[batch][kChains] = {};
    const auto add = [&](const auto &block, int part, const typename F::X *at) {
        for (int b = 0; b < batch; ++b)
            for (int i = 0; i < F::kVectors; ++i) {
                auto &chain = sum[b][(part * F::kVectors + i) % kChains];
                chain = F::multiply_add(chain, block.v[i], F::load(at + (size_t)b * stride + F::kStep * i));
            }
    };
    size_t word = 0;
    for (; word + 4 <= words; word += 4, x += 128) {
        for (size_t line = 0; line < 128 * sizeof(T); line += 64)
            __builtin_prefetch((const char *)v + kAhead + line);
        __builtin_prefetch(mask + 4 * word + kMasksAhead);
        const Starts at(mask + 4 * word);
        if (at.all > end - v) return false;
        const auto a = F::expand(v, at.bits[0]), b = F::expand(v + at.second, at.bits[1]);
        const auto c = F::expand(v + at.third, at.bits[2]), d = F::expand(v + at.fourth, at.bits[3]);
        v += at.all;
        add(a, 0, x);
        add(b, 1, x + 32);
        add(c, 2, x + 64);
        add(d, 3, x + 96);
    }
    for (; word < words; ++word, x += 32) {
        const uint32_t bits = word_at(mask, word);
        if (bits_in(bits) > end - v) return false;
        add(F::expand(v, bits), 0, x);
        v += bits_in(bits);
    }
    for (int b = 0; b < batch; ++b) {
        y[b] = F::sum(sum[b][0]);
        for (int i = 1; i < kChains; ++i) y[b] += F::sum(sum[b][i]);
    }
    return v == end;
}

bool dot(int dtype, const uint8_t *mask, size_t words, const void *values, const void *end, const void *x,
         size_t stride, int batch, float *y) {
    bool sound = false;
    typed_float(dtype, [&](auto type) {
        using T = decltype(type);
        const auto product = batch == 1   ? dot_row<T, 1>
                             : batch == 2 ? dot_row<T, 2>
                             : batch == 3 ? dot_row<T, 3>
                                          : dot_row<T, 4>;
        sound = product(mask, words, (const T *)values, (const T *)end, (const typename Format<T>::X *)x, stride, y);
    });
    return sound;
}

template <class T>
const T *expand_row(const uint8_t *mask, size_t words, const T *v, const T *end, typename Format<T>::X *out) {
    using F = Format<T>;
    const auto keep = [&](const auto &block) {
        for (int i = 0; i < F::kVectors; ++i, out += F::kStep) F::store(out, block.v[i]);
    };
    size_t word = 0;
    for (; word + 4 <= words; word += 4) {
        const Starts at(mask + 4 * word);
        if (at.all > end - v) return nullptr;
        const auto a = F::expand(v, at.bits[0]), b = F::expand(v + at.second, at.bits[1]);
        const auto c = F::expand(v + at.third, at.bits[2]), d = F::expand(v + at.fourth, at.bits[3]);
        v += at.all;
        keep(a);
        keep(b);
        keep(c);
        keep(d);
    }
    for (; word < words; ++word) {
        const uint32_t bits = word_at(mask, word);
        if (bits_in(bits) > end - v) return nullptr;
        keep(F::expand(v, bits));
        v += bits_in(bits);
    }
    return v;
}

const void *expand(int dtype, const uint8_t *mask, size_t words, const void *values, const void *end, void *dense) {
    const void *rest = nullptr;
    typed_float(dtype, [&](auto type) {
        using T = decltype(type);
        rest = expand_row(mask, words, (const T *)values, (const T *)end, (typename Format<T>::X *)dense);
    });
    return rest;
}

template <class T, class Index>
size_t scatter_row(const Index *indices, const T *values, size_t count, size_t begin, size_t columns, void *dense) {
    using F = Format<T>;
    auto *out = (typename F::X *)dense;
    memset(out, 0, sparc3::words_of(columns) * sparc3::kWord * sizeof(typename F::X));
    size_t i = 0;
#if defined(__AVX512F__)
    const __m512i first = _mm512_set1_epi32((int)begin), many = _mm512_set1_epi32((int)columns);
    for (; i + 16 <= count; i += 16) {
        __builtin_prefetch((const char *)(indices + i) + kAheadOfIndices);
        __m512i at;
        if constexpr (sizeof(Index) == 2)
            at = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(indices + i)));
        else
            at = _mm512_loadu_si512(indices + i);
        if (_mm512_cmplt_epu32_mask(_mm512_sub_epi32(at, first), many) != 0xffff) break;
#pragma GCC unroll 16
        for (size_t j = i; j < i + 16; ++j) out[F::place(indices[j] - begin)] = F::convert(values[j]);
    }
#endif
    for (; i < count && indices[i] - begin < columns; ++i) out[F::place(indices[i] - begin)] = F::convert(values[i]);
    return i;
}

size_t scatter(int dtype, bool wide, const void *indices, const void *values, size_t count, size_t begin,
               size_t columns, void *dense) {
    size_t done = 0;
    typed_float(dtype, [&](auto type) {
        const auto *v = (const decltype(type) *)values;
        done = wide ? scatter_row((const uint32_t *)indices, v, count, begin, columns, dense)
                    : scatter_row((const uint16_t *)indices, v, count, begin, columns, dense);
    });
    return done;
}

// Sums of so many rows and kLanes16 vectors, a unit of each vector and one of a row fill the registers.
#if defined(__AVX512F__)
constexpr int kPanelRows = 16;
#elif defined(__AVX2__)
constexpr int kPanelRows = 6;
#else
constexpr int kPanelRows = 2;
#endif
static_assert(kPanelRows <= sparc3::kMostPanelRows);

template <class F, int lanes>
void tile_of(const char *panel, const char *x, size_t units, const char *const *ahead, float *sums) {
    constexpr int kParts = lanes / F::kWidth;
    typename F::Accumulator sum[kPanelRows][kParts];
    memcpy(sum, sums, sizeof sum);
    const char *const end = panel + 4 * units;
    const size_t lines = (units + kPanelRows - 1) / kPanelRows;  // fetched ahead of each row, one at each unit
    for (; panel < end; ++ahead) {
        const char *line = *ahead, *const last = panel + 4 * lines < end ? panel + 4 * lines : end;
        for (; panel < last; panel += 4, x += 4 * lanes, line += 64) {
            __builtin_prefetch(line);
            decltype(F::repeat(x)) vectors[kParts];
#pragma GCC unroll 4
            for (int p = 0; p < kParts; ++p) vectors[p] = F::load_units(x + 4 * F::kWidth * p);
#pragma GCC unroll 16
            for (int r = 0; r < kPanelRows; ++r) {
                const auto w = F::repeat(panel + (size_t)r * sparc3::kPanelStride);
#pragma GCC unroll 4
                for (int p = 0; p < kParts; ++p) sum[r][p] = F::multiply_add(sum[r][p], w, vectors[p]);
            }
        }
    }
    memcpy(sums, sum, sizeof sum);
}

void tile(int dtype, bool few, const void *panel, const void *x, size_t units, const char *const *ahead, float *sums) {
    typed_float(dtype, [&](auto type) {
        using F = Format<decltype(type)>;
        const auto product = few ? tile_of<typename F::Few, sparc3::kLanes8> : tile_of<F, sparc3::kLanes16>;
        product((const char *)panel, (const char *)x, units, ahead, sums);
    });
}

template <class T>
void unpack_row(const uint8_t *mask, size_t columns, const T *v, T *out) {
    size_t word = 0;
    for (; 32 * (word + 1) <= columns; ++word) {
        const uint32_t bits = word_at(mask, word);
        __builtin_prefetch((const char *)v + kAhead);
        expand_raw(v, bits, out + 32 * word);
        v += bits_in(bits);
    }
    if (32 * word < columns) {
        T rest[32];
        expand_raw(v, word_at(mask, word), rest);
        memcpy(out + 32 * word, rest, (columns - 32 * word) * sizeof(T));
    }
}

void unpack(int dtype, const uint8_t *mask, size_t columns, const void *values, void *out) {
    if (dtype == SPARC3_FP32)
        unpack_row(mask, columns, (const uint32_t *)values, (uint32_t *)out);
    else
        unpack_row(mask, columns, (const uint16_t *)values, (uint16_t *)out);
}

uint64_t count(const uint8_t *mask, size_t words) {
    uint64_t sum = 0;
    size_t word = 0;
#if defined(__AVX512VPOPCNTDQ__)
    __m512i sums = _mm512_setzero_si512();
    for (; word + 16 <= words; word += 16)
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(_mm512_loadu_si512(mask + 4 * word)));
    sum = (uint64_t)_mm512_reduce_add_epi64(sums);
#endif
    for (; word + 2 <= words; word += 2) {
        uint64_t bits;
        memcpy(&bits, mask + 4 * word, sizeof bits);
        sum += (uint64_t)__builtin_popcountll(bits);
    }
    return word < words ? sum + (uint64_t)bits_in(word_at(mask, word)) : sum;
}

template <class T, class Index>
bool gather_row(const Index *indices, const T *values, size_t count, const float *x, size_t columns, float *y) {
    size_t i = 0;
    float sum = 0;
    uint32_t beyond = 0;
    const uint32_t limit = (uint32_t)columns;
#if defined(__AVX512F__)
    __m512 sums[2] = {};
    __mmask16 bad = 0;
    const __m512i last = _mm512_set1_epi32((int)limit);
    int chain = 0;
    for (; i + 16 <= count; i += 16, chain ^= 1) {
        __builtin_prefetch((const char *)(values + i) + 1024);
        __builtin_prefetch((const char *)(indices + i) + 1024);
        __m512i at;
        if constexpr (sizeof(Index) == 2)
            at = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(indices + i)));
        else
            at = _mm512_loadu_si512(indices + i);
        bad = (__mmask16)(bad | _mm512_cmpge_epu32_mask(at, last));
        const __m512 found = _mm512_i32gather_ps(_mm512_min_epu32(at, last), x, 4);
        sums[chain] = _mm512_fmadd_ps(found, to_floats(values + i), sums[chain]);
    }
    sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    beyond = bad;
#endif
    for (; i < count; ++i) {
        const uint32_t at = (uint32_t)indices[i];
        beyond |= at >= limit;
        sum += to_float(values[i]) * x[at < limit ? at : limit];
    }
    *y = sum;
    return !beyond;
}

template <class T, class Index>
bool gather_row_lanes(const Index *indices, const T *values, size_t count, const float *x, size_t columns, float *y) {
    constexpr int kParts = sparc3::kLanes16 / kWide;
    Floats sum[kParts] = {};
    uint32_t beyond = 0;
    const uint32_t limit = (uint32_t)columns;
    for (size_t i = 0; i < count; ++i) {
        const uint32_t at = (uint32_t)indices[i];
        beyond |= at >= limit;
        const float *lane = x + (size_t)(at < limit ? at : limit) * sparc3::kLanes16;
        const float value = to_float(values[i]);
        for (int p = 0; p < kParts; ++p) sum[p] += value * load_floats(lane + kWide * p);
    }
    for (int p = 0; p < kParts; ++p) store_floats(y + kWide * p, sum[p]);
    return !beyond;
}

bool gather(int dtype, bool wide, const void *indices, const void *values, size_t count, const float *x,
            size_t columns, float *y) {
    bool inside = true;
    typed_float(dtype, [&](auto type) {
        const auto *v = (const decltype(type) *)values;
        inside = wide ? gather_row((const uint32_t *)indices, v, count, x, columns, y)
                      : gather_row((const uint16_t *)indices, v, count, x, columns, y);
    });
    return inside;
}

bool gather_lanes(int dtype, bool wide, const void *indices, const void *values, size_t count, const float *x,
                  size_t columns, float *y) {
    bool inside = true;
    typed_float(dtype, [&](auto type) {
        const auto *v = (const decltype(type) *)values;
        inside = wide ? gather_row_lanes((const uint32_t *)indices, v, count, x, columns, y)
                      : gather_row_lanes((const uint16_t *)indices, v, count, x, columns, y);
    });
    return inside;
}

// Two places of two bits: the bits they set.
constexpr uint8_t kPairs[16] = {1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8};

void masks_2_4(const uint8_t *indices, size_t bytes, uint8_t *mask) {
    size_t i = 0;
#if defined(__AVX2__)
    const __m256i pairs = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)kPairs));
    const __m256i nibble = _mm256_set1_epi8(15);
    for (; i + 32 <= bytes; i += 32) {
        const __m256i places = _mm256_loadu_si256((const __m256i *)(indices + i));
        const __m256i low = _mm256_shuffle_epi8(pairs, _mm256_and_si256(places, nibble));
        const __m256i high = _mm256_shuffle_epi8(pairs, _mm256_and_si256(_mm256_srli_epi16(places, 4), nibble));
        _mm256_storeu_si256((__m256i *)(mask + i), _mm256_or_si256(low, _mm256_slli_epi16(high, 4)));
    }
#endif
    for (; i < bytes; ++i) mask[i] = (uint8_t)(kPairs[indices[i] & 15] | kPairs[indices[i] >> 4] << 4);
}

void masks_4_8(const uint8_t *indices, size_t bytes, uint8_t *mask) {
    size_t i = 0;
#if defined(__AVX2__)
    const __m256i bit = _mm256_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16,
                                         32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128);
    const __m256i nibble = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
    for (; i + 16 <= bytes; i += 16) {
        const __m256i places = _mm256_loadu_si256((const __m256i *)(indices + 2 * i));
        const __m256i low = _mm256_shuffle_epi8(bit, _mm256_and_si256(places, nibble));
        const __m256i high = _mm256_shuffle_epi8(bit, _mm256_and_si256(_mm256_srli_epi16(places, 4), nibble));
        const __m256i two = _mm256_or_si256(low, high);
        const __m256i four = _mm256_and_si256(_mm256_or_si256(two, _mm256_srli_epi16(two, 8)), byte);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(four, four), 0xd8);
        _mm_storeu_si128((__m128i *)(mask + i), _mm256_castsi256_si128(packed));
    }
#endif
    for (; i < bytes; ++i) {
        const uint8_t a = indices[2 * i], b = indices[2 * i + 1];
        mask[i] = (uint8_t)(1 << (a & 7) | 1 << (a >> 4 & 7) | 1 << (b & 7) | 1 << (b >> 4 & 7));
    }
}

constexpr sparc3::PackedKernels kPackedKernels = {
    prepared_element, prepare, dot,    expand, scatter,      kPanelRows, tile,
    unpack,           count,   gather, gather_lanes, masks_2_4,  masks_4_8,
};

}  // namespace
