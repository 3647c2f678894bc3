"""bfloat16 made right in Triton's interpreter, which otherwise computes on its raw 16 bits and truncates casts.

Casts and dots are all that our kernels do in bf16 (everything else is fp32), so these two are mended.
Upstream does not support it (triton-lang/triton pull requests 10945 and 11585).
"""

import numpy as np
import torch

# Where the Triton kernels run in the tests.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mend_bfloat16() -> None:
    """Patch the interpreter of this process; twice is once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "bfloat16_is_mended", False):
        return
    builder.bfloat16_is_mended = True
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(values):
        bits = values.astype(np.float32).view(np.uint32)
        nearest_even = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        data = np.where(np.isnan(values), np.uint16(0x7FC0), nearest_even.astype(np.uint16))
        return interpreter.TensorHandle(data, tl.bfloat16)

    def cast_impl(self, source, target):
        source = widened(source) if target.scalar != tl.bfloat16 else source
        if source.dtype.scalar == target.scalar:
            return source
        if target.scalar == tl.bfloat16:
            return rounded(source.data)
        return plain_cast(self, source, target)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return plain_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
