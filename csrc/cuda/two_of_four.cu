// 2:4 times up to 64 vectors on the sparse tensor cores, and back to dense. Cut into blocks as linear.h says.
//
// A strip of 16 rows is cut into steps of 64 columns, two sparse products. Nothing is left to decode: a warp reads its
// A fragments (mma.h) as they are, each lane 16 bytes a product, 512 of the warp in one piece.
//
//     values   [strip][step][half][lane]  uint4: the A fragment of the lane, columns 32 half to 32 half + 31 of the step
//     places   [strip][step][lane]        uint32: the places of both halves, as mma.h says which lane gives which
#include "linear.h"

namespace sparc3 {
namespace {

constexpr int kStep = 64;  // columns
constexpr int kAhead = 4;  // steps whose loads are on their way together
constexpr unsigned kFirstTwo = 0x44444444u;  // places 0 and 1 in every group: they must ascend even for zeros

inline size_t steps_of(size_t columns) { return ceil_div(columns, kStep); }

// Where a lane of the products finds the places of a row: which half, which 16 columns, which row of the strip.
//
//     lane 4 g + t    half t / 2, columns 16 (t % 2) to 16 (t % 2) + 15; lower 16 bits row g, upper row g + 8
//
// One warp a step. From the file's order: values [rows, columns / 2], indices [rows, ceil(columns / 8)], 2 bits a place.
__global__ void __launch_bounds__(32) arrange_kernel(const uint16_t *values, const uint8_t *indices, int rows,
                                                     int columns, int steps, uint4 *arranged, unsigned *places) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const size_t index = blockIdx.x;
    const int first = static_cast<int>(index % steps) * kStep, strip = static_cast<int>(index / steps);
    const int kept = columns / 2, index_bytes = (kept + 3) / 4;
    // The two values of the group of four columns from `column` on, 0 outside of the weight.
    const auto pair = [&](int row, int column) {
        if (row >= rows || column >= columns) return 0u;
        const uint16_t *at = values + static_cast<size_t>(row) * kept + column / 2;
        return at[0] | static_cast<unsigned>(at[1]) << 16;
    };
    const int row = strip * kStripRows + g;
    for (int half = 0; half < 2; ++half) {
        const int column = first + 32 * half + 4 * t;
        arranged[(index * 2 + half) * 32 + lane] =
            uint4{pair(row, column), pair(row + 8, column), pair(row, column + 16), pair(row + 8, column + 16)};
    }
    // Four groups, each a nibble of two places.
    const auto sixteen_columns = [&](int of, int column) {
        unsigned found = 0;
        for (int group = 0; group < 4; ++group) {
            const int at = column + 4 * group;
            unsigned two = kFirstTwo & 0xf;
            if (of < rows && at < columns) {
                const int nibble = at / 4;
                two = indices[static_cast<size_t>(of) * index_bytes + nibble / 2] >> (4 * (nibble % 2)) & 0xf;
            }
            found |= two << (4 * group);
        }
        return found;
    };
    const int column = first + 16 * t;
    places[index * 32 + lane] = sixteen_columns(row, column) | sixteen_columns(row + 8, column) << 16;
}

// One warp a step: every lane scatters the values of its fragments.
__global__ void __launch_bounds__(32) unpack_kernel(const uint4 *values, const unsigned *places, int rows, int columns,
                                                    int steps, uint16_t *out) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const size_t index = blockIdx.x;
    const int first = static_cast<int>(index % steps) * kStep, strip = static_cast<int>(index / steps);
    const unsigned own = places[index * 32 + lane];
    for (int half = 0; half < 2; ++half) {
        const uint4 a = values[(index * 2 + half) * 32 + lane];
        for (int sixteen = 0; sixteen < 2; ++sixteen) {
            const unsigned word = __shfl_sync(kAllLanes, own, 2 * half + sixteen, 4);
            for (int upper = 0; upper < 2; ++upper) {
                const int row = strip * kStripRows + g + 8 * upper, column = first + 32 * half + 16 * sixteen + 4 * t;
                if (row >= rows || column >= columns) continue;
                const unsigned two = word >> (16 * upper + 4 * t) & 0xf;
                const unsigned pair = sixteen ? (upper ? a.w : a.z) : (upper ? a.y : a.x);
                uint16_t *to = out + static_cast<size_t>(row) * columns + column;
                for (unsigned j = 0; j < 4; ++j) to[j] = 0;
                to[two & 3] = static_cast<uint16_t>(pair);
                to[two >> 2] = static_cast<uint16_t>(pair >> 16);
            }
        }
    }
}

