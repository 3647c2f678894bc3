/* libsparc3_cuda: the CUDA part of SparC3 behind a C ABI; loads without a GPU or driver. Status codes: sparc3.h. */
#ifndef SPARC3_CUDA_H
#define SPARC3_CUDA_H

#include "sparc3/sparc3.h"

#ifdef __cplusplus
extern "C" {
#endif

SPARC3_API const char *sparc3_cuda_version(void);
/* Number of devices. On SPARC3_ERROR_CUDA `*count` is 0 and `*reason` a static string, e.g. that there is no driver.
 * `reason` may be NULL. */
SPARC3_API int sparc3_cuda_device_count(int *count, const char **reason);

#ifdef __cplusplus
}
#endif

#endif
