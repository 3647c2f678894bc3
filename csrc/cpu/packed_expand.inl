// Expanding 32 packed weights: values at `v` go to the set bits of `mask`, zeros to the others, in one instruction set.
//
//     raw         out[32] as stored
//     Format<T>   a Block for the dot product, and what a dot product does with it

namespace {

#if defined(__AVX512F__)
constexpr int kWide = 16;
#elif defined(__AVX2__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif
constexpr int kBlockVectors = 32 / kWide;
typedef float Floats __attribute__((vector_size(4 * kWide)));
typedef float LooseFloats __attribute__((vector_size(4 * kWide), aligned(4), may_alias));
typedef float LooseFloat __attribute__((may_alias));

inline Floats load_floats(const float *p) { return *(const LooseFloats *)p; }
inline void store_floats(float *p, Floats a) { *(LooseFloats *)p = a; }
inline float sum_of(Floats a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)a);
#else
    float sum[kWide];
    store_floats(sum, a);
    for (int width = kWide / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) sum[i] += sum[i + width];
    return sum[0];
#endif
}
inline int bits_in(uint32_t mask) { return __builtin_popcount(mask); }

// What most formats multiply: fp32 in column order.
struct Block {
    Floats v[kBlockVectors];
};
#if defined(__AVX512F__)
// Eight fp32 units: half of a vector.
struct FewFloats {
    typedef float Accumulator __attribute__((vector_size(32)));
    typedef float Loose __attribute__((vector_size(32), aligned(4), may_alias));
    static constexpr int kWidth = 8;
    static Accumulator load_units(const char *x) { return *(const Loose *)x; }
    static Accumulator repeat(const char *unit) { return Accumulator{} + *(const LooseFloat *)unit; }
    static Accumulator multiply_add(Accumulator sum, Accumulator w, Accumulator x) { return sum + w * x; }
};
#endif
struct FloatFormat {
    using X = float;
    using Accumulator = Floats;
#if defined(__AVX512F__)
    using Few = FewFloats;
#else
    using Few = FloatFormat;
#endif
    static constexpr int kWidth = kWide;  // units a vector
    static constexpr int kVectors = kBlockVectors, kStep = kWide;  // vectors a block, elements a vector
    static Floats load(const float *x) { return load_floats(x); }
    static void store(float *x, Floats a) { store_floats(x, a); }
    static Floats load_units(const char *x) { return load_floats((const float *)x); }
    static Floats repeat(const char *unit) { return Floats{} + *(const LooseFloat *)unit; }
    static Floats multiply_add(Floats sum, Floats w, Floats x) { return sum + w * x; }
    static float sum(Floats a) { return sum_of(a); }
    // Where column i of a block of whole words is prepared, and as what.
    static size_t place(size_t i) { return i; }
    template <class T>
    static float convert(T x) {
        return to_float(x);
    }
    template <class T>
    static void prepare(const T *x, size_t columns, float *out) {
        for (size_t i = 0; i < columns; ++i) out[i] = to_float(x[i]);
    }
};

#if defined(__AVX512F__)

inline __m512 to_floats(const float *v) { return _mm512_loadu_ps(v); }
inline __m512 to_floats(const BFloat16 *v) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)v)), 16));
}
inline __m512 to_floats(const Float16 *v) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)v)); }

template <class T>
inline Block expand_floats(const T *v, uint32_t mask) {
    // Expanding from a register: with a memory operand the instruction is microcode (AMD) and several times slower.
    __m512 a = to_floats(v), b = to_floats(v + bits_in(mask & 0xffff));
    asm("" : "+v"(a), "+v"(b));
    return {{(Floats)_mm512_maskz_expand_ps((__mmask16)mask, a),
             (Floats)_mm512_maskz_expand_ps((__mmask16)(mask >> 16), b)}};
}

inline void expand_raw(const uint32_t *v, uint32_t mask, uint32_t *out) {
    __m512i a = _mm512_loadu_si512(v), b = _mm512_loadu_si512(v + bits_in(mask & 0xffff));
    asm("" : "+v"(a), "+v"(b));
    _mm512_storeu_si512(out, _mm512_maskz_expand_epi32((__mmask16)mask, a));
    _mm512_storeu_si512(out + 16, _mm512_maskz_expand_epi32((__mmask16)(mask >> 16), b));
}

#if defined(__AVX512VBMI2__)
inline __m512i expand_words(const void *v, uint32_t mask) {
    __m512i words = _mm512_loadu_si512(v);
    asm("" : "+v"(words));
    return _mm512_maskz_expand_epi16(mask, words);
}
inline void expand_raw(const uint16_t *v, uint32_t mask, uint16_t *out) {
    _mm512_storeu_si512(out, expand_words(v, mask));
}
inline Block expand_floats(const Float16 *v, uint32_t mask) {
    const __m512i words = expand_words(v, mask);
    return {{(Floats)_mm512_cvtph_ps(_mm512_castsi512_si256(words)),
             (Floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))}};
}
#else
inline void expand_raw(const uint16_t *v, uint32_t mask, uint16_t *out) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)v));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v + bits_in(mask & 0xffff))));
    _mm256_storeu_si256((__m256i *)out,
                        _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32((__mmask16)mask, a)));
    _mm256_storeu_si256((__m256i *)(out + 16),
                        _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32((__mmask16)(mask >> 16), b)));
}
#endif

#elif defined(__AVX2__)

