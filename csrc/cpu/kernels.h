// What each instruction set implements. Its file is compiled with that set's flags, so it must not emit an inline
// function that the linker could choose for another file: only C headers and internal linkage there.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sparc3 {

constexpr size_t kBins = 65536;

// A counting pass over the keys strictly between `low` and `high`: key - low - 1 >> shift is the bin.
struct Bracket {
    int32_t low, high;
    int shift;  // (high - low - 2) >> shift < kBins
};

// What a bracket pass finds outside the bins. Scores equal to an end are counted here, so that a value shared by
// many (zeros) costs no more than any other.
struct Tally {
    uint64_t below, at_low, at_high;
};

struct Kernels {
    const char *name;

    // Count n scores by the upper 16 bits of their keys; bin 0 is key >> 16 == -32768. False where one is NaN.
    bool (*count_upper32)(int dtype, const void *scores, size_t n, uint32_t *bins);
    bool (*count_upper64)(int dtype, const void *scores, size_t n, uint64_t *bins);
    // Add the counts of one pass to `bins` and `tally`. False where a score is NaN.
    bool (*count_bracket32)(int dtype, const void *scores, size_t n, Bracket bracket, Tally *tally, uint32_t *bins);
    bool (*count_bracket64)(int dtype, const void *scores, size_t n, Bracket bracket, Tally *tally, uint64_t *bins);
    // How many of n scores have this key.
    uint64_t (*count_equal)(int dtype, const void *scores, size_t n, int32_t key);
    // Write ceil(n / 8) mask bytes; returns how many equal scores are still to be kept.
    uint64_t (*mask)(int dtype, const void *scores, size_t n, int32_t key, uint64_t keep_equal, uint8_t *bits);
    // Rows of a matrix, the first one starting at a byte of `bits`; scratch is rows_scratch(cols) bytes.
    bool (*rows)(int dtype, const void *scores, size_t rows, size_t cols, size_t prune, uint8_t *bits,
                 void *scratch);
    // Groups of a vector, the first one starting at a byte of `bits`.
    bool (*nm)(int dtype, const void *scores, size_t groups, int keep, int group, uint8_t *bits);

    // Weight relevance of one block of rows; see weight_relevance.cpp.
    int tile_n, tile_k;  // rows and columns of a register tile
    void (*pack)(int dtype, bool squared, const void *source, size_t tokens, size_t stride, size_t width, int tile,
                 float *packed);
    void (*tile)(int reduction, const float *g, const float *x, size_t samples, size_t tokens, float *acc,
                 size_t stride, int rows, int cols);

    // A dense linear on few tokens, rows [begin, end) of its weight; see linear.cpp.
    int linear_rows;  // rows that are computed at a time
    void (*linear)(const float *x, const float *w, size_t tokens, size_t n, size_t k, size_t begin, size_t end,
                   float *y);
    void (*input_gradient)(const float *g, const float *w, size_t n, size_t k, size_t begin, size_t end, float *sums);
};

constexpr size_t kTokenGroup = 16;  // tokens that a linear on few tokens takes at a time

constexpr size_t kDigitBins = 2048;  // a row is narrowed by 11, 11 and 10 bits of its keys

constexpr size_t rows_scratch(size_t cols) { return (2 * kDigitBins + cols + 16) * sizeof(int32_t); }

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace sparc3
