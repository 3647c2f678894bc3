// Bitmap times up to 64 vectors, and back to dense. The order of the weight: bitmap_tiles.h; the cut into blocks:
// linear.h.
//
// A warp has two buffers: while it multiplies a chunk out of one, the values of the next chunk arrive in the other and
// the masks of the one after in registers. Warps never wait for each other.
#include "bitmap_tiles.h"

namespace sparc3 {
namespace {

// Eight elements of a vector from k on, 0 beyond its end.
template <bool aligned>  // 16-byte loads are allowed, columns divide by 8
__device__ __forceinline__ uint4 load_eight(const uint16_t *x, int columns, int k) {
    uint4 found{0, 0, 0, 0};
    if constexpr (aligned) {
        if (k < columns) found = __ldg(reinterpret_cast<const uint4 *>(x + k));
    } else {
        const auto pair = [&](int at) {
            const unsigned low = at < columns ? __ldg(x + at) : 0, high = at + 1 < columns ? __ldg(x + at + 1) : 0;
            return high << 16 | low;
        };
        found = uint4{pair(k), pair(k + 2), pair(k + 4), pair(k + 6)};
    }
    return found;
}

// d += 16 rows of a chunk times the vectors, from column k on.
template <int dtype, int tiles, bool aligned>
__device__ __forceinline__ void multiply_chunk(const uint4 &mask, Taker taker, const uint16_t *const (&x)[tiles],
                                               int columns, int k, float (&d)[tiles][4]) {
    k += threadIdx.x % 4 * 16;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        const unsigned bits = quarter_of(mask, q);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 b[tiles];
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile)
                b[tile] = load_eight<aligned>(x[tile], columns, k + 64 * q + 8 * half);
#pragma unroll
            for (int f = 0; f < 2; ++f) {
                const int shift = 16 * half + 8 * f;
                unsigned a[4];
                taker.take(bits >> shift, a[0], a[2]);
                taker.take(bits >> (shift + 4), a[1], a[3]);
#pragma unroll
                for (int tile = 0; tile < tiles; ++tile)
                    multiply_dense<dtype>(d[tile], a, f ? b[tile].z : b[tile].x, f ? b[tile].w : b[tile].y);
            }
        }
    }
}

__device__ __forceinline__ void fill_picks(uint2 *picks) {
    if (threadIdx.x < kPicks) picks[threadIdx.x] = pick_of(threadIdx.x);
    __syncthreads();
}

template <int dtype, int tiles, bool aligned>
__global__ void __launch_bounds__(32 * kWarps)
    bitmap_linear_kernel(const uint4 *masks, const unsigned *starts, const uint4 *values, int rows, int columns,
                         int chunks, int deepest, const uint16_t *x, int batch, float *sums, size_t part_size) {
    __shared__ uint2 picks[kPicks];
    fill_picks(picks);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int strip = static_cast<int>(blockIdx.x) * kWarps + warp;
    if (strip * kStripRows >= rows) return;
    const int parts = static_cast<int>(gridDim.y), part = static_cast<int>(blockIdx.y);
    int chunk = static_cast<int>(static_cast<long long>(chunks) * part / parts);
    const int end = static_cast<int>(static_cast<long long>(chunks) * (part + 1) / parts);
    masks += static_cast<size_t>(strip) * chunks * kChunkMasks + lane;
    starts += static_cast<size_t>(strip) * chunks;

    unsigned now = 2 * warp * column_bytes(deepest), later = now + column_bytes(deepest);
    const auto buffer = [](unsigned byte) { return reinterpret_cast<unsigned *>(dynamic_shared) + byte / 4; };
    const uint16_t *vectors[tiles];
    for (int tile = 0; tile < tiles; ++tile) vectors[tile] = vector_of_lane(x, columns, batch, tile);
    const auto mask_of = [&](int c) {
        return c < end ? __ldcs(masks + static_cast<size_t>(c) * kChunkMasks) : uint4{0, 0, 0, 0};
    };
    float d[tiles][4] = {};
    uint4 mask = mask_of(chunk), next = mask_of(chunk + 1);
    if (chunk < end) fetch_chunk(mask, values + starts[chunk], buffer(now));
    for (; chunk < end; ++chunk) {
        const uint4 after = mask_of(chunk + 2);
        if (chunk + 1 < end) {
            fetch_chunk(next, values + starts[chunk + 1], buffer(later));
            __pipeline_wait_prior(1);
        } else {
            __pipeline_wait_prior(0);
        }
        __syncwarp();
        multiply_chunk<dtype, tiles, aligned>(mask, Taker(dynamic_shared, now, picks), vectors, columns, chunk * kChunk, d);
        // No lane may overwrite a buffer that another still reads.
        __syncwarp();
        const unsigned free = now;
        now = later;
        later = free;
        mask = next;
        next = after;
    }
    store_sums<tiles>(d, sums + part * part_size, strip, rows, batch);
}

