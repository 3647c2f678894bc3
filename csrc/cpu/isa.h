#pragma once

#include "kernels.h"

namespace sparc3 {

// The kernels of the instruction set in use.
const Kernels &kernels();

}  // namespace sparc3
