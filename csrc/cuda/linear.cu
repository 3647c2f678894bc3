#include "linear.h"

namespace sparc3 {
namespace {

constexpr int kThreads = 256;

template <int dtype>
__global__ void add_parts_kernel(const float *sums, int parts, size_t rows, size_t size, const uint16_t *bias,
                                 uint16_t *y) {
    const size_t i = blockIdx.x * static_cast<size_t>(kThreads) + threadIdx.x;
    if (i >= size) return;
    float sum = 0;
    for (int part = 0; part < parts; ++part) sum += sums[part * size + i];
    y[i] = narrow<dtype>(bias ? sum + widen<dtype>(bias[i % rows]) : sum);
}

}  // namespace

int add_parts(int dtype, const float *sums, int parts, size_t rows, size_t batch, const void *bias, void *y,
              void *stream) {
    const size_t size = rows * batch;
    const auto kernel = dtype == SPARC3_BF16 ? add_parts_kernel<SPARC3_BF16> : add_parts_kernel<SPARC3_FP16>;
    return launch(kernel, dim3(static_cast<unsigned>(ceil_div(size, kThreads))), dim3(kThreads), 0, stream, sums, parts,
                  rows, size, static_cast<const uint16_t *>(bias), static_cast<uint16_t *>(y));
}

}  // namespace sparc3
