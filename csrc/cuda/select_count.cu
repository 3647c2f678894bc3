// Counting passes of a streaming selection on a device, and their closing.
//
// A block counts into 16-bit counters in shared memory, two in a word: all 65,536 bins where a block may have 128 KB,
// else a half of them each for two blocks that read the same scores. A counter that reaches 0x8000 is emptied into the
// 64-bit bin of the state by the thread that filled it; a barrier every 16,384 scores lets none run beyond 16 bits.
// The two digits that a sample shows most often (zeros; scores with few values) are counted in registers, as atomics of
// a warp on one address take their turns.
#include <stddef.h>
#include <string.h>

#include "../select_state.h"
#include "scores.h"

namespace sparc3 {
namespace {

constexpr int kThreads = 1024;
constexpr unsigned kRound = 16384;  // scores of a block between two barriers
constexpr unsigned kNone = ~0u;     // no digit: outside of the boundary bin
constexpr unsigned kFull = 0x8000;

static_assert(kFull - 1 + kRound < 65536, "a counter may pass 16 bits before the barrier");

// The upper digit of a score and the state's bin for it. Digits are the bits of the upper half, which is the whole of
// a 16-bit score; halves of negative fp32 scores are rounded away from zero, as their keys are rounded down.
struct Upper {
    __device__ unsigned operator()(uint32_t bits, uint16_t) const { return bits >> 16; }
    __device__ unsigned operator()(uint32_t bits, uint32_t) const {
        return (int32_t)bits < 0 ? 0x8000 + (((bits & 0x7fffffff) + 0xffff) >> 16) : bits >> 16;
    }
    __device__ unsigned bin(unsigned digit) const {
        return digit < 0x8000 ? 0x8000 + digit : 0x8000 - (digit & 0x7fff);
    }
};

// The lower digit of the keys in the boundary bin, which is the bin too.
struct Lower {
    int32_t floor;  // the lowest key
    __device__ unsigned operator()(uint32_t bits, uint32_t) const {
        const uint32_t above = (uint32_t)key_of(bits) - (uint32_t)floor;
        return above < kStateBins ? above : kNone;
    }
    __device__ unsigned bin(unsigned digit) const { return digit; }
};

__device__ void add(State *state, unsigned bin, uint64_t count) {
    atomicAdd((Count *)&state->bins[bin], (Count)count);
}

// The two most frequent digits of 32 scores, by the first warp.
template <class Score, class Digit>
__device__ uint2 frequent(const Score *scores, size_t n, const Digit &digit_of) {
    const unsigned lane = threadIdx.x;
    const unsigned digit = digit_of(wide(scores[n / 32 * lane]), Score{});
    const unsigned others = __match_any_sync(kAllLanes, digit);
    const unsigned votes = digit == kNone ? 0 : (unsigned)__popc(others) << 5 | lane;
    const unsigned best = __reduce_max_sync(kAllLanes, votes);
    const unsigned first = __shfl_sync(kAllLanes, digit, (int)(best % 32));
    const unsigned next = __reduce_max_sync(kAllLanes, digit == first ? 0 : votes);
    return {best ? first : kNone, next ? __shfl_sync(kAllLanes, digit, (int)(next % 32)) : kNone};
}

template <unsigned kBins>
struct Counter {
    State *state;
    unsigned *words;
    unsigned begin;    // the first of this block's digits
    uint2 hot;         // digits that are counted in registers
    uint2 found{0, 0};

