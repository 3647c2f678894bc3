// Tensor-core products for cuda_emulation.h, written from the fragment layouts that cuda/mma.h repeats: every lane shows
// its fragments to the warp and computes its own four results, in fp32, k ascending.
#pragma once

#include "../cpu/half.h"
#include "cuda_emulation.h"
#include "sparc3/sparc3.h"

namespace sparc3 {

template <int dtype>
float widen(uint16_t bits) {
    if constexpr (dtype == SPARC3_BF16) return to_float(BFloat16{bits});
    return to_float(Float16{bits});
}

template <int dtype>
uint16_t narrow(float value) {
    if constexpr (dtype == SPARC3_BF16) {
        BFloat16 out;
        from_float(value, &out);
        return out.bits;
    }
    Float16 out;
    from_float(value, &out);
    return out.bits;
}

// What each lane of the warp brought, as registers.
struct Registers {
    unsigned of[32][4];

    // Two calls of a warp operation carry four registers.
    Registers(unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
        keep(0, (uint64_t)r1 << 32 | r0);
        keep(2, (uint64_t)r3 << 32 | r2);
    }
    uint16_t element(int lane, int reg, int k) const { return (uint16_t)(of[lane][reg] >> 16 * (k & 1)); }

private:
    void keep(int first, uint64_t both) {
        const uint64_t *values = emulation::exchange(~0u, both);
        for (int lane = 0; lane < 32; ++lane) {
            of[lane][first] = (unsigned)values[lane];
            of[lane][first + 1] = (unsigned)(values[lane] >> 32);
        }
    }
};

template <int dtype>
void multiply_dense(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const Registers left(a[0], a[1], a[2], a[3]), right(b0, b1, 0, 0);
    const int lane = emulation::block.current->lane;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int t = k % 8 / 2;
            const uint16_t x = left.element(row % 8 * 4 + t, row / 8 + k / 8 * 2, k);
            d[i] += widen<dtype>(x) * widen<dtype>(right.element(column * 4 + t, k / 8, k));
        }
    }
}

template <int dtype, int half>
void multiply_sparse(float (&d)[4], const uint4 &a, const unsigned (&b)[4], unsigned places) {
    const Registers left(a.x, a.y, a.z, a.w), right(b[0], b[1], b[2], b[3]), where(places, 0, 0, 0);
    const int lane = emulation::block.current->lane;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2, quad = row % 8 * 4;
        for (int value = 0; value < 16; ++value) {  // two for each of eight groups of four k
            const int group = value / 2;
            const unsigned word = where.of[quad + 2 * half + group / 4][0];
            const int place = word >> (row / 8 * 16 + group % 4 * 4 + value % 2 * 2) & 3, k = 4 * group + place;
            const uint16_t x = left.element(quad + group % 4, row / 8 + group / 4 * 2, value);
            d[i] += widen<dtype>(x) * widen<dtype>(right.element(column * 4 + k % 8 / 2, k / 8, k));
        }
    }
}

}  // namespace sparc3
