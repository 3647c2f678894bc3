/* CUDA kernels on the CPU, so that their arithmetic, barriers and warp operations are tested where there is no GPU.
 *
 * Compile a .cu file as C++ with -DSPARC3_CUDA_EMULATION; it includes cuda/launch.h, which includes this in place of
 * the CUDA runtime. Device pointers are then host pointers, and `launch` runs the kernel before it returns.
 *
 * Modelled: grids and blocks of any shape; static shared memory, dynamic shared memory under the one name
 * `extern __shared__ uint4 dynamic_shared[]` (filled with garbage before each block, refused above the chip's
 * limit); __syncthreads, __syncthreads_or and _count, also where threads have returned; shuffles, votes, match and
 * reductions of a warp under any mask, diverged lanes with masks of their own included; atomics; asynchronous copies,
 * which arrive no sooner than they are waited for. Each CUDA thread is a fibre that runs until it has to wait; blocks,
 * warps and lanes take turns in ascending or (emulation::backwards) descending order. A barrier or warp operation that
 * some thread never reaches, or whose mask contradicts itself, throws std::runtime_error from `launch`.
 *
 * Not modelled: blocks that wait for each other (they run one after another), races that neither of the two orders
 * shows, memory visibility without __syncwarp or fences, alignment, bounds, registers, time, streams (everything is
 * in order), tensor cores, 16-bit float types. Run every test in both orders and under -fsanitize=undefined; the
 * compile gate covers registers and shared memory.
 */
#ifndef SPARC3_CUDA_EMULATION_H
#define SPARC3_CUDA_EMULATION_H

#include "cuda_fibres.h"

// ---- barriers

inline void __syncthreads() { emulation::barrier(0); }
inline int __syncthreads_or(int value) { return emulation::barrier(value != 0) != 0; }
inline int __syncthreads_count(int value) { return (int)emulation::barrier(value != 0); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::exchange(mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- warps

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    const int group = emulation::block.current->lane / width * width;
    return emulation::shuffle(mask, value, group + source % width, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    return emulation::shuffle(mask, value, emulation::block.current->lane - (int)by, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    return emulation::shuffle(mask, value, emulation::block.current->lane + (int)by, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = warpSize) {
    return emulation::shuffle(mask, value, emulation::block.current->lane ^ by, width);
}

// The lanes of the mask whose value fulfils `wanted`.
template <class T, class Wanted>
unsigned emulated_vote(unsigned mask, T value, const Wanted &wanted) {
    const uint64_t *values = emulation::exchange(mask, emulation::bits_of(value));
    unsigned found = 0;
    for (int lane = 0; lane < warpSize; ++lane)
        if (mask >> lane & 1 && wanted(emulation::value_of<T>(values[lane]))) found |= 1u << lane;
    return found;
}
inline unsigned __ballot_sync(unsigned mask, int value) {
    return emulated_vote(mask, value, [](int v) { return v != 0; });
}
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, value) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    return emulated_vote(mask, value, [&](T v) { return v == value; });
}

template <class T, class Join>
T emulated_reduction(unsigned mask, T value, const Join &join) {
    const uint64_t *values = emulation::exchange(mask, emulation::bits_of(value));
    T found = value;
    for (int lane = 0; lane < warpSize; ++lane)
        if (mask >> lane & 1 && lane != emulation::block.current->lane)
            found = join(found, emulation::value_of<T>(values[lane]));
    return found;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
    return emulated_reduction(mask, value, [](T a, T b) { return (T)(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
    return emulated_reduction(mask, value, [](T a, T b) { return max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
    return emulated_reduction(mask, value, [](T a, T b) { return min(a, b); });
}

// ---- atomics: no other fibre runs in between

template <class T, class V>
T emulated_atomic(T *at, V value) {
    const T before = *at;
    *at = (T)value;
    return before;
}
template <class T, class V>
T atomicAdd(T *at, V value) {
    return emulated_atomic(at, *at + value);
}
template <class T, class V>
T atomicSub(T *at, V value) {
    return emulated_atomic(at, *at - value);
}
template <class T, class V>
T atomicOr(T *at, V value) {
    return emulated_atomic(at, *at | value);
}
template <class T, class V>
T atomicMax(T *at, V value) {
    return emulated_atomic(at, max(*at, (T)value));
}
template <class T, class V>
T atomicMin(T *at, V value) {
    return emulated_atomic(at, min(*at, (T)value));
}

// ---- arithmetic

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (by & 31));
}
// Clamped at 32, where __funnelshift_r wraps.
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((uint64_t)high << 32 | low) >> std::min(by, 32u));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    unsigned found = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> 4 * i & 0xf, byte = (unsigned)(bytes >> 8 * (pick & 7)) & 0xff;
        found |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
    }
    return found;
}
inline float __uint_as_float(unsigned x) { return emulation::value_of<float>(x); }
inline unsigned __float_as_uint(float x) { return (unsigned)emulation::bits_of(x); }
template <class T>
T __ldg(const T *at) {
    return *at;
}
template <class T>
T __ldcs(const T *at) {
    return *at;
}

// ---- asynchronous copies (cuda_pipeline.h)

inline void __pipeline_memcpy_async(void *to, const void *from, size_t size) {
    emulation::block.current->copies.back().push_back({to, from, size});
}
inline void __pipeline_commit() { emulation::block.current->copies.emplace_back(); }
// Wait for all batches of the calling thread but the `prior` last ones.
inline void __pipeline_wait_prior(size_t prior) {
    auto &copies = emulation::block.current->copies;
    while (copies.size() > prior + 1) {
        for (const emulation::Copy &copy : copies.front()) memcpy(copy.to, copy.from, copy.size);
        copies.erase(copies.begin());
    }
}

// ---- runtime

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::processors : (int)emulation::shared_limit;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int bytes) {
    return (size_t)bytes <= emulation::shared_limit ? cudaSuccess : cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Kernel *, int, size_t) {
    return *blocks = 2, cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t) {
    return memcpy(to, from, size), cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t) {
    return memset(at, value, size), cudaSuccess;
}

namespace emulation {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, Arguments... arguments) {
    const unsigned size = threads.x * threads.y * threads.z;
    if (shared > shared_limit || !size || size > 1024 || !grid.x || !grid.y || !grid.z) return cudaErrorInvalidValue;
    blockDim = threads;
    gridDim = grid;
    block.body = [=] { kernel(arguments...); };
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t b = backwards ? blocks - 1 - i : i;
        blockIdx = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
        run_block((int)size, shared);
    }
    return cudaSuccess;
}

}  // namespace emulation

#endif