// For each byte of mask bits: which value goes to each of 8 places, 0x80 for none.
struct Places {
    alignas(64) uint8_t words[256][16];
    alignas(64) uint8_t lanes[256][8];
    constexpr Places() : words{}, lanes{} {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0;
            for (int i = 0; i < 8; ++i) {
                const bool kept = mask >> i & 1;
                words[mask][2 * i] = kept ? (uint8_t)(2 * next) : 0x80;
                words[mask][2 * i + 1] = kept ? (uint8_t)(2 * next + 1) : 0x80;
                lanes[mask][i] = kept ? (uint8_t)next : 0x80;
                next += kept;
            }
        }
    }
};
constexpr Places kPlaces{};

inline __m128i expand_words(const void *v, uint32_t byte) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)v),
                            _mm_load_si128((const __m128i *)kPlaces.words[byte]));
}
inline Floats expand_8(const BFloat16 *v, uint32_t byte) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(expand_words(v, byte)), 16);
}
inline Floats expand_8(const Float16 *v, uint32_t byte) { return (Floats)_mm256_cvtph_ps(expand_words(v, byte)); }
inline Floats expand_8(const float *v, uint32_t byte) {
    const __m256i place = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)kPlaces.lanes[byte]));
    return (Floats)_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(place, 31)),
                                    _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), place));
}
template <class T>
inline Block expand_floats(const T *v, uint32_t mask) {
    return {{expand_8(v, mask & 0xff), expand_8(v + bits_in(mask & 0xff), mask >> 8 & 0xff),
             expand_8(v + bits_in(mask & 0xffff), mask >> 16 & 0xff),
             expand_8(v + bits_in(mask & 0xffffff), mask >> 24)}};
}
inline void expand_raw(const uint16_t *v, uint32_t mask, uint16_t *out) {
    for (int i = 0; i < 4; ++i, mask >>= 8, out += 8) {
        _mm_storeu_si128((__m128i *)out, expand_words(v, mask & 0xff));
        v += bits_in(mask & 0xff);
    }
}
inline void expand_raw(const uint32_t *v, uint32_t mask, uint32_t *out) {
    for (int i = 0; i < 4; ++i, mask >>= 8, out += 8) {
        _mm256_storeu_ps((float *)out, (__m256)expand_8((const float *)v, mask & 0xff));
        v += bits_in(mask & 0xff);
    }
}

#else

template <class T>
inline void expand_raw(const T *v, uint32_t mask, T *out) {
    for (int i = 0; i < 32; ++i, mask >>= 1) {
        const uint32_t kept = mask & 1;
        out[i] = (T)(*v & (T)(0 - kept));
        v += kept;
    }
}
template <class T>
inline Block expand_floats(const T *v, uint32_t mask) {
    float out[32];
    for (int i = 0; i < 32; ++i, mask >>= 1) {
        out[i] = mask & 1 ? to_float(*v) : 0.0f;
        v += mask & 1;
    }
    Block block;
    for (int i = 0; i < kBlockVectors; ++i) block.v[i] = load_floats(out + kWide * i);
    return block;
}

#endif

template <class T>
struct Format : FloatFormat {
    static Block expand(const T *v, uint32_t mask) { return expand_floats(v, mask); }
};

#if defined(__AVX512BF16__)

// Pairs of bf16 products go into one fp32 sum; x stays bf16.
struct WordBlock {
    __m512i v[1];
};
inline int32_t pair_at(const char *unit) {
    int32_t pair;
    memcpy(&pair, unit, sizeof pair);
    return pair;
}
struct FewPairs {
    using Accumulator = __m256;
    static constexpr int kWidth = 8;
    static __m256i load_units(const char *x) { return _mm256_loadu_si256((const __m256i *)x); }
    static __m256i repeat(const char *unit) { return _mm256_set1_epi32(pair_at(unit)); }
    static __m256 multiply_add(__m256 sum, __m256i w, __m256i x) {
        return _mm256_dpbf16_ps(sum, (__m256bh)w, (__m256bh)x);
    }
};
template <>
struct Format<BFloat16> {
    using X = BFloat16;
    using Accumulator = __m512;
    using Few = FewPairs;
    static constexpr int kWidth = 16;
    static constexpr int kVectors = 1, kStep = 32;
    static __m512i load(const BFloat16 *x) { return _mm512_loadu_si512(x); }
    static void store(BFloat16 *x, __m512i a) { _mm512_storeu_si512(x, a); }
    static __m512i load_units(const char *x) { return _mm512_loadu_si512(x); }
    static __m512i repeat(const char *unit) { return _mm512_set1_epi32(pair_at(unit)); }
    static __m512 multiply_add(__m512 sum, __m512i w, __m512i x) {
        return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
    }
    static float sum(__m512 a) { return _mm512_reduce_add_ps(a); }
    static WordBlock expand(const BFloat16 *v, uint32_t mask) { return {{expand_words(v, mask)}}; }
    static size_t place(size_t i) { return i; }
    static BFloat16 convert(BFloat16 x) { return x; }
    static void prepare(const BFloat16 *x, size_t columns, BFloat16 *out) { memcpy(out, x, 2 * columns); }
};

#elif defined(__AVX512VBMI2__)

// The even columns of a word, then the odd ones: a shift and a mask instead of two widening moves.
template <>
struct Format<BFloat16> : FloatFormat {
    static Block expand(const BFloat16 *v, uint32_t mask) {
        const __m512i words = expand_words(v, mask);
        return {{(Floats)_mm512_slli_epi32(words, 16),
                 (Floats)_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000))}};
    }
    static size_t place(size_t i) { return i / 32 * 32 + i % 2 * 16 + i % 32 / 2; }
    static void prepare(const BFloat16 *x, size_t columns, float *out) {
        for (size_t i = 0; i < columns; ++i) out[place(i)] = to_float(x[i]);
    }
};

#endif

}  // namespace
