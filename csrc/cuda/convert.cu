// From one packed format to another, a warp for each row.
#include <type_traits>

#include "linear.h"
#include "scan.h"

namespace sparc3 {
namespace {

// `many` <= 32 bits of a row of `words` words, from `column` on.
__device__ __forceinline__ unsigned bits_at(const uint32_t *row, int words, int column, int many) {
    const int word = column / 32;
    const unsigned found = __funnelshift_r(row[word], word + 1 < words ? row[word + 1] : 0u, column % 32);
    return many == 32 ? found : found & ((1u << many) - 1);
}

// The sum of what the lanes before this one have; `all` is that of the warp.
__device__ __forceinline__ int before_in_warp(int mine, int *all) {
    int sum = mine;
    for (int by = 1; by < 32; by *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, by);
        if (static_cast<int>(threadIdx.x) >= by) sum += other;
    }
    *all = __shfl_sync(kAllLanes, sum, 31);
    return sum - mine;
}

template <class T>
__device__ __forceinline__ bool is_nonzero(T value) {
    return static_cast<T>(value << 1) != 0;
}

template <class Index>
__global__ void __launch_bounds__(32)
    to_csr_kernel(const uint32_t *bits, const int64_t *offsets, int words, Index *indices) {
    const int lane = static_cast<int>(threadIdx.x);
    const uint32_t *row = bits + static_cast<size_t>(blockIdx.x) * words;
    int64_t reached = offsets[blockIdx.x];
    for (int first = 0; first < words; first += 32) {
        unsigned word = first + lane < words ? row[first + lane] : 0;
        int all;
        int64_t next = reached + before_in_warp(__popc(word), &all);
        for (; word; word &= word - 1)
            indices[next++] = static_cast<Index>(32 * (first + lane) + __ffs(static_cast<int>(word)) - 1);
        reached += all;
    }
}

template <class Index>
__global__ void __launch_bounds__(32)
    from_csr_kernel(const Index *indices, const int64_t *offsets, int words, uint32_t *bits) {
    uint32_t *row = bits + static_cast<size_t>(blockIdx.x) * words;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += 32) row[i] = 0;
    __syncwarp();
    for (int64_t i = offsets[blockIdx.x] + threadIdx.x; i < offsets[blockIdx.x + 1]; i += 32) {
        const unsigned column = static_cast<unsigned>(indices[i]);
        atomicOr(row + column / 32, 1u << column % 32);
    }
}

// Groups whose indices are whole bytes, n of them, in at most 32 columns: what a lane takes at a time.
struct Groups {
    int n, m, groups, width, each, sets, index_bytes;

    Groups(size_t columns, int n, int m)
        : n(n),
          m(m),
          groups(static_cast<int>(columns / m)),
          width(m <= 4 ? 2 : 4),
          each(8 / width),
          sets((groups + each - 1) / each),
          index_bytes(static_cast<int>(ceil_div(static_cast<size_t>(groups) * n * width, 8))) {}
    __device__ __forceinline__ int many(int set) const { return set < sets ? min(each, groups - set * each) : 0; }
    // Of a row, then of a set in it: the first value and the first byte of its indices.
    __device__ __forceinline__ size_t value(size_t row, int set) const {
        return (row * groups + static_cast<size_t>(set) * each) * n;
    }
    __device__ __forceinline__ size_t byte(size_t row, int set) const {
        return row * index_bytes + static_cast<size_t>(set) * n;
    }
};

template <class T>
__global__ void __launch_bounds__(32)
    to_nm_kernel(const uint32_t *bits, const T *kept, const int64_t *offsets, int words, Groups shape, T *values,
                 uint8_t *indices, unsigned long long *wrong) {
    const int lane = static_cast<int>(threadIdx.x), n = shape.n, m = shape.m;
    const size_t r = blockIdx.x;
    int64_t reached = offsets[r];
    for (int first = 0; first < shape.sets; first += 32) {
        const int set = first + lane, many = shape.many(set), column = set * shape.each * m;
        const unsigned mask = many ? bits_at(bits + r * words, words, column, many * m) : 0;
        int all;
        const T *from = kept + (reached + before_in_warp(__popc(mask), &all));
        reached += all;
        T *to = values + shape.value(r, set);
        uint8_t *at = indices + shape.byte(r, set);
        unsigned byte = 0;
        int filled = 0;
        for (int g = 0; g < many; ++g) {
            const unsigned group = mask >> g * m & ((1u << m) - 1);
            int nonzeros = 0;
            for (int k = 0; k < __popc(group); ++k) nonzeros += is_nonzero(from[k]);
            if (nonzeros > n) {  // the output does not count any more
                atomicMin(wrong, static_cast<unsigned long long>(r * shape.groups + set * shape.each + g));
                break;
            }
            int fill = n - nonzeros;
            for (int i = 0; i < m; ++i) {
                const T value = group >> i & 1 ? *from++ : static_cast<T>(0);
                const bool nonzero = is_nonzero(value);
                if (!nonzero && fill-- <= 0) continue;
                *to++ = nonzero ? value : static_cast<T>(0);
                byte |= static_cast<unsigned>(i) << filled;
                filled += shape.width;
                if (filled < 8) continue;
                *at++ = static_cast<uint8_t>(byte);
                byte = filled = 0;
            }
        }
        if (filled) *at = static_cast<uint8_t>(byte);
    }
}