// One warp a chunk.
__global__ void __launch_bounds__(32)
    bitmap_unpack_kernel(const uint4 *masks, const unsigned *starts, const uint4 *values, int rows, int columns,
                         int chunks, uint16_t *out) {
    __shared__ uint2 picks[kPicks];
    fill_picks(picks);
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const size_t index = blockIdx.x;
    const int strip = static_cast<int>(index / chunks), first = static_cast<int>(index % chunks) * kChunk;
    const uint4 mask = masks[index * kChunkMasks + lane];
    fetch_chunk(mask, values + starts[index], reinterpret_cast<unsigned *>(dynamic_shared));
    __pipeline_wait_prior(0);
    __syncwarp();
    Taker taker(dynamic_shared, 0, picks);
    for (int i = 0; i < 32; ++i) {  // four elements each
        const int q = i / 8, f = i / 2 % 4, row = strip * kStripRows + g + 8 * (i % 2);
        unsigned pairs[2];
        taker.take(quarter_of(mask, q) >> (4 * (i % 8)), pairs[0], pairs[1]);
        for (int j = 0; j < 4; ++j) {
            const int column = first + 64 * q + 16 * t + 4 * f + j;
            if (row < rows && column < columns)
                out[static_cast<size_t>(row) * columns + column] = static_cast<uint16_t>(pairs[j / 2] >> 16 * (j % 2));
        }
    }
}

using Kernel = void (*)(const uint4 *, const unsigned *, const uint4 *, int, int, int, int, const uint16_t *, int,
                        float *, size_t);

template <int dtype, bool aligned>
Kernel kernel_for(int batch) {
    if (batch <= 8) return bitmap_linear_kernel<dtype, 1, aligned>;
    if (batch <= 16) return bitmap_linear_kernel<dtype, 2, aligned>;
    if (batch <= 32) return bitmap_linear_kernel<dtype, 4, aligned>;
    return bitmap_linear_kernel<dtype, 8, aligned>;
}

int check_arguments(const sparc3_cuda_bitmap *w) {
    if (!w || !is_half(w->dtype) || !fits(w->rows, w->columns) || w->deepest > kChunk / 4) return SPARC3_ERROR_ARGUMENT;
    if (!w->rows || !w->columns) return SPARC3_OK;
    const bool there = w->masks && w->starts && (w->values || !w->deepest);
    return there && is_aligned(w->masks, 16) && is_aligned(w->values, 16) ? SPARC3_OK : SPARC3_ERROR_ARGUMENT;
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_cuda_bitmap_linear_workspace_size(size_t rows, size_t columns, size_t batch) {
    int status;
    const int parts = parts_of(rows, chunks_of(columns), &status);
    return sums_size(rows, std::min<size_t>(batch, kMostVectors), parts);
}

int sparc3_cuda_bitmap_linear(const sparc3_cuda_bitmap *weight, const void *x, size_t batch, const void *bias, void *y,
                              void *workspace, size_t workspace_size, void *stream) {
    int status = check_arguments(weight);
    if (status || !weight->rows || !batch) return status;
    const sparc3_cuda_bitmap &w = *weight;
    status = check_operands(w.rows, w.columns, x, batch, bias, y, workspace, workspace_size);
    if (status) return status;
    const int chunks = static_cast<int>(chunks_of(w.columns)), parts = parts_of(w.rows, chunks_of(w.columns), &status);
    if (status) return status;
    if (workspace_size < sums_size(w.rows, std::min<size_t>(batch, kMostVectors), parts)) return SPARC3_ERROR_WORKSPACE;
    const bool aligned = w.columns % 8 == 0 && is_aligned(x, 16);
    const size_t shared = static_cast<size_t>(2 * kWarps) * column_bytes(static_cast<int>(w.deepest));
    const dim3 grid(static_cast<unsigned>(ceil_div(strips_of(w.rows), kWarps)), static_cast<unsigned>(parts));
    float *sums = static_cast<float *>(workspace);
    return each_pass(batch, [&](size_t first, int vectors) {
        const Kernel kernel = w.dtype == SPARC3_BF16
                                  ? (aligned ? kernel_for<SPARC3_BF16, true> : kernel_for<SPARC3_BF16, false>)(vectors)
                                  : (aligned ? kernel_for<SPARC3_FP16, true> : kernel_for<SPARC3_FP16, false>)(vectors);
        const int failed =
            launch(kernel, grid, dim3(32 * kWarps), shared, stream, reinterpret_cast<const uint4 *>(w.masks), w.starts,
                   static_cast<const uint4 *>(w.values), static_cast<int>(w.rows), static_cast<int>(w.columns), chunks,
                   static_cast<int>(w.deepest), static_cast<const uint16_t *>(x) + first * w.columns, vectors, sums,
                   static_cast<size_t>(vectors) * w.rows);
        if (failed) return failed;
        return add_parts(w.dtype, sums, parts, w.rows, static_cast<size_t>(vectors), bias,
                         static_cast<uint16_t *>(y) + first * w.rows, stream);
    });
}

int sparc3_cuda_bitmap_unpack(const sparc3_cuda_bitmap *weight, void *out, void *stream) {
    const int status = check_arguments(weight);
    if (status || !weight->rows || !weight->columns) return status;
    if (!out) return SPARC3_ERROR_ARGUMENT;
    const sparc3_cuda_bitmap &w = *weight;
    const size_t chunks = chunks_of(w.columns);
    return launch(bitmap_unpack_kernel, dim3(static_cast<unsigned>(strips_of(w.rows) * chunks)), dim3(32),
                  static_cast<size_t>(column_bytes(static_cast<int>(w.deepest))), stream,
                  reinterpret_cast<const uint4 *>(w.masks), w.starts, static_cast<const uint4 *>(w.values),
                  static_cast<int>(w.rows), static_cast<int>(w.columns), static_cast<int>(chunks),
                  static_cast<uint16_t *>(out));
}
