#include <immintrin.h>

#include "half.h"
#include "packed_kernels.h"
#include "sparc3/sparc3.h"

#include "packed_expand.inl"
#include "packed_kernels.inl"

const sparc3::PackedKernels sparc3::packed_avx512vbmi2 = kPackedKernels;
