// What the selection entry points share: scores of a dtype, and how many threads they are worth.
#pragma once

#include "sparc3/sparc3.h"
#include "threads.h"

namespace sparc3 {

// Below this many scores one thread is faster than starting a second.
constexpr size_t kParallelScores = size_t{1} << 17;

inline bool known(int dtype) { return dtype >= SPARC3_FP32 && dtype <= SPARC3_FP16; }

inline const char *at(int dtype, const void *scores, size_t i) {
    return static_cast<const char *>(scores) + i * (dtype == SPARC3_FP32 ? 4 : 2);
}

inline int threads_for(size_t scores, int threads) { return scores < kParallelScores ? 1 : available_threads(threads); }

}  // namespace sparc3
