// What the tests of the CUDA kernels of packed weights share: weights, vectors, and products in fp64.
#pragma once

#include <math.h>
#include <stdio.h>

#include <random>
#include <vector>

#include "cuda_emulation.h"
#include "mma_emulation.h"
#include "sparc3/sparc3_cuda.h"

#define CHECK(condition)                                                    \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            return 1;                                                       \
        }                                                                   \
    } while (0)

inline uint16_t narrow_to(int dtype, float value) {
    return dtype == SPARC3_BF16 ? sparc3::narrow<SPARC3_BF16>(value) : sparc3::narrow<SPARC3_FP16>(value);
}
inline double wide(int dtype, uint16_t bits) {
    return dtype == SPARC3_BF16 ? sparc3::widen<SPARC3_BF16>(bits) : sparc3::widen<SPARC3_FP16>(bits);
}

struct Weight {
    int dtype;
    size_t rows, columns;
    std::vector<uint16_t> bits;

    const uint16_t *at() const { return bits.data(); }
    double value(size_t row, size_t column) const { return wide(dtype, bits[row * columns + column]); }
};

// Normal values where `kept(row, column, uniform random number)`, else +0 or, now and then, -0.
template <class Kept>
Weight make_weight(int dtype, size_t rows, size_t columns, const Kept &kept) {
    std::mt19937 random(static_cast<unsigned>(rows * 31 + columns));
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<double> uniform;
    Weight weight{dtype, rows, columns, std::vector<uint16_t>(rows * columns)};
    for (size_t i = 0; i < weight.bits.size(); ++i) {
        const uint16_t value = narrow_to(dtype, normal(random));
        weight.bits[i] = kept(i / columns, i % columns, uniform(random)) ? value : i % 7 ? 0 : 0x8000;
    }
    return weight;
}
inline Weight random_weight(int dtype, size_t rows, size_t columns, double sparsity) {
    return make_weight(dtype, rows, columns, [=](size_t, size_t, double u) { return u >= sparsity; });
}
// Rows 3 and 11 of a strip are dense, rows 1 and 9 empty, columns from 256 on mostly so.
inline Weight striped_weight(int dtype, size_t rows, size_t columns) {
    return make_weight(dtype, rows, columns, [](size_t row, size_t column, double u) {
        return row % 8 == 3 || (row % 8 != 1 && u < (column < 256 ? 0.6 : 0.05));
    });
}

// Two of four at any two places in most groups, one or none in some.
inline Weight two_of_four_weight(int dtype, size_t rows, size_t columns) {
    std::mt19937 random(17);
    unsigned kept = 0;
    return make_weight(dtype, rows, columns, [&](size_t row, size_t column, double) {
        constexpr unsigned kPatterns[] = {3, 5, 9, 6, 10, 12, 3, 5, 9, 6, 10, 12, 1, 2, 4, 8, 0};
        if (column % 4 == 0) kept = kPatterns[(random() + row) % 17];
        return (kept >> column % 4 & 1) != 0;
    });
}

// Nonzeros bit by bit, zeros as +0.
inline bool same_bits(const std::vector<uint16_t> &found, const Weight &weight) {
    for (size_t i = 0; i < found.size(); ++i)
        if (found[i] != (weight.bits[i] == 0x8000 ? 0 : weight.bits[i])) return false;
    return found.size() == weight.bits.size();
}

// Vectors and a bias for a weight, and what must come out.
class Product {
public:
    Product(const Weight &weight, size_t batch) : w_(weight), batch_(batch) {
        std::mt19937 random(static_cast<unsigned>(batch));
        std::normal_distribution<float> normal;
        const auto draw = [&](size_t n) {
            std::vector<uint16_t> values(n);
            for (uint16_t &value : values) value = narrow_to(weight.dtype, normal(random));
            return values;
        };
        x_ = draw(batch * weight.columns);
        bias_ = draw(weight.rows);
    }
    const uint16_t *x() const { return x_.data(); }
    const uint16_t *bias() const { return bias_.data(); }

    // Within the error of fp32 sums in any order, gamma_n sum |w x|, and one rounding to the dtype of y.
    bool close(const std::vector<uint16_t> &y, bool biased) const {
        const double unit = ldexp(1, -24), terms = static_cast<double>(w_.columns + 2);
        const double gamma = terms * unit / (1 - terms * unit), rounding = ldexp(1, w_.dtype == SPARC3_BF16 ? -8 : -11);
        for (size_t b = 0; b < batch_; ++b)
            for (size_t r = 0; r < w_.rows; ++r) {
                double exact = biased ? wide(w_.dtype, bias_[r]) : 0, magnitude = fabs(exact);
                for (size_t c = 0; c < w_.columns; ++c) {
                    const double term = w_.value(r, c) * wide(w_.dtype, x_[b * w_.columns + c]);
                    exact += term;
                    magnitude += fabs(term);
                }
                // fp16 rounds subnormal results to a multiple of 2^-24.
                const double bound = gamma * magnitude * (1 + rounding) + rounding * fabs(exact) + ldexp(1, -25);
                if (!(fabs(wide(w_.dtype, y[b * w_.rows + r]) - exact) <= bound)) return false;
            }
        return true;
    }

private:
    const Weight &w_;
    size_t batch_;
    std::vector<uint16_t> x_, bias_;
};

// cuda_convert.cpp; 0 where all is well.
int test_conversions();
