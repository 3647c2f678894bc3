// Tensor-core products of one warp, and the 16-bit floats they take. dtype is SPARC3_BF16 or SPARC3_FP16.
//
// Lane = 4 g + t holds (PTX ISA, "Matrix fragments for mma.m16n8k16"), two 16-bit elements a register, lower k lower:
//
//     A [16, 16]   a[0]: row g, k 2t      a[1]: row g + 8, k 2t     a[2]: row g, k 2t + 8   a[3]: row g + 8, k 2t + 8
//     B [16, 8]    b[0]: k 2t, column g   b[1]: k 2t + 8, column g
//     D [16, 8]    d[0], d[1]: row g, columns 2t, 2t + 1            d[2], d[3]: row g + 8
//
// and of the sparse product ("mma.sp.m16n8k32"), whose A has two values in every four k:
//
//     A [16, 32]   a[0]: row g, the two of k 4t to 4t + 3           a[2]: those of k 16 + 4t to 16 + 4t + 3; a[1], a[3]: row g + 8
//     B [32, 8]    b[i]: k 2t + 8i, column g
//     places       of lanes t = 0, 1 (half 0) or t = 2, 3 (half 1), two bits a value, the first one lowest: lower 16 bits
//                  row g, upper row g + 8; the first of the two lanes for k 0 to 15, the second for k 16 to 31
#pragma once

#include "launch.h"

#ifdef SPARC3_CUDA_EMULATION
#include "../tests/mma_emulation.h"
#endif

namespace sparc3 {

#ifndef SPARC3_CUDA_EMULATION

template <int dtype>
__device__ __forceinline__ void multiply_dense(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (dtype == SPARC3_BF16)
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The form without a promise that places ascend is slower on newer chips.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define SPARC3_MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define SPARC3_MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
#define SPARC3_MMA_SP_OPERANDS " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"

template <int dtype, int half>
__device__ __forceinline__ void multiply_sparse(float (&d)[4], const uint4 &a, const unsigned (&b)[4],
                                                unsigned places) {
    if constexpr (dtype == SPARC3_BF16)
        asm(SPARC3_MMA_SP "bf16.bf16.f32" SPARC3_MMA_SP_OPERANDS
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places),
                       "n"(half));
    else
        asm(SPARC3_MMA_SP "f16.f16.f32" SPARC3_MMA_SP_OPERANDS
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places),
                       "n"(half));
}

template <int dtype>
__device__ __forceinline__ float widen(uint16_t bits) {
    if constexpr (dtype == SPARC3_BF16) return __uint_as_float(static_cast<unsigned>(bits) << 16);
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

template <int dtype>
__device__ __forceinline__ uint16_t narrow(float value) {
    uint16_t bits;
    if constexpr (dtype == SPARC3_BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#endif

}  // namespace sparc3
