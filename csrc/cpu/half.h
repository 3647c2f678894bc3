// fp32, bf16 and fp16 as the kernels read and write them. Internal linkage: files of every instruction set include it.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

inline float to_float(float value) { return value; }
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
inline float to_float(BFloat16 value) { return float_of((uint32_t)value.bits << 16); }
// Exact for every half, whether or not the caller's thread flushes subnormal fp32 numbers (subnormal halves are
// normal in fp32 and are made by subtracting two normal numbers).
inline float to_float(Float16 value) {
    const uint32_t sign = (uint32_t)(value.bits & 0x8000) << 16, size = (uint32_t)(value.bits & 0x7fff) << 13;
    const uint32_t rebias = (127 - 15) << 23, smallest = (127 - 14) << 23;
    const uint32_t normal = size + rebias, special = size + 2 * rebias;
    float subnormal = float_of(size | smallest) - float_of(smallest);
    uint32_t magnitude;
    memcpy(&magnitude, &subnormal, sizeof magnitude);
    magnitude = size >= 1u << 23 ? normal : magnitude;
    magnitude = size >= 31u << 23 ? special : magnitude;
    return float_of(sign | magnitude);
}

// Rounded to the nearest, ties to even; a NaN stays one.
inline void from_float(float value, float *out) { *out = value; }
inline void from_float(float value, BFloat16 *out) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    out->bits = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}
inline void from_float(float value, Float16 *out) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t half;
    if (size > 0x7f800000) {
        half = 0x7e00 | (size >> 13 & 0x3ff);
    } else if (size >= 0x477ff000) {  // 65520 and above round to infinity
        half = 0x7c00;
    } else if (size >= 0x38800000) {
        half = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    } else {
        // Subnormal halves: the addition rounds at 2^-24, the last place of the sum.
        half = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    }
    out->bits = (uint16_t)(sign | half);
}

}  // namespace
