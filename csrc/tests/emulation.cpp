// The emulation of CUDA by itself: what it models, in both orders, and the mistakes that it must notice.
#include "cuda_emulation.h"

#include <stdio.h>

#define CHECK(condition)                                                    \
    do {                                                                    \
        if (!(condition)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            return 1;                                                       \
        }                                                                   \
    } while (0)

constexpr unsigned kAll = ~0u;

// Sums of blockDim.x values a block: shared memory, barriers, shuffles.
__global__ void block_sums(const int *values, int *sums) {
    __shared__ int of_warp[32];
    int sum = values[blockIdx.x * blockDim.x + threadIdx.x];
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(kAll, sum, by);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += of_warp[w];
    sums[blockIdx.x] = sum;
}

// Each value times two, from the mirrored place, through dynamic shared memory and an asynchronous copy.
__global__ void mirrored(const int *values, int *out) {
    extern __shared__ uint4 dynamic_shared[];
    int *held = (int *)dynamic_shared;
    const unsigned t = threadIdx.x, n = blockDim.x;
    __pipeline_memcpy_async(held + t, values + t, sizeof(int));
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    out[t] = 2 * held[n - 1 - t];
}

// Diverged halves with masks of their own; the third of three kinds of lanes leaves before the barrier.
__global__ void divergence(unsigned *out) {
    const unsigned lane = threadIdx.x % 32;
    unsigned found = 0;
    if (lane < 16)
        found = __ballot_sync(0xffffu, lane % 2);
    else
        found = __reduce_add_sync(0xffff0000u, lane);
    if (lane % 3 == 2) return;
    const unsigned present = (unsigned)__syncthreads_count(lane % 3 == 1);
    out[2 * threadIdx.x] = found;
    out[2 * threadIdx.x + 1] = present;
}

__global__ void matches(unsigned *out, unsigned *counts) {
    out[threadIdx.x] = __match_any_sync(kAll, threadIdx.x / 5);
    atomicAdd(&counts[threadIdx.x / 5], 1u);
}

__global__ void shifted(int *up, int *down, int *first) {
    const int lane = (int)threadIdx.x;
    up[lane] = __shfl_up_sync(kAll, lane, 3);
    down[lane] = __shfl_down_sync(kAll, lane, 1, 8);
    first[lane] = __shfl_sync(kAll, lane, 0, 16);
}

__global__ void missing_barrier() {
    if (threadIdx.x < 32) __syncthreads();
    __ballot_sync(kAll, 1);
    if (threadIdx.x >= 32) __syncthreads();
    if (threadIdx.x == 0) __syncwarp();
}

__global__ void wrong_mask() { __ballot_sync(0x1u << ((threadIdx.x + 1) % 32), 1); }

template <class... Arguments>
bool refused(Arguments... arguments) {
    try {
        emulation::launch(arguments...);
    } catch (const std::runtime_error &) {
        return true;
    }
    return false;
}

int main() {
    for (bool order : {false, true}) {
        emulation::backwards = order;
        int values[768], sums[3], twice[256];
        for (int i = 0; i < 768; ++i) values[i] = i * i % 101;
        CHECK(emulation::launch(block_sums, 3, 256, 0, values, sums) == cudaSuccess);
        for (int b = 0; b < 3; ++b) {
            int expected = 0;
            for (int i = 0; i < 256; ++i) expected += values[256 * b + i];
            CHECK(sums[b] == expected);
        }
        CHECK(emulation::launch(mirrored, 1, 256, sizeof twice, values, twice) == cudaSuccess);
        for (int i = 0; i < 256; ++i) CHECK(twice[i] == 2 * values[255 - i]);

        unsigned found[128];
        CHECK(emulation::launch(divergence, 1, 64, 0, found) == cudaSuccess);
        for (unsigned t = 0; t < 64; ++t) {
            if (t % 32 % 3 == 2) continue;
            CHECK(found[2 * t] == (t % 32 < 16 ? 0xaaaau : 376u));  // 16 + ... + 31
            CHECK(found[2 * t + 1] == 22);                          // lanes 1, 4, ... 31 of two warps
        }

        unsigned same[32], counts[7] = {};
        CHECK(emulation::launch(matches, 1, 32, 0, same, counts) == cudaSuccess);
        for (unsigned t = 0; t < 32; ++t) CHECK(same[t] == (t < 30 ? 0x1fu << t / 5 * 5 : 0xc0000000u));
        CHECK(counts[0] == 5 && counts[6] == 2);

        int up[32], down[32], first[32];
        CHECK(emulation::launch(shifted, 1, 32, 0, up, down, first) == cudaSuccess);
        for (int t = 0; t < 32; ++t) {
            CHECK(up[t] == (t < 3 ? t : t - 3));
            CHECK(down[t] == (t % 8 == 7 ? t : t + 1));
            CHECK(first[t] == t / 16 * 16);
        }

        CHECK(refused(missing_barrier, 1, 64, 0));
        CHECK(refused(wrong_mask, 1, 32, 0));
        CHECK(emulation::launch(block_sums, 1, 32, 0, values, sums) == cudaSuccess);  // goes on after that
    }
    emulation::shared_limit = 99 << 10;
    CHECK(emulation::launch(mirrored, 1, 1, 100 << 10, nullptr, nullptr) == cudaErrorInvalidValue);
    CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7530) == 0x77553300u);
    CHECK(__funnelshift_r(0x89abcdefu, 0x01234567u, 8) == 0x6789abcdu);
    CHECK(__funnelshift_r(0x89abcdefu, 0x01234567u, 32) == 0x89abcdefu);
    CHECK(__funnelshift_rc(0x89abcdefu, 0x01234567u, 32) == 0x01234567u);
    printf("passed\n");
    return 0;
}
