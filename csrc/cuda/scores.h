// Scores on a device: their keys (see sparc3.h), eight at a time, and sums over the threads of a block.
#pragma once

#include "launch.h"
#include "sparc3/sparc3_cuda.h"

namespace sparc3 {

// An attribute of the device in use; 0 where there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

using Count = unsigned long long;  // what 64-bit atomics take

// Below every key; stands for places without a score.
constexpr int32_t kNoKey = INT32_MIN;

inline bool known(int dtype) { return dtype >= SPARC3_FP32 && dtype <= SPARC3_FP16; }
inline int32_t infinity_bits(int dtype) { return dtype == SPARC3_FP16 ? 0x7c000000 : 0x7f800000; }

inline __device__ uint32_t wide(uint32_t bits) { return bits; }
inline __device__ uint32_t wide(uint16_t bits) { return (uint32_t)bits << 16; }

inline __device__ int32_t key_of(uint32_t bits) {
    const int32_t size = (int32_t)(bits & 0x7fffffff);
    return (int32_t)bits < 0 ? -size : size;
}

inline __device__ bool is_nan(uint32_t bits, int32_t infinity) { return (int32_t)(bits & 0x7fffffff) > infinity; }

// The wide bits of scores [first, first + 8), all within the tensor and aligned to 16 bytes.
inline __device__ void load8(const uint32_t *scores, uint64_t first, uint32_t bits[8]) {
    const uint4 *from = (const uint4 *)(scores + first);
    const uint4 low = from[0], high = from[1];
    const uint32_t found[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) bits[i] = found[i];
}
inline __device__ void load8(const uint16_t *scores, uint64_t first, uint32_t bits[8]) {
    const uint4 four = *(const uint4 *)(scores + first);
    const uint32_t pairs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        bits[2 * i] = pairs[i] << 16;
        bits[2 * i + 1] = pairs[i] & 0xffff0000u;
    }
}

// The keys of scores [first, first + 8) that lie in [begin, end), kNoKey for the others. `nan` is set by a NaN among
// the eight.
template <class Score>
__device__ void load_keys(const Score *scores, bool aligned, uint64_t first, uint64_t begin, uint64_t end,
                          uint64_t size, int32_t infinity, int32_t keys[8], bool &nan) {
    uint32_t bits[8];
    if (aligned && first + 8 <= size) {
        load8(scores, first, bits);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) bits[i] = first + i < size ? wide(scores[first + i]) : 0;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        nan |= is_nan(bits[i], infinity);
        keys[i] = first + i >= begin && first + i < end ? key_of(bits[i]) : kNoKey;
    }
}

// Of the bits of equal scores, the first of which has this rank (from 0), those below rank `quota`.
inline __device__ uint32_t first_bits(uint32_t equal, uint32_t rank, uint32_t quota) {
    uint32_t kept = 0;
    for (; equal && rank < quota; ++rank) {
        kept |= equal & (0u - equal);
        equal &= equal - 1;
    }
    return kept;
}

// Bring the line at this address into the L2 cache.
inline __device__ void prefetch(const void *address) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
    (void)address;
#endif
}

// Sum of `value` over the threads before this one, and over all of them. Every thread of the block must call it, and
// `sums` may be used again after the next barrier.
template <class T, int kThreads>
__device__ T scan_block(T value, T *sums, T *total) {
    constexpr int kWarps = kThreads / 32;
    const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    T sum = value;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const T before = __shfl_up_sync(kAllLanes, sum, by);
        if (lane >= by) sum += before;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    T before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) before = all;
        all += sums[w];
    }
    *total = all;
    return before + sum - value;
}

}  // namespace sparc3
