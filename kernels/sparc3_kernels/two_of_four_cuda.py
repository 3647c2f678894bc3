"""2:4 in the order in which sparse tensor cores take it, what a CUDA device holds in place of values and indices.

Strips of 16 rows are cut into steps of 64 columns, strip by strip; rows and columns beyond the weight are zeros. Lane
4 g + t of the warp that multiplies a step holds of rows g and g + 8

    values   [steps, 2, 32, 8]    of half h: the two of the four columns from 32 h + 4 t on of row g, the same of row
                                  g + 8, the two of the four columns from 32 h + 16 + 4 t on of row g, of row g + 8
    places   int32 [steps, 32]    two bits a value of columns 16 t to 16 t + 15: row g in the lower 16 bits, row g + 8
                                  in the upper ones

bf16 or fp16, 0.5625 of the dense bytes where rows divide by 16 and columns by 64. arranged_two_of_four_linear is y =
x W^T + bias, products summed up in fp32: up to 64 vectors by mma.sp (csrc/cuda/two_of_four.cu), more by unpacking for
a dense product. Pruned weights do not multiply in a sparse product: infinite inputs there do not give NaN. Not
measured on a GPU yet.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc3_kernels import native
from sparc3_kernels.nm import unpack_nm_reference
from sparc3_kernels.packed import check_input
from sparc3_kernels.packed_cuda import FUSED_BATCH, HALVES, calls_library, multiply, unpack
from sparc3_kernels.select_native import stream_of

_STRIP, _STEP = 16, 64


def arrange_two_of_four(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Arrange a sound 2:4 weight (sparc3_kernels.nm) of bf16 or fp16 on a CUDA device: (values, places).

    Raises:
        NativeError: the library is not there, or a CUDA call failed.
    """
    library, (rows, kept) = native.library("sparc3_cuda"), values.shape
    values, indices = values.contiguous(), indices.contiguous()
    steps = library.sparc3_cuda_two_of_four_steps(rows, 2 * kept)
    arranged = values.new_empty(steps, 2, 32, 8)
    places = torch.empty(steps, 32, dtype=torch.int32, device=values.device)
    neutral = native.NM(
        *(native.DTYPES[values.dtype], 2, 4, rows, 2 * kept, values.data_ptr(), indices.data_ptr())
    )
    with stream_of(values.device) as stream:
        native.check(
            library.sparc3_cuda_two_of_four_arrange(
                ctypes.byref(neutral), arranged.data_ptr(), places.data_ptr(), stream
            )
        )
    return arranged, places


def restore_two_of_four(values: Tensor, places: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(values, indices) that were arranged, on the same device, to the last bit."""
    strips, steps = -(-rows // _STRIP), -(-columns // _STEP)
    # strip, step, half, g, t, sixteen columns, upper row or not, first or second value
    parts = values.view(strips, steps, 2, 8, 4, 2, 2, 2)
    ordered = parts.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(strips * _STRIP, steps * _STEP // 2)
    # strip, step, g, t, upper row or not, byte
    octets = places.view(torch.uint8).view(strips, steps, 8, 4, 2, 2)
    indices = octets.permute(0, 4, 2, 1, 3, 5).reshape(strips * _STRIP, steps * _STEP // 8)
    indices = indices[:rows, : (columns // 2 + 3) // 4].contiguous()
    if columns % 8:
        indices[:, -1] &= 0xF
    return ordered[:rows, : columns // 2].contiguous(), indices


def unpack_arranged_two_of_four_reference(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """Plain torch `unpack_arranged_two_of_four`, on any device."""
    return unpack_nm_reference(*restore_two_of_four(values, places, rows, columns), 2, 4)


def arranged_two_of_four_linear_reference(
    x: Tensor, values: Tensor, places: Tensor, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    """Plain torch `arranged_two_of_four_linear`: unpack and multiply."""
    return F.linear(x, unpack_arranged_two_of_four_reference(values, places, rows, columns), bias)


torch.library.define(
    "sparc3::unpack_arranged_two_of_four", "(Tensor values, Tensor places, int rows, int columns) -> Tensor"
)
torch.library.define(
    "sparc3::arranged_two_of_four_linear",
    "(Tensor x, Tensor values, Tensor places, int rows, int columns, Tensor? bias=None) -> Tensor",
)


def _native(values: Tensor, places: Tensor, rows: int, columns: int) -> native.CudaTwoOfFour:
    return native.CudaTwoOfFour(
        native.DTYPES[values.dtype], rows, columns, values.data_ptr(), places.data_ptr()
    )


@torch.library.impl("sparc3::unpack_arranged_two_of_four", "default")
def _unpack(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    _check_shapes(values, places, rows, columns)
    if not calls_library("unpack_arranged_two_of_four", values.device):
        return unpack_arranged_two_of_four_reference(values, places, rows, columns)
    weight = values.new_empty(rows, columns)
    return unpack("two_of_four", _native(values, places, rows, columns), weight)


@torch.library.impl("sparc3::arranged_two_of_four_linear", "default")
def _linear(
    x: Tensor, values: Tensor, places: Tensor, rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    check_input(x, columns, rows, values, bias)
    _check_shapes(values, places, rows, columns)
    if not calls_library("arranged_two_of_four_linear", values.device):
        return arranged_two_of_four_linear_reference(x, values, places, rows, columns, bias)
    if x.shape[:-1].numel() > FUSED_BATCH:
        return F.linear(x, unpack_arranged_two_of_four(values, places, rows, columns), bias)
    return multiply("two_of_four", _native(values, places, rows, columns), x, rows, bias)


@torch.library.register_fake("sparc3::unpack_arranged_two_of_four")
def _fake_unpack(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty(rows, columns)


@torch.library.register_fake("sparc3::arranged_two_of_four_linear")
def _fake_linear(
    x: Tensor, values: Tensor, places: Tensor, rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def unpack_arranged_two_of_four(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """Return the weight [rows, columns], zeros as +0.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    return torch.ops.sparc3.unpack_arranged_two_of_four(values, places, rows, columns)


def arranged_two_of_four_linear(
    x: Tensor, values: Tensor, places: Tensor, rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """y = x W^T + bias.

    Args:
        x: [..., columns], dtype and device of `values`.
        values, places: W [rows, columns] as `arrange_two_of_four` returns it.
        rows, columns: of W.
        bias: [rows], dtype of `x`, or None.

    Returns:
        y [..., rows], dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    return torch.ops.sparc3.arranged_two_of_four_linear(x, values, places, rows, columns, bias)


def _check_shapes(values: Tensor, places: Tensor, rows: int, columns: int) -> None:
    steps = -(-rows // _STRIP) * -(-columns // _STEP)
    if columns % 4 or values.dtype not in HALVES or tuple(values.shape) != (steps, 2, 32, 8):
        raise ValueError(
            f"arranged 2:4 values of a weight [{rows}, {columns}] are bf16 or fp16 [{steps}, 2, 32, 8], got "
            f"{values.dtype} {list(values.shape)}"
        )
    if places.dtype != torch.int32 or tuple(places.shape) != (steps, 32):
        raise ValueError(
            f"places of a weight [{rows}, {columns}] are int32 [{steps}, 32], got {places.dtype} "
            f"{list(places.shape)}"
        )
