// Running sums: from sizes to where things end.
#pragma once

#include "launch.h"

namespace sparc3 {

constexpr int kScanThreads = 256;

// Sizes at ends[1] to ends[n] become ends, ends[0] = 0. One block, each thread a range.
template <class T>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(T *ends, size_t n) {
    __shared__ T sums[kScanThreads];
    const size_t each = (n + kScanThreads - 1) / kScanThreads;
    const size_t begin = min(n, threadIdx.x * each), end = min(n, begin + each);
    T sum = 0;
    for (size_t i = begin; i < end; ++i) sum += ends[i + 1];
    sums[threadIdx.x] = sum;
    __syncthreads();
    T before = 0;
    for (unsigned i = 0; i < threadIdx.x; ++i) before += sums[i];
    for (size_t i = begin; i < end; ++i) ends[i + 1] = before += ends[i + 1];
    if (threadIdx.x == 0) ends[0] = 0;
}

}  // namespace sparc3
