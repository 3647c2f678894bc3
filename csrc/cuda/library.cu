#include <cuda_runtime_api.h>

#include "sparc3/sparc3_cuda.h"

const char *sparc3_cuda_version(void) { return SPARC3_VERSION; }

int sparc3_cuda_device_count(int *count, const char **reason) {
    if (!count) return SPARC3_ERROR_ARGUMENT;
    const cudaError_t error = cudaGetDeviceCount(count);
    if (reason) *reason = error == cudaSuccess ? "" : cudaGetErrorString(error);
    if (error == cudaSuccess) return SPARC3_OK;
    *count = 0;
    return SPARC3_ERROR_CUDA;
}
