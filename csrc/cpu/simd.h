// Sixteen 32-bit keys at a time, in the instruction set that the including file is compiled for.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed masks are written word by word: little-endian machines only"
#endif

namespace {

constexpr int kLanes = 16;

#if defined(__AVX512BW__)

struct Keys {
    __m512i v;
};

inline Keys load(const int32_t *p) { return {_mm512_loadu_si512(p)}; }
// 16-bit values into the upper halves.
inline Keys load(const uint16_t *p) {
    return {_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16)};
}
inline void store(int32_t *p, Keys a) { _mm512_storeu_si512(p, a.v); }
inline Keys broadcast(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline Keys magnitude(Keys bits) { return {_mm512_and_si512(bits.v, _mm512_set1_epi32(0x7fffffff))}; }
inline Keys signed_key(Keys bits, Keys magnitude) {
    return {_mm512_mask_sub_epi32(magnitude.v, _mm512_movepi32_mask(bits.v), _mm512_setzero_si512(), magnitude.v)};
}
inline Keys max(Keys a, Keys b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline int32_t max_of(Keys a) { return _mm512_reduce_max_epi32(a.v); }
template <int shift>
inline Keys shift_right(Keys a) {
    return {_mm512_srai_epi32(a.v, shift)};
}
inline uint32_t greater(Keys a, Keys b) { return _mm512_cmpgt_epi32_mask(a.v, b.v); }
inline uint32_t equal(Keys a, Keys b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
inline bool all_equal(Keys a) {
    return !_mm512_cmpneq_epi32_mask(a.v, _mm512_broadcastd_epi32(_mm512_castsi512_si128(a.v)));
}
// Append the keys whose bit of `mask` is set; writes a whole vector.
inline int compress(int32_t *p, uint32_t mask, Keys a) {
    // Through a register: the memory form is microcoded on some CPUs.
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16)mask, a.v));
    return __builtin_popcount(mask);
}
// Lane i becomes lane index[i]; both lie in the same kPermuted lanes.
constexpr int kPermuted = 16;
inline Keys permute(Keys a, const int32_t *index) {
    return {_mm512_permutexvar_epi32(_mm512_loadu_si512(index), a.v)};
}
// The `count` lowest set bits of `mask`.
inline uint32_t lowest_bits(uint32_t mask, uint32_t count) { return _pdep_u32((1u << count) - 1, mask); }

#elif defined(__AVX2__)

struct Keys {
    __m256i a, b;
};