template <class T>
__global__ void __launch_bounds__(32) count_kernel(const T *values, int kept, int64_t *offsets) {
    const T *row = values + static_cast<size_t>(blockIdx.x) * kept;
    int nonzeros = 0;
    for (int i = static_cast<int>(threadIdx.x); i < kept; i += 32) nonzeros += is_nonzero(row[i]);
    const int all = __reduce_add_sync(kAllLanes, nonzeros);
    if (threadIdx.x == 0) offsets[blockIdx.x + 1] = all;
}

template <class T>
__global__ void __launch_bounds__(32)
    from_nm_kernel(const T *values, const uint8_t *indices, const int64_t *offsets, int words, Groups shape,
                   uint32_t *bits, T *kept) {
    const int lane = static_cast<int>(threadIdx.x);
    const size_t r = blockIdx.x;
    uint32_t *row = bits + r * words;
    for (int i = lane; i < words; i += 32) row[i] = 0;
    __syncwarp();
    int64_t reached = offsets[r];
    for (int first = 0; first < shape.sets; first += 32) {
        const int set = first + lane, count = shape.many(set) * shape.n;
        const T *from = values + shape.value(r, set);
        const uint8_t *at = indices + shape.byte(r, set);
        int nonzeros = 0, all;
        for (int k = 0; k < count; ++k) nonzeros += is_nonzero(from[k]);
        T *to = kept + (reached + before_in_warp(nonzeros, &all));
        reached += all;
        unsigned mask = 0;
        for (int k = 0; k < count; ++k) {
            if (!is_nonzero(from[k])) continue;
            *to++ = from[k];
            const int bit = k * shape.width;
            const unsigned place = at[bit / 8] >> bit % 8 & ((1u << shape.width) - 1);
            mask |= 1u << (k / shape.n * shape.m + place);
        }
        if (!mask) continue;
        const int column = set * shape.each * shape.m, shift = column % 32;
        atomicOr(row + column / 32, mask << shift);
        if (shift && mask >> (32 - shift)) atomicOr(row + column / 32 + 1, mask >> (32 - shift));
    }
}

bool is_dtype(int dtype) { return dtype == SPARC3_FP32 || is_half(dtype); }

// Call body(a value of the dtype's bits, which only its type is of).
template <class Body>
int by_dtype(int dtype, const Body &body) {
    return dtype == SPARC3_FP32 ? body(uint32_t{}) : body(uint16_t{});
}
// Likewise of the column indices.
template <class Body>
int by_columns(size_t columns, const Body &body) {
    return columns > 65536 ? body(uint32_t{}) : body(uint16_t{});
}

