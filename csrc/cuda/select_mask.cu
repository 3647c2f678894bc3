// The packed mask of a chunk, given the threshold in the state.
//
// A thread makes one byte from eight scores. Which of the equal scores are kept depends on those before them, so all
// are kept at first and counted by tiles; the tiles in which the budget runs out, or after that, are written again.
#include "../select_state.h"
#include "scores.h"

namespace sparc3 {
namespace {

constexpr int kThreads = 256, kScanThreads = 1024, kSteps = 16;
constexpr size_t kTile = kThreads * kSteps * 8;
constexpr uint32_t kDone32 = ~0u;  // a tile that keeps all of its equal scores

struct Byte {
    uint32_t above, equal;
};

template <class Score>
__device__ Byte compare8(const Score *scores, bool aligned, size_t first, size_t n, int32_t threshold) {
    int32_t keys[8];
    bool nan = false;
    load_keys(scores, aligned, first, 0, n, n, INT32_MAX, keys, nan);
    Byte byte{0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        byte.above |= (keys[i] > threshold ? 1u : 0u) << i;
        byte.equal |= (keys[i] == threshold && keys[i] != kNoKey ? 1u : 0u) << i;
    }
    return byte;
}

template <class Score>
__global__ void __launch_bounds__(kThreads) mask_kernel(const State *state, const Score *scores, bool aligned, size_t n,
                                                        uint8_t *bits, uint32_t *equal) {
    __shared__ uint32_t sums[kThreads / 32];
    const int32_t threshold = state->threshold.key;
    const bool budget = state->threshold.keep_equal != 0;
    uint32_t mine = 0, total;
#pragma unroll 4
    for (int step = 0; step < kSteps; ++step) {
        const size_t first = blockIdx.x * kTile + ((size_t)step * kThreads + threadIdx.x) * 8;
        if (first >= n) break;
        const Byte byte = compare8(scores, aligned, first, n, threshold);
        bits[first / 8] = (uint8_t)(budget ? byte.above | byte.equal : byte.above);
        if (budget) mine += (uint32_t)__popc(byte.equal);
    }
    scan_block<uint32_t, kThreads>(mine, sums, &total);
    if (threadIdx.x == 0) equal[blockIdx.x] = total;
}

// From how many equal scores each tile has to how many it keeps. One block.
__global__ void __launch_bounds__(kScanThreads) share_kernel(State *state, uint32_t *equal, size_t tiles) {
    __shared__ Count sums[2][kScanThreads / 32];
    const Count budget = state->threshold.keep_equal;
    Count before = 0;
    int turn = 0;
    for (size_t begin = 0; begin < tiles; begin += kScanThreads, turn ^= 1) {
        const size_t tile = begin + threadIdx.x;
        const Count here = tile < tiles ? equal[tile] : 0;
        Count total;
        const Count start = before + scan_block<Count, kScanThreads>(here, sums[turn], &total);
        if (tile < tiles) equal[tile] = start + here <= budget ? kDone32 : start < budget ? (uint32_t)(budget - start) : 0;
        before += total;
    }
    __syncthreads();  // every thread has read the budget
    if (threadIdx.x == 0) state->threshold.keep_equal = budget - min(budget, before);
}

template <class Score>
__global__ void __launch_bounds__(kThreads) trim_kernel(const State *state, const Score *scores, bool aligned, size_t n,
                                                        uint8_t *bits, const uint32_t *kept) {
    __shared__ uint32_t sums[2][kThreads / 32];
    const uint32_t quota = kept[blockIdx.x];
    if (quota == kDone32) return;
    const int32_t threshold = state->threshold.key;
    uint32_t before = 0;
    for (int step = 0; step < kSteps; ++step) {
        const size_t first = blockIdx.x * kTile + ((size_t)step * kThreads + threadIdx.x) * 8;
        Byte byte{0, 0};
        if (first < n) byte = compare8(scores, aligned, first, n, threshold);
        uint32_t total;
        uint32_t rank = before + scan_block<uint32_t, kThreads>((uint32_t)__popc(byte.equal), sums[step % 2], &total);
        before += total;
        if (first < n) bits[first / 8] = (uint8_t)(byte.above | first_bits(byte.equal, rank, quota));
    }
}

template <class Score>
int mask(State *state, const void *scores, size_t n, uint8_t *bits, uint32_t *equal, void *stream) {
    const Score *from = (const Score *)scores;
    const bool aligned = (uintptr_t)scores % 16 == 0;
    const size_t tiles = (n + kTile - 1) / kTile;
    int status = launch(mask_kernel<Score>, (unsigned)tiles, kThreads, 0, stream, (const State *)state, from, aligned,
                        n, bits, equal);
    if (status == SPARC3_OK) status = launch(share_kernel, 1, kScanThreads, 0, stream, state, equal, tiles);
    if (status == SPARC3_OK)
        status = launch(trim_kernel<Score>, (unsigned)tiles, kThreads, 0, stream, (const State *)state, from, aligned,
                        n, bits, (const uint32_t *)equal);
    return status;
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_cuda_select_mask_workspace_size(size_t n) { return (n + kTile - 1) / kTile * sizeof(uint32_t); }

int sparc3_cuda_select_mask(void *state, int dtype, const void *scores, size_t n, uint8_t *bits, void *workspace,
                            size_t workspace_size, void *stream) {
    if (!state || !known(dtype) || (n && (!scores || !bits)) || n / kTile > INT32_MAX) return SPARC3_ERROR_ARGUMENT;
    if (!n) return SPARC3_OK;
    if (!workspace || workspace_size < sparc3_cuda_select_mask_workspace_size(n)) return SPARC3_ERROR_WORKSPACE;
    State *s = (State *)state;
    uint32_t *equal = (uint32_t *)workspace;
    return dtype == SPARC3_FP32 ? mask<uint32_t>(s, scores, n, bits, equal, stream)
                                : mask<uint16_t>(s, scores, n, bits, equal, stream);
}