    template <class Digit>
    __device__ void count(unsigned digit, const Digit &digit_of) {
        if (digit == hot.x) {
            ++found.x;
        } else if (digit == hot.y) {
            ++found.y;
        } else if (digit - begin < kBins) {
            const unsigned one = 1u << (digit & 1) * 16;
            unsigned *word = &words[(digit - begin) / 2];
            const unsigned before = atomicAdd(word, one);
            if ((before ^ (before + one)) & one * kFull) {
                atomicAdd(word, 0u - one * kFull);
                add(state, digit_of.bin(digit), kFull);
            }
        }
    }
};

// One pass over n scores. Blocks `halves` apart read the same ones.
template <unsigned kBins, class Score, class Digit>
__device__ void count_scores(State *state, const Score *scores, size_t n, int32_t infinity, const Digit &digit_of) {
    constexpr unsigned kHalves = kStateBins / kBins, kVector = 16 / sizeof(Score);
    constexpr unsigned kVectors = kRound / kVector / kThreads;  // of a thread between two barriers
    __shared__ uint2 sampled;
    unsigned *words = (unsigned *)dynamic_shared;
    const unsigned half = blockIdx.x % kHalves, t = threadIdx.x;
    const size_t unit = blockIdx.x / kHalves, units = gridDim.x / kHalves;

    for (unsigned i = t; i < kBins / 8; i += kThreads) dynamic_shared[i] = uint4{0, 0, 0, 0};
    if (t < 32) {
        const uint2 most = frequent(scores, n, digit_of);
        if (t == 0) sampled = most;
    }
    __syncthreads();
    Counter<kBins> counter{state, words, half * kBins, sampled};
    bool nan = false;
    const auto one = [&](uint32_t bits) {
        nan |= is_nan(bits, infinity);
        counter.count(digit_of(bits, Score{}), digit_of);
    };

    // Up to `kVector - 1` scores lie before the first vector and as many after the last.
    const size_t skew = (0 - (size_t)scores / sizeof(Score)) % kVector, head = skew < n ? skew : n;
    const size_t vectors = (n - head) / kVector, tail = n - head - vectors * kVector;
    if (unit == 0) {
        if (t < head) one(wide(scores[t]));
        if (t < tail) one(wide(scores[n - tail + t]));
    }
    __syncthreads();
    const uint4 *body = (const uint4 *)(scores + head);
    const size_t step = units * kVectors * kThreads;
    uint4 next[kVectors];
    const auto fetch = [&](size_t begin) {
#pragma unroll
        for (unsigned v = 0; v < kVectors; ++v)
            if (begin + v * kThreads + t < vectors) next[v] = body[begin + v * kThreads + t];
    };
    const auto take = [&](uint4 vector) {
        const uint32_t four[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (sizeof(Score) == 2) one(four[i] << 16);
            one(sizeof(Score) == 2 ? four[i] & 0xffff0000u : four[i]);
        }
    };
    fetch(unit * kVectors * kThreads);
    for (size_t begin = unit * kVectors * kThreads; begin < vectors; begin += step) {
        uint4 now[kVectors];
#pragma unroll
        for (unsigned v = 0; v < kVectors; ++v) now[v] = next[v];
        fetch(begin + step);  // under way while these are counted
#pragma unroll
        for (unsigned v = 0; v < kVectors; ++v)
            if (begin + v * kThreads + t < vectors) take(now[v]);
        __syncthreads();
    }

    if (half == 0) {  // both halves saw the frequent digits
        const unsigned x = __reduce_add_sync(kAllLanes, counter.found.x);
        const unsigned y = __reduce_add_sync(kAllLanes, counter.found.y);
        if (t % 32 == 0 && x && counter.hot.x != kNone) add(state, digit_of.bin(counter.hot.x), x);
        if (t % 32 == 0 && y && counter.hot.y != kNone) add(state, digit_of.bin(counter.hot.y), y);
    }
    for (unsigned i = t; i < kBins / 2; i += kThreads) {
        const unsigned word = words[i], digit = half * kBins + 2 * i;
        if (word & 0xffff) add(state, digit_of.bin(digit), word & 0xffff);
        if (word >> 16) add(state, digit_of.bin(digit + 1), word >> 16);
    }
    if (nan) atomicMax(&state->error, (unsigned)SPARC3_ERROR_NAN);
}

template <unsigned kBins, class Score>
__global__ void __launch_bounds__(kThreads) count_kernel(State *state, const Score *scores, size_t n,
                                                         int32_t infinity) {
    const uint32_t stage = state->stage;  // no block changes it
    if (stage == kUpper) count_scores<kBins>(state, scores, n, infinity, Upper{});
    if constexpr (sizeof(Score) == 4)
        if (stage == kLower)
            count_scores<kBins>(state, scores, n, infinity, Lower{(int32_t)((uint32_t)state->upper << 16)});
}

__global__ void __launch_bounds__(kThreads) init_kernel(State *state, uint64_t magic, uint32_t dtype) {
    uint64_t *words = (uint64_t *)state;
    for (unsigned i = threadIdx.x; i < sizeof(State) / 8; i += kThreads) words[i] = 0;
    __syncthreads();
    if (threadIdx.x) return;
    words[0] = magic;
    state->dtype = dtype;
}

// As sparc3_select_refine, by one block.
__global__ void __launch_bounds__(kThreads) refine_kernel(State *state, uint64_t prune) {
    constexpr unsigned kEach = kStateBins / kThreads;
    __shared__ Count sums[kThreads / 32];
    __shared__ bool again;
    if (state->error || state->stage == kDone) return;
    uint64_t *mine = state->bins + threadIdx.x * kEach;
    Count sum = 0, total;
    for (unsigned i = 0; i < kEach; ++i) sum += mine[i];
    const Count before = scan_block<Count, kThreads>(sum, sums, &total);
    const bool lower = state->stage == kLower;
    const uint64_t rank = lower ? state->rank : prune;
    if (threadIdx.x == 0) again = false;
    __syncthreads();  // every thread has read the state
    if (lower ? total != state->expected : prune > total) {
        if (threadIdx.x == 0) state->error = lower ? SPARC3_ERROR_CHANGED : SPARC3_ERROR_ARGUMENT;
        return;
    }
    if (!lower && (prune == 0 || prune == total)) {
        if (threadIdx.x == 0) finish(*state, prune ? INT32_MAX : INT32_MIN, 0);
        return;
    }
    if (before < rank && rank <= before + sum) {
        uint64_t left = rank - before;
        unsigned i = 0;
        for (; mine[i] < left; ++i) left -= mine[i];
        again = settle(*state, prune, Boundary{threadIdx.x * kEach + i, left, mine[i]});
    }
    __syncthreads();
    if (again)
        for (unsigned i = 0; i < kEach; ++i) mine[i] = 0;
}

template <unsigned kBins, class Score>
int count(State *state, int dtype, const void *scores, size_t n, void *stream) {
    constexpr unsigned kHalves = kStateBins / kBins;
    const size_t most = (size_t)max(1, device_attribute(cudaDevAttrMultiProcessorCount) / (int)kHalves);
    const size_t units = min(most, (n + kRound - 1) / kRound);
    return launch(count_kernel<kBins, Score>, (unsigned)(units * kHalves), kThreads, kBins * 2, stream, state,
                  (const Score *)scores, n, infinity_bits(dtype));
}

}  // namespace
}  // namespace sparc3

