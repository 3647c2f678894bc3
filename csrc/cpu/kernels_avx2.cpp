#include "kernels.h"
#include "simd.h"
#include "sparc3/sparc3.h"

#include "select_kernels.inl"
#include "weight_relevance_kernels.inl"

const sparc3::Kernels sparc3::kernels_avx2 = {
    "avx2", count<uint32_t>, count<uint64_t>, count_equal, mask, rows, nm, kTileN, kTileK, pack, tile,
};
