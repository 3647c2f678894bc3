// CUDA's runtime, or its emulation on the CPU (tests/cuda_emulation.h), and how a kernel is started on either.
#pragma once

#include "sparc3/sparc3.h"

#ifdef SPARC3_CUDA_EMULATION
#include "../tests/cuda_emulation.h"
#else
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

extern __shared__ uint4 dynamic_shared[];
#endif

namespace sparc3 {

constexpr unsigned kAllLanes = ~0u;

inline int status_of(cudaError_t error) { return error == cudaSuccess ? SPARC3_OK : SPARC3_ERROR_CUDA; }

// Start `kernel` with `shared` bytes of dynamic shared memory on `stream`.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, void *stream,
           Arguments... arguments) {
    // More than 48 KB must be asked for.
    if (shared > 48 << 10) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) return SPARC3_ERROR_CUDA;
    }
#ifdef SPARC3_CUDA_EMULATION
    (void)stream;
    return status_of(emulation::launch(kernel, grid, threads, shared, arguments...));
#else
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return status_of(cudaGetLastError());
#endif
}

}  // namespace sparc3
