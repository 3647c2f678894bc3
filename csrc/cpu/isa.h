// The instruction set in use: the best one that the machine has, or the one forced.
#pragma once

#include "kernels.h"
#include "packed_kernels.h"

namespace sparc3 {

const Kernels &kernels();
const PackedKernels &packed_kernels();

}  // namespace sparc3
