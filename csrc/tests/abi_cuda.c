/* libsparc3_cuda loads and answers with and without a GPU. */
#include <stdio.h>
#include <string.h>

#include "sparc3/sparc3_cuda.h"

int main(void) {
    int count = -1;
    const char *reason = NULL;
    const int status = sparc3_cuda_device_count(&count, &reason);
    if (strcmp(sparc3_cuda_version(), SPARC3_VERSION) != 0) return 1;
    if (status == SPARC3_OK ? count < 0 : (status != SPARC3_ERROR_CUDA || count != 0 || !reason[0])) return 1;
    printf("%d devices %s\n", count, reason);
    return 0;
}