inline Keys load(const int32_t *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 8))};
}
inline Keys load(const uint16_t *p) {
    return {_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16),
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8))), 16)};
}
inline void store(int32_t *p, Keys k) {
    _mm256_storeu_si256((__m256i *)p, k.a);
    _mm256_storeu_si256((__m256i *)(p + 8), k.b);
}
inline Keys broadcast(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline Keys magnitude(Keys bits) {
    const __m256i m = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(bits.a, m), _mm256_and_si256(bits.b, m)};
}
inline Keys signed_key(Keys bits, Keys magnitude) {
    return {_mm256_sign_epi32(magnitude.a, bits.a), _mm256_sign_epi32(magnitude.b, bits.b)};
}
inline Keys max(Keys x, Keys y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
template <int shift>
inline Keys shift_right(Keys x) {
    return {_mm256_srai_epi32(x.a, shift), _mm256_srai_epi32(x.b, shift)};
}
inline uint32_t bits_of(__m256i a, __m256i b) {
    return (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(a)) |
           (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(b)) << 8;
}
inline uint32_t greater(Keys x, Keys y) {
    return bits_of(_mm256_cmpgt_epi32(x.a, y.a), _mm256_cmpgt_epi32(x.b, y.b));
}
inline uint32_t equal(Keys x, Keys y) {
    return bits_of(_mm256_cmpeq_epi32(x.a, y.a), _mm256_cmpeq_epi32(x.b, y.b));
}
inline bool all_equal(Keys x) {
    const __m256i first = _mm256_broadcastd_epi32(_mm256_castsi256_si128(x.a));
    return equal(x, {first, first}) == 0xffff;
}
constexpr int kPermuted = 8;
inline Keys permute(Keys x, const int32_t *index) {
    return {_mm256_permutevar8x32_epi32(x.a, _mm256_loadu_si256((const __m256i *)index)),
            _mm256_permutevar8x32_epi32(x.b, _mm256_loadu_si256((const __m256i *)(index + 8)))};
}
inline uint32_t lowest_bits(uint32_t mask, uint32_t count) { return _pdep_u32((1u << count) - 1, mask); }

#else

// GCC vectors of 16 bytes: SSE2, NEON, or whatever the machine has.
typedef int32_t Four __attribute__((vector_size(16)));

struct Keys {
    Four v[4];
};

template <class Body>
inline Keys each(const Body &body) {
    return {body(0), body(1), body(2), body(3)};
}
inline Keys load(const int32_t *p) {
    Keys k;
    memcpy(&k, p, sizeof k);
    return k;
}
inline Keys load(const uint16_t *p) {
    return each([&](int j) {
        const uint16_t *q = p + 4 * j;
        return (Four){q[0], q[1], q[2], q[3]} << 16;
    });
}
inline void store(int32_t *p, Keys k) { memcpy(p, &k, sizeof k); }
inline Keys broadcast(int32_t a) {
    return each([&](int) { return (Four){a, a, a, a}; });
}
inline Keys magnitude(Keys bits) {
    return each([&](int j) { return bits.v[j] & 0x7fffffff; });
}
inline Keys signed_key(Keys bits, Keys magnitude) {
    return each([&](int j) {
        const Four sign = bits.v[j] >> 31;
        return (magnitude.v[j] ^ sign) - sign;
    });
}
inline Keys max(Keys x, Keys y) {
    return each([&](int j) {
        const Four larger = x.v[j] > y.v[j];
        return (x.v[j] & larger) | (y.v[j] & ~larger);
    });
}
template <int shift>
inline Keys shift_right(Keys x) {
    return each([&](int j) { return x.v[j] >> shift; });
}
inline uint32_t bits_of(Four a, Four b, Four c, Four d) {
    const Four place = {1, 2, 4, 8};
    const Four bits = (a & place) | (b & place << 4) | (c & place << 8) | (d & place << 12);
    return (uint32_t)(bits[0] | bits[1] | bits[2] | bits[3]);
}
inline uint32_t greater(Keys x, Keys y) {
    return bits_of(x.v[0] > y.v[0], x.v[1] > y.v[1], x.v[2] > y.v[2], x.v[3] > y.v[3]);
}
inline uint32_t equal(Keys x, Keys y) {
    return bits_of(x.v[0] == y.v[0], x.v[1] == y.v[1], x.v[2] == y.v[2], x.v[3] == y.v[3]);
}
inline bool all_equal(Keys x) { return equal(x, broadcast(x.v[0][0])) == 0xffff; }
constexpr int kPermuted = 16;
inline Keys permute(Keys x, const int32_t *index) {
    int32_t from[kLanes], to[kLanes];
    store(from, x);
    for (int i = 0; i < kLanes; ++i) to[i] = from[index[i]];
    return load(to);
}
inline uint32_t lowest_bits(uint32_t mask, uint32_t count) {
    uint32_t kept = 0;
    for (; count; --count) {
        kept |= mask & -mask;
        mask &= mask - 1;
    }
    return kept;
}

#endif

#if !defined(__AVX512BW__)
inline int32_t max_of(Keys k) {
    int32_t values[kLanes], largest = INT32_MIN;
    store(values, k);
    for (int i = 0; i < kLanes; ++i) largest = values[i] > largest ? values[i] : largest;
    return largest;
}
inline int compress(int32_t *p, uint32_t mask, Keys k) {
    int32_t values[kLanes];
    store(values, k);
    int n = 0;
    for (; mask; mask &= mask - 1) p[n++] = values[__builtin_ctz(mask)];
    return n;
}
#endif

}  // namespace