// The B fragment of 32 columns from k on, 0 from `limit` on. Columns divide by 4: pairs are inside or outside.
__device__ __forceinline__ void load_fragment(const uint16_t *x, int limit, int k, unsigned (&b)[4]) {
    k += threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        b[i] = k + 8 * i < limit ? __ldg(reinterpret_cast<const unsigned *>(x + k + 8 * i)) : 0;
}

template <int dtype, int tiles>
__global__ void __launch_bounds__(32 * kWarps, tiles <= 2 ? kBlocksPerProcessor : 2)
    two_of_four_kernel(const uint4 *values, const unsigned *places, int rows, int columns, int steps,
                       const uint16_t *x, int batch, float *sums, size_t part_size) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int strip = static_cast<int>(blockIdx.x) * kWarps + warp;
    if (strip * kStripRows >= rows) return;
    const int parts = static_cast<int>(gridDim.y), part = static_cast<int>(blockIdx.y);
    const int begin = static_cast<int>(static_cast<long long>(steps) * part / parts);
    const int end = static_cast<int>(static_cast<long long>(steps) * (part + 1) / parts);
    values += static_cast<size_t>(strip) * steps * 64 + lane;
    places += static_cast<size_t>(strip) * steps * 32 + lane;
    const uint16_t *vectors[tiles];
    for (int tile = 0; tile < tiles; ++tile) vectors[tile] = vector_of_lane(x, columns, batch, tile);

    // Beyond the part both operands are 0: no branch for what a group has too many.
    const int limit = min(columns, end * kStep);
    float d[tiles][4] = {};
    uint4 a[kAhead][2];
    unsigned where[kAhead];
    const auto load = [&](int i, int step) {
        const bool inside = step < end;
        const size_t at = static_cast<size_t>(step) * 32;
        a[i][0] = inside ? __ldcs(values + 2 * at) : uint4{0, 0, 0, 0};
        a[i][1] = inside ? __ldcs(values + 2 * at + 32) : uint4{0, 0, 0, 0};
        where[i] = inside ? __ldcs(places + at) : kFirstTwo;
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i, begin + i);
    for (int group = begin; group < end; group += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const uint4 first = a[i][0], second = a[i][1];
            const unsigned both = where[i];
            // Kept in registers for a whole group: its loads are on their way while the others are multiplied.
            load(i, group + kAhead + i);
#pragma unroll
            for (int tile = 0; tile < tiles; ++tile) {
                unsigned b[4];
                load_fragment(vectors[tile], limit, (group + i) * kStep, b);
                multiply_sparse<dtype, 0>(d[tile], first, b, both);
                load_fragment(vectors[tile], limit, (group + i) * kStep + 32, b);
                multiply_sparse<dtype, 1>(d[tile], second, b, both);
            }
        }
    }
    store_sums<tiles>(d, sums + part * part_size, strip, rows, batch);
}

using Kernel = void (*)(const uint4 *, const unsigned *, int, int, int, const uint16_t *, int, float *, size_t);

template <int dtype>
Kernel kernel_for(int batch) {
    if (batch <= 8) return two_of_four_kernel<dtype, 1>;
    if (batch <= 16) return two_of_four_kernel<dtype, 2>;
    if (batch <= 32) return two_of_four_kernel<dtype, 4>;
    return two_of_four_kernel<dtype, 8>;
}