int words_of(size_t columns) { return static_cast<int>(ceil_div(columns, 32)); }
bool takes(int dtype, size_t rows, size_t columns) { return is_dtype(dtype) && fits(rows, columns); }
bool takes(const sparc3_nm *w) {
    return w && takes(w->dtype, w->rows, w->columns) && 1 <= w->n && w->n <= w->m && w->m <= 16 &&
           w->columns % static_cast<size_t>(w->m) == 0 && (!w->rows || !w->columns || (w->values && w->indices));
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

int sparc3_cuda_bitmap_to_csr(const sparc3_bitmap *weight, void *indices, void *stream) {
    if (!weight || !takes(weight->dtype, weight->rows, weight->columns)) return SPARC3_ERROR_ARGUMENT;
    const sparc3_bitmap w = *weight;
    if (!w.rows || !w.columns || !w.count) return SPARC3_OK;
    if (!w.bits || !w.offsets || !indices || !is_aligned(w.bits, 4)) return SPARC3_ERROR_ARGUMENT;
    return by_columns(w.columns, [&](auto index) {
        using Index = decltype(index);
        return launch(to_csr_kernel<Index>, dim3(static_cast<unsigned>(w.rows)), dim3(32), 0, stream,
                      reinterpret_cast<const uint32_t *>(w.bits), w.offsets, words_of(w.columns),
                      static_cast<Index *>(indices));
    });
}

int sparc3_cuda_csr_to_bitmap(const sparc3_csr *weight, uint8_t *bits, void *stream) {
    if (!weight || !takes(weight->dtype, weight->rows, weight->columns)) return SPARC3_ERROR_ARGUMENT;
    const sparc3_csr w = *weight;
    if (!w.rows || !w.columns) return SPARC3_OK;
    if (!w.offsets || (w.count && !w.indices) || !bits || !is_aligned(bits, 4)) return SPARC3_ERROR_ARGUMENT;
    return by_columns(w.columns, [&](auto index) {
        using Index = decltype(index);
        return launch(from_csr_kernel<Index>, dim3(static_cast<unsigned>(w.rows)), dim3(32), 0, stream,
                      static_cast<const Index *>(w.indices), w.offsets, words_of(w.columns),
                      reinterpret_cast<uint32_t *>(bits));
    });
}

int sparc3_cuda_bitmap_to_nm(const sparc3_bitmap *weight, int n, int m, void *values, uint8_t *indices, uint64_t *wrong,
                             void *stream) {
    if (!weight || !wrong) return SPARC3_ERROR_ARGUMENT;
    const sparc3_bitmap w = *weight;
    const sparc3_nm out{w.dtype, n, m, w.rows, w.columns, values, indices};
    if (!takes(&out)) return SPARC3_ERROR_ARGUMENT;
    const int status = status_of(cudaMemsetAsync(wrong, 0xff, sizeof *wrong, static_cast<cudaStream_t>(stream)));
    if (status || !w.rows || !w.columns) return status;
    if (!w.bits || !w.offsets || (w.count && !w.values) || !is_aligned(w.bits, 4)) return SPARC3_ERROR_ARGUMENT;
    return by_dtype(w.dtype, [&](auto bits) {
        using T = decltype(bits);
        return launch(to_nm_kernel<T>, dim3(static_cast<unsigned>(w.rows)), dim3(32), 0, stream,
                      reinterpret_cast<const uint32_t *>(w.bits), static_cast<const T *>(w.values), w.offsets,
                      words_of(w.columns), Groups(w.columns, n, m), static_cast<T *>(values), indices,
                      reinterpret_cast<unsigned long long *>(wrong));
    });
}

int sparc3_cuda_nm_count_kept(const sparc3_nm *weight, int64_t *offsets, void *stream) {
    if (!takes(weight) || !offsets) return SPARC3_ERROR_ARGUMENT;
    const sparc3_nm w = *weight;
    if (w.rows) {
        const int kept = static_cast<int>(w.columns / w.m * w.n);
        const int status = by_dtype(w.dtype, [&](auto bits) {
            using T = decltype(bits);
            return launch(count_kernel<T>, dim3(static_cast<unsigned>(w.rows)), dim3(32), 0, stream,
                          static_cast<const T *>(w.values), kept, offsets);
        });
        if (status) return status;
    }
    return launch(scan_kernel<int64_t>, dim3(1), dim3(kScanThreads), 0, stream, offsets, w.rows);
}

int sparc3_cuda_nm_to_bitmap(const sparc3_nm *weight, const int64_t *offsets, uint8_t *bits, void *values, size_t count,
                             void *stream) {
    if (!takes(weight)) return SPARC3_ERROR_ARGUMENT;
    const sparc3_nm w = *weight;
    if (!w.rows || !w.columns) return SPARC3_OK;
    if (!offsets || !bits || (count && !values) || !is_aligned(bits, 4)) return SPARC3_ERROR_ARGUMENT;
    return by_dtype(w.dtype, [&](auto type) {
        using T = decltype(type);
        return launch(from_nm_kernel<T>, dim3(static_cast<unsigned>(w.rows)), dim3(32), 0, stream,
                      static_cast<const T *>(w.values), w.indices, offsets, words_of(w.columns),
                      Groups(w.columns, w.n, w.m), reinterpret_cast<uint32_t *>(bits), static_cast<T *>(values));
    });
}
