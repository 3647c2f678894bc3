// Dot products with packed weights: what each instruction set implements. A row of a bitmap is given as `words` words
// of 32 mask bits and its kept values; N:M rows are given the same way, their bits made from the indices.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sparc3 {

constexpr size_t kWord = 32;      // weights under one word of mask bits
constexpr size_t kOverread = 64;  // bytes that a kernel may read after the last value of a row
constexpr int kFusedBatch = 4;    // up to here a row is expanded in registers, beyond it into a tile of rows
constexpr int kTileRows = 4;
constexpr int kLanes16 = 16;      // vectors of a batch that a CSR row is multiplied with at a time

constexpr size_t words_of(size_t columns) { return (columns + kWord - 1) / kWord; }

struct PackedKernels {
    // Vectors are "prepared" once a call: converted to what a dot product of this dtype multiplies, in the order
    // that it wants, zeros up to whole words.
    size_t (*prepared_element)(int dtype);
    void (*prepare)(int dtype, const void *x, size_t columns, void *prepared);

    // y[b] = w . x[b] for 1 <= batch <= kFusedBatch prepared vectors, `stride` elements apart.
    void (*dot)(int dtype, const uint8_t *mask, size_t words, const void *values, const void *x, size_t stride,
                int batch, float *y);

    // A row as a prepared vector, and y[r][b] = rows[r] . x[b] for kTileRows rows and batch <= tile_batch vectors, all
    // `stride` elements apart.
    int tile_batch;
    void (*expand)(int dtype, const uint8_t *mask, size_t words, const void *values, void *dense);
    void (*tile)(int dtype, const void *rows, const void *x, size_t stride, int batch, float *y);

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
