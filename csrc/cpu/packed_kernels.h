// Dot products with packed weights: what each instruction set implements. A row of a bitmap is given as `words` words
// of 32 mask bits and its kept values; N:M rows are given the same way, their bits made from the indices.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sparc3 {

constexpr size_t kWord = 32;      // weights under one word of mask bits
constexpr size_t kOverread = 64;  // bytes that a kernel may read after the last value of a row
constexpr int kFusedBatch = 4;    // up to here a row is expanded in registers, beyond it into a panel of rows
constexpr int kLanes16 = 16, kLanes8 = 8;  // vectors of a batch that are multiplied side by side: many, few

// A panel is a block of columns of some rows, expanded to prepared elements: small enough for the level-1 cache. A unit
// is 4 bytes of it, one fp32 or a pair of bf16. Rows lie an odd number of cache lines apart, so as not to share sets.
constexpr size_t kBlockUnits = 192, kPanelStride = 4 * kBlockUnits + 64;
constexpr int kMostPanelRows = 16;

constexpr size_t words_of(size_t columns) { return (columns + kWord - 1) / kWord; }

struct PackedKernels {
    // Vectors are "prepared" once a call: converted to what a dot product of this dtype multiplies, in the order
    // that it wants, zeros up to whole words.
    size_t (*prepared_element)(int dtype);
    void (*prepare)(int dtype, const void *x, size_t columns, void *prepared);

    // y[b] = w . x[b] for 1 <= batch <= kFusedBatch prepared vectors, `stride` elements apart; false where the values
    // of the row do not end at `end`.
    bool (*dot)(int dtype, const uint8_t *mask, size_t words, const void *values, const void *end, const void *x,
                size_t stride, int batch, float *y);

    // A block of a row as a prepared vector; returns the values after it, or null where they would go beyond `end`.
    const void *(*expand)(int dtype, const uint8_t *mask, size_t words, const void *values, const void *end,
                          void *dense);
    // The same for `columns` columns from `begin` on, of a CSR row whose next kept values are these; returns how many
    // of them lie there, up to the first one that does not.
    size_t (*scatter)(int dtype, bool wide, const void *indices, const void *values, size_t count, size_t begin,
                      size_t columns, void *dense);
    // sums[r][lane] += panel[r] . x[lane] for panel_rows rows, kPanelStride bytes apart, and kLanes16 or (few) kLanes8
    // prepared vectors, interleaved unit by unit: x[unit][lane]. Meanwhile fetches what lies at ahead[r]: the next
    // panel comes from memory, and waiting for it would take as long as the product.
    int panel_rows;
    void (*tile)(int dtype, bool few, const void *panel, const void *x, size_t units, const char *const *ahead,
                 float *sums);

    // A row as it was before packing.
    void (*unpack)(int dtype, const uint8_t *mask, size_t columns, const void *values, void *out);
    uint64_t (*count)(const uint8_t *mask, size_t words);

    // y = sum_i values[i] x[indices[i]]; x[columns] is 0 and stands in for columns out of range, of which there must
    // be none: false if there are. `wide` indices are 32 bits, else 16.
    bool (*gather)(int dtype, bool wide, const void *indices, const void *values, size_t count, const float *x,
                   size_t columns, float *y);
    // The same for kLanes16 vectors, interleaved: x[column][lane], y[lane].
    bool (*gather_lanes)(int dtype, bool wide, const void *indices, const void *values, size_t count, const float *x,
                         size_t columns, float *y);

    // Mask bytes of 2:4 and 4:8 rows from ceil(columns / 8) * (1 or 2) index bytes.
    void (*masks_2_4)(const uint8_t *indices, size_t bytes, uint8_t *mask);
    void (*masks_4_8)(const uint8_t *indices, size_t bytes, uint8_t *mask);
};

extern const PackedKernels packed_portable;
extern const PackedKernels packed_avx2;
extern const PackedKernels packed_avx512;
extern const PackedKernels packed_avx512vbmi2;
extern const PackedKernels packed_avx512bf16;

}  // namespace sparc3
