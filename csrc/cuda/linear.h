// What the decoding products of packed weights share: how they are cut into blocks, and the sum of the parts.
//
// One warp multiplies a strip of 16 rows of W by a range of its columns, for up to 64 vectors at once. The ranges are
// cut so that the machine is filled once:
//
//     columns ->       part 0         part 1       ...
//     rows  0 .. 15    warp 0     |  warp 0     |
//     rows 16 .. 31    warp 1     |  warp 1     |
//     rows 32 .. 47    warp 2     |  warp 2     |
//     rows 48 .. 63    warp 3     |  warp 3     |
//                   block (0, 0)   block (0, 1)
//
// Every part writes sums of its own, fp32 [part][vector][row]; a second kernel adds them up, always in the same order.
#pragma once

#include <algorithm>

#include "mma.h"
#include "sparc3/sparc3_cuda.h"

namespace sparc3 {

constexpr int kStripRows = 16;       // of one mma
constexpr int kTileVectors = 8;      // likewise
constexpr int kMostVectors = 64;     // in one pass over the weight
constexpr int kWarps = 4;            // of a block, each with a strip of its own
constexpr int kBlocksPerProcessor = 4;

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
inline size_t strips_of(size_t rows) { return ceil_div(rows, kStripRows); }
inline bool is_half(int dtype) { return dtype == SPARC3_BF16 || dtype == SPARC3_FP16; }
inline bool is_aligned(const void *at, size_t to) { return reinterpret_cast<uintptr_t>(at) % to == 0; }
// Sizes that int indices of rows, columns and strips hold.
inline bool fits(size_t rows, size_t columns) { return rows < 1u << 30 && columns < 1u << 30; }

// The parts that `steps` steps along the columns are cut into, on the current device.
inline int parts_of(size_t rows, size_t steps, int *status) {
    int device = 0, processors = 1;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    *status = status_of(error);
    const size_t blocks = ceil_div(strips_of(rows), kWarps), fit = static_cast<size_t>(processors) * kBlocksPerProcessor;
    return static_cast<int>(std::clamp(fit / std::max<size_t>(blocks, 1), size_t{1}, std::max<size_t>(steps, 1)));
}

inline bool overlap(const void *a, size_t size_a, const void *b, size_t size_b) {
    const char *x = static_cast<const char *>(a), *y = static_cast<const char *>(b);
    return size_a && size_b && x < y + size_b && y < x + size_a;
}

// What every product of 16-bit vectors asks of its operands.
inline int check_operands(size_t rows, size_t columns, const void *x, size_t batch, const void *bias, const void *y,
                          const void *workspace, size_t workspace_size) {
    if ((columns && !x) || !y || !workspace || !is_aligned(workspace, 4) || !fits(batch, 1))
        return SPARC3_ERROR_ARGUMENT;
    const size_t in = batch * columns * 2, out = batch * rows * 2;
    const bool overlaps = overlap(y, out, x, in) || overlap(y, out, workspace, workspace_size) ||
                          overlap(x, in, workspace, workspace_size) || (bias && overlap(y, out, bias, rows * 2));
    return overlaps ? SPARC3_ERROR_OVERLAP : SPARC3_OK;
}

// Bytes of the sums of all parts.
inline size_t sums_size(size_t rows, size_t batch, int parts) { return static_cast<size_t>(parts) * batch * rows * 4; }

// Vector `tile * 8 + g` of x, g = lane / 4. What lanes beyond the batch compute is not stored: they take the last one.
__device__ __forceinline__ const uint16_t *vector_of_lane(const uint16_t *x, int columns, int batch, int tile) {
    const int vector = min(tile * kTileVectors + static_cast<int>(threadIdx.x % 32 / 4), batch - 1);
    return x + static_cast<size_t>(vector) * columns;
}

// Write the D fragments of a strip to sums [vector][row] of this part.
template <int tiles>
__device__ __forceinline__ void store_sums(const float (&d)[tiles][4], float *sums, int strip, int rows, int batch) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int tile = 0; tile < tiles; ++tile)
        for (int i = 0; i < 4; ++i) {
            const int row = strip * kStripRows + g + 8 * (i / 2), vector = tile * kTileVectors + 2 * t + i % 2;
            if (row < rows && vector < batch) sums[static_cast<size_t>(vector) * rows + row] = d[tile][i];
        }
}

// y [batch, rows] = sums [parts, batch, rows] added up + bias [rows] (NULL: none)
int add_parts(int dtype, const float *sums, int parts, size_t rows, size_t batch, const void *bias, void *y,
              void *stream);

// Call `pass(first vector, vectors)` for as many as the kernels take at once.
template <class Pass>
int each_pass(size_t batch, const Pass &pass) {
    for (size_t first = 0; first < batch; first += kMostVectors) {
        const int status = pass(first, static_cast<int>(std::min<size_t>(batch - first, kMostVectors)));
        if (status) return status;
    }
    return SPARC3_OK;
}

}  // namespace sparc3
