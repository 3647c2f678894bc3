"""What the packed formats (bitmap, N:M, CSR) share: checks of shapes and offsets, and calls of the CPU library."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparc3_kernels import native
from sparc3_kernels.backend import choose

# From so many vectors on, panels of PANEL_ROWS are unpacked for a dense product. Both were chosen by one probe of a
# 4096x11008 bitmap at 50 %; bench/results/packed-kernels-cpu.json measures up to 128 vectors.
DENSE_BATCH = 512
PANEL_ROWS = 4096
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_weight(weight: Tensor) -> None:
    """Raise ValueError unless `weight` is a float matrix."""
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            f"only a float matrix can be packed, not {weight.dtype} of shape {tuple(weight.shape)}"
        )


def check_input(x: Tensor, columns: int | None, rows: int, values: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless x [..., columns] and bias [rows] fit the packed `values`; None: any columns."""
    if x.dim() < 1 or (columns is not None and x.shape[-1] != columns):
        raise ValueError(f"x is [..., {columns}], got shape {tuple(x.shape)}")
    if x.dtype != values.dtype or x.device != values.device:
        raise ValueError(
            f"x and the packed weight must share dtype and device, got {x.dtype} on {x.device} and "
            f"{values.dtype} on {values.device}"
        )
    if bias is not None and (bias.shape != (rows,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"bias is {x.dtype} [{rows}] on {x.device}, got {bias.dtype} {list(bias.shape)} on {bias.device}"
        )


def check_lists(values: Tensor, offsets: Tensor) -> None:
    """Raise ValueError unless values [nnz] and offsets [rows + 1] have the right shapes and dtypes."""
    if values.dim() != 1 or values.dtype not in FLOATS:
        raise ValueError(f"values are floats [nnz], got {values.dtype} {list(values.shape)}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or offsets.numel() == 0:
        raise ValueError(f"offsets are int64 [rows + 1], got {offsets.dtype} {list(offsets.shape)}")


def check_offsets(values: Tensor, offsets: Tensor) -> None:
    """Raise ValueError unless the offsets climb from 0 to the number of values."""
    if first := int(offsets[0]):
        raise ValueError(f"offsets start at {first}, not at 0")
    falls = offsets.diff() < 0
    if bool(falls.any()):
        row = int(falls.to(torch.uint8).argmax())
        raise ValueError(
            f"offsets are out of order: {int(offsets[row])} at row {row}, {int(offsets[row + 1])} at row {row + 1}"
        )
    if (last := int(offsets[-1])) != values.numel():
        raise ValueError(f"offsets end at {last}, but there are {values.numel()} values (a truncated file?)")


def runs_on_cpu(op: str, values: Tensor) -> bool:
    """Whether the CPU library runs this call of `op`, else the reference does."""
    unfit = None
    if values.device.type != "cpu":
        unfit = f"the tensors are on {values.device}"
    elif values.dtype not in native.DTYPES:
        unfit = f"it takes fp32, bf16 and fp16, not {values.dtype}"
    return choose(op, {"cpu": unfit}) == "cpu"


def check_status(status: int, explain: Callable[[], None]) -> None:
    """Raise what `explain` finds wrong with a weight that the library calls corrupt, NativeError for the rest."""
    if status == native.FORMAT:
        explain()
    native.check(status)


def count_kept(weight: Tensor) -> Tensor:
    """Row offsets of a contiguous CPU weight [rows, columns] by the library, int64 [rows + 1]."""
    offsets = torch.empty(weight.shape[0] + 1, dtype=torch.int64)
    native.check(
        native.library().sparc3_count_kept(
            *(native.DTYPES[weight.dtype], weight.data_ptr(), *weight.shape),
            *(offsets.data_ptr(), torch.get_num_threads()),
        )
    )
    return offsets


def unpack_by(function: Any, packed: Any, shape: Sequence[int], dtype: torch.dtype) -> tuple[int, Tensor]:
    """Call a C unpack function; (status, weight)."""
    weight = native.huge_empty(shape, dtype)
    return function(packed, weight.data_ptr(), torch.get_num_threads()), weight


def multiply_by(
    linear: Any, unpack: Any, part: Callable[[int, int], Any], rows: int, x: Tensor, bias: Tensor | None
) -> tuple[int, Tensor]:
    """Multiply with the C functions of a format; (status, y [..., rows]).

    From `DENSE_BATCH` vectors on, panels of rows are unpacked and go through torch's dense product.

    Args:
        linear, unpack: the C functions.
        part: (first row, number of rows) -> the packed weight of these rows.
        rows, x, bias: as in the public functions.
    """
    x, threads, batch = x.contiguous(), torch.get_num_threads(), x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-1], rows))
    if batch >= DENSE_BATCH:
        panel = native.huge_empty((min(PANEL_ROWS, rows), x.shape[-1]), x.dtype)
        for first in range(0, rows, PANEL_ROWS):
            many = min(PANEL_ROWS, rows - first)
            if status := unpack(part(first, many), panel.data_ptr(), threads):
                return status, y
            shift = None if bias is None else bias[first : first + many]
            y[..., first : first + many] = torch.nn.functional.linear(x, panel[:many], shift)
        return native.OK, y
    bias = None if bias is None else bias.contiguous()
    work = native.workspace(native.library().sparc3_linear_workspace_size(rows, x.shape[-1], batch, threads))
    status = linear(
        *(part(0, rows), x.data_ptr(), batch, None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(threads, work.data_ptr(), work.numel()),
    )
    return status, y


def as_bits(values: Tensor) -> Tensor:
    """Floats as integers of their width: moving fp16 and bf16 about can change what a NaN carries."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def row_offsets(kept: Tensor) -> Tensor:
    """int64 [rows + 1] from a bool matrix: where the values of each row start, the total last."""
    return torch.nn.functional.pad(kept.sum(dim=1, dtype=torch.int64).cumsum(0), (1, 0))


def dynamic_length(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A fake 1-D tensor whose length depends on the data."""
    length = torch.library.get_ctx().new_dynamic_size()
    return like.new_empty(length, dtype=dtype or like.dtype)
