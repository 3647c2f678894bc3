#include "half.h"
#include "kernels.h"
#include "packed_kernels.h"
#include "simd.h"
#include "sparc3/sparc3.h"

#include "select_kernels.inl"
#include "nm_kernels.inl"
#include "weight_relevance_kernels.inl"
#include "linear_kernels.inl"
#include "packed_expand.inl"
#include "packed_kernels.inl"

const sparc3::Kernels sparc3::kernels_avx2 = {
    "avx2",     count_upper<uint32_t>, count_upper<uint64_t>, count_bracket<uint32_t>, count_bracket<uint64_t>,
    count_equal, mask,                  rows,                  nm,                      kTileN,
    kTileK,      pack,                  tile,                  kLinearRows,           linear,                input_gradient,
};

const sparc3::PackedKernels sparc3::packed_avx2 = kPackedKernels;
