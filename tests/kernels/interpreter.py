"""Triton's interpreter, mended where this module is imported.

bfloat16: it computes on the raw 16 bits and truncates casts. Casts and dots are all that our kernels do in bf16
(everything else is fp32), so these two are mended. Upstream does not support it (triton-lang/triton pull requests
10945 and 11585).

Ranges: Triton 3.6 asks for the int of an array of one element, which numpy 2.4 refuses (triton-lang/triton issue
9171); Triton 3.7 squeezes it first. On a GPU nothing of that is used, so numpy needs no upper bound.
"""

import numpy as np
import torch
from sparc3_kernels.backend import unavailable
from sparc3_kernels.triton_support import interpreting

# Where the Triton kernels run in the tests.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _mend_bfloat16() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
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


def _mend_ranges() -> None:
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


if interpreting() and unavailable("triton") is None:
    _mend_bfloat16()
    _mend_ranges()