int check_arguments(const sparc3_cuda_two_of_four *w) {
    if (!w || !is_half(w->dtype) || !fits(w->rows, w->columns) || w->columns % 4) return SPARC3_ERROR_ARGUMENT;
    if (!w->rows || !w->columns) return SPARC3_OK;
    return w->values && w->places && is_aligned(w->values, 16) ? SPARC3_OK : SPARC3_ERROR_ARGUMENT;
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_cuda_two_of_four_steps(size_t rows, size_t columns) { return strips_of(rows) * steps_of(columns); }

int sparc3_cuda_two_of_four_arrange(const sparc3_nm *weight, void *values, uint32_t *places, void *stream) {
    if (!weight || weight->n != 2 || weight->m != 4 || !is_half(weight->dtype)) return SPARC3_ERROR_ARGUMENT;
    const sparc3_nm &w = *weight;
    if (!fits(w.rows, w.columns) || w.columns % 4) return SPARC3_ERROR_ARGUMENT;
    const size_t steps = steps_of(w.columns), all = strips_of(w.rows) * steps;
    if (!all) return SPARC3_OK;
    if (!w.values || !w.indices || !values || !places || !is_aligned(values, 16)) return SPARC3_ERROR_ARGUMENT;
    return launch(arrange_kernel, dim3(static_cast<unsigned>(all)), dim3(32), 0, stream,
                  static_cast<const uint16_t *>(w.values), w.indices, static_cast<int>(w.rows),
                  static_cast<int>(w.columns), static_cast<int>(steps), static_cast<uint4 *>(values), places);
}

int sparc3_cuda_two_of_four_unpack(const sparc3_cuda_two_of_four *weight, void *out, void *stream) {
    const int status = check_arguments(weight);
    if (status || !weight->rows || !weight->columns) return status;
    if (!out) return SPARC3_ERROR_ARGUMENT;
    const sparc3_cuda_two_of_four &w = *weight;
    const size_t steps = steps_of(w.columns);
    return launch(unpack_kernel, dim3(static_cast<unsigned>(strips_of(w.rows) * steps)), dim3(32), 0, stream,
                  static_cast<const uint4 *>(w.values), w.places, static_cast<int>(w.rows),
                  static_cast<int>(w.columns), static_cast<int>(steps), static_cast<uint16_t *>(out));
}

size_t sparc3_cuda_two_of_four_linear_workspace_size(size_t rows, size_t columns, size_t batch) {
    int status;
    const int parts = parts_of(rows, ceil_div(steps_of(columns), kAhead), &status);
    return sums_size(rows, std::min<size_t>(batch, kMostVectors), parts);
}

int sparc3_cuda_two_of_four_linear(const sparc3_cuda_two_of_four *weight, const void *x, size_t batch,
                                   const void *bias, void *y, void *workspace, size_t workspace_size, void *stream) {
    int status = check_arguments(weight);
    if (status || !weight->rows || !batch) return status;
    const sparc3_cuda_two_of_four &w = *weight;
    status = check_operands(w.rows, w.columns, x, batch, bias, y, workspace, workspace_size);
    if (status) return status;
    if (!is_aligned(x, 4)) return SPARC3_ERROR_ARGUMENT;
    const size_t steps = steps_of(w.columns);
    const int parts = parts_of(w.rows, ceil_div(steps, kAhead), &status);
    if (status) return status;
    if (workspace_size < sums_size(w.rows, std::min<size_t>(batch, kMostVectors), parts)) return SPARC3_ERROR_WORKSPACE;
    const dim3 grid(static_cast<unsigned>(ceil_div(strips_of(w.rows), kWarps)), static_cast<unsigned>(parts));
    float *sums = static_cast<float *>(workspace);
    return each_pass(batch, [&](size_t first, int vectors) {
        const Kernel kernel =
            w.dtype == SPARC3_BF16 ? kernel_for<SPARC3_BF16>(vectors) : kernel_for<SPARC3_FP16>(vectors);
        const int failed = launch(kernel, grid, dim3(32 * kWarps), 0, stream, static_cast<const uint4 *>(w.values),
                                  w.places, static_cast<int>(w.rows), static_cast<int>(w.columns),
                                  static_cast<int>(steps), static_cast<const uint16_t *>(x) + first * w.columns,
                                  vectors, sums, static_cast<size_t>(vectors) * w.rows);
        if (failed) return failed;
        return add_parts(w.dtype, sums, parts, w.rows, static_cast<size_t>(vectors), bias,
                         static_cast<uint16_t *>(y) + first * w.rows, stream);
    });
}