using namespace sparc3;

size_t sparc3_cuda_select_state_size(void) { return sizeof(State); }

int sparc3_cuda_select_init(void *state, int dtype, void *stream) {
    if (!state || !known(dtype)) return SPARC3_ERROR_ARGUMENT;
    uint64_t magic;
    memcpy(&magic, kMagic, sizeof magic);
    return launch(init_kernel, 1, kThreads, 0, stream, (State *)state, magic, (uint32_t)dtype);
}

int sparc3_cuda_select_count(void *state, int dtype, const void *scores, size_t n, void *stream) {
    if (!state || !known(dtype) || (n && !scores)) return SPARC3_ERROR_ARGUMENT;
    if (!n) return SPARC3_OK;
    State *s = (State *)state;
    const bool whole = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= (132 << 10);
    if (dtype == SPARC3_FP32)
        return whole ? count<kStateBins, uint32_t>(s, dtype, scores, n, stream)
                     : count<kStateBins / 2, uint32_t>(s, dtype, scores, n, stream);
    return whole ? count<kStateBins, uint16_t>(s, dtype, scores, n, stream)
                 : count<kStateBins / 2, uint16_t>(s, dtype, scores, n, stream);
}

int sparc3_cuda_select_refine(void *state, uint64_t prune, void *stream) {
    if (!state) return SPARC3_ERROR_ARGUMENT;
    return launch(refine_kernel, 1, kThreads, 0, stream, (State *)state, prune);
}

int sparc3_cuda_select_threshold(const void *state, sparc3_threshold *out, void *stream) {
    if (!state || !out) return SPARC3_ERROR_ARGUMENT;
    alignas(State) char bytes[offsetof(State, bins)];
    const cudaStream_t on = (cudaStream_t)stream;
    if (cudaMemcpyAsync(bytes, state, sizeof bytes, cudaMemcpyDeviceToHost, on) != cudaSuccess ||
        cudaStreamSynchronize(on) != cudaSuccess)
        return SPARC3_ERROR_CUDA;
    const State &found = *(const State *)bytes;
    if (memcmp(found.magic, kMagic, sizeof kMagic)) return SPARC3_ERROR_STATE;
    if (found.error) return (int)found.error;
    if (found.stage != kDone) return SPARC3_ERROR_STATE;
    *out = found.threshold;
    return SPARC3_OK;
}
