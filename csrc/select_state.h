// A streaming selection between two calls: the same bytes on the CPU and on a device.
#pragma once

#include <stdint.h>

#include "sparc3/sparc3.h"

#ifdef __CUDACC__
#define SPARC3_DEVICE __host__ __device__
#else
#define SPARC3_DEVICE
#endif

namespace sparc3 {

constexpr unsigned kStateBins = 65536;

enum Stage : uint32_t { kUpper, kLower, kDone };

struct State {
    char magic[8];
    uint32_t dtype;
    uint32_t stage;
    int32_t upper;      // key >> 16 of the boundary bin, once known
    uint32_t error;     // the first status that a device met, as its functions cannot return it
    uint64_t prune;     // of the whole selection
    uint64_t expected;  // scores in the boundary bin
    uint64_t rank;      // of the threshold within the boundary bin, from 1
    sparc3_threshold threshold;
    uint64_t bins[kStateBins];
};

constexpr char kMagic[8] = {'s', 'p', '3', 's', 'e', 'l', '0', '1'};

struct Boundary {
    unsigned bin;
    uint64_t rank, count;  // how many of the bin's `count` scores are pruned
};

SPARC3_DEVICE inline void finish(State &state, int32_t key, uint64_t keep_equal) {
    state.threshold = {key, 0, keep_equal};
    state.stage = kDone;
}

// Close a pass whose threshold lies in this bin; whether all scores must be counted once more, into cleared bins.
SPARC3_DEVICE inline bool settle(State &state, uint64_t prune, Boundary found) {
    if (state.stage == kLower) {
        finish(state, (int32_t)((uint32_t)state.upper << 16 | found.bin), found.count - found.rank);
        return false;
    }
    state.upper = (int32_t)found.bin - 32768;
    if (state.dtype != SPARC3_FP32) {  // the lower half of every key is zero
        finish(state, (int32_t)((uint32_t)state.upper << 16), found.count - found.rank);
        return false;
    }
    state.prune = prune;
    state.rank = found.rank;
    state.expected = found.count;
    state.stage = kLower;
    return true;
}

}  // namespace sparc3
