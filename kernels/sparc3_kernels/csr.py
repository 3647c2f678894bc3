"""CSR with short column indices, the format for more than about 92 % of pruned weights.

A weight [rows, columns] is

    indices  [nnz]              the column of each value: uint16 where columns <= 65536, else int32
    values   [nnz]              the kept values, row by row, columns ascending
    offsets  int64 [rows + 1]   values[offsets[r]:offsets[r + 1]] is row r, offsets[rows] = nnz

A weight is kept if it is not zero. What is kept comes back bit by bit, everything else as +0. Values and offsets are
those of the bitmap format, so that converting between the two makes indices or bits and nothing else.

csr_linear is y = x W^T + bias. Pruned weights do not multiply: an infinite input meets only the kept ones.
"""

import torch
from torch import Tensor

from sparc3_kernels import native
from sparc3_kernels.packed import (
    check_input,
    check_lists,
    check_offsets,
    check_status,
    check_weight,
    count_kept,
    dynamic_length,
    multiply_by,
    row_offsets,
    runs_on_cpu,
    unpack_by,
)


def pack_csr_reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch `pack_csr`, on any device."""
    kept = weight != 0
    indices = kept.nonzero()[:, 1].to(index_dtype(weight.shape[1]))
    return indices, weight[kept], row_offsets(kept)


def unpack_csr_reference(indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Plain torch `unpack_csr`, on any device."""
    check_csr(indices, values, offsets, columns)
    rows = rows_of(offsets)
    weight = values.new_zeros(offsets.numel() - 1, columns)
    weight[rows, indices.to(torch.int64)] = values
    return weight


def csr_linear_reference(
    x: Tensor, indices: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """Plain torch `csr_linear`: unpack and multiply."""
    weight = unpack_csr_reference(indices, values, offsets, x.shape[-1])
    return torch.nn.functional.linear(x, weight, bias)


def _pack_native(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.contiguous()
    offsets = count_kept(weight)
    values = native.huge_empty((int(offsets[-1]),), weight.dtype)
    indices = native.huge_empty(values.shape, index_dtype(weight.shape[1]))
    status = native.library().sparc3_csr_pack(
        *(native.DTYPES[weight.dtype], weight.data_ptr(), *weight.shape, offsets.data_ptr()),
        *(indices.data_ptr(), values.data_ptr(), values.numel(), torch.get_num_threads()),
    )
    native.check(status)
    return indices, values, offsets


def struct_of(indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> native.CSR:
    """The C struct of contiguous tensors."""
    return native.CSR(
        *(native.DTYPES[values.dtype], offsets.numel() - 1, columns, values.numel()),
        *(indices.data_ptr(), values.data_ptr(), offsets.data_ptr()),
    )


torch.library.define("sparc3::pack_csr", "(Tensor weight) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "sparc3::unpack_csr", "(Tensor indices, Tensor values, Tensor offsets, int columns) -> Tensor"
)
torch.library.define(
    "sparc3::csr_linear",
    "(Tensor x, Tensor indices, Tensor values, Tensor offsets, Tensor? bias=None) -> Tensor",
)


@torch.library.impl("sparc3::pack_csr", "default")
def _pack_csr(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_weight(weight)
    if runs_on_cpu("pack_csr", weight):
        return _pack_native(weight)
    return pack_csr_reference(weight)


@torch.library.impl("sparc3::unpack_csr", "default")
def _unpack_csr(indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    check_shapes(indices, values, offsets, columns)
    if not runs_on_cpu("unpack_csr", values):
        return unpack_csr_reference(indices, values, offsets, columns)
    indices, values, offsets = indices.contiguous(), values.contiguous(), offsets.contiguous()
    if offsets[0] != 0 or offsets[-1] != values.numel():
        check_offsets(values, offsets)
    status, weight = unpack_by(
        native.library().sparc3_csr_unpack,
        struct_of(indices, values, offsets, columns),
        (offsets.numel() - 1, columns),
        values.dtype,
    )
    check_status(status, lambda: check_csr(indices, values, offsets, columns))
    return weight


@torch.library.impl("sparc3::csr_linear", "default")
def _csr_linear(
    x: Tensor, indices: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    check_input(x, None, offsets.numel() - 1, values, bias)
    check_shapes(indices, values, offsets, x.shape[-1])
    if not runs_on_cpu("csr_linear", values):
        return csr_linear_reference(x, indices, values, offsets, bias)
    indices, values, offsets = indices.contiguous(), values.contiguous(), offsets.contiguous()
    library, columns = native.library(), x.shape[-1]

    def part(first: int, many: int) -> native.CSR:
        packed = struct_of(indices, values, offsets, columns)
        packed.rows = many
        packed.offsets = offsets.data_ptr() + first * 8
        return packed

    rows = offsets.numel() - 1
    status, y = multiply_by(library.sparc3_csr_linear, library.sparc3_csr_unpack, part, rows, x, bias)
    check_status(status, lambda: check_csr(indices, values, offsets, x.shape[-1]))
    return y


@torch.library.register_fake("sparc3::pack_csr")
def _fake_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    values = dynamic_length(weight)
    return (
        values.new_empty(values.shape, dtype=index_dtype(columns)),
        values,
        weight.new_empty(rows + 1, dtype=torch.int64),
    )


@torch.library.register_fake("sparc3::unpack_csr")
def _fake_unpack(indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, columns)


@torch.library.register_fake("sparc3::csr_linear")
def _fake_linear(
    x: Tensor, indices: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], offsets.shape[0] - 1)


def pack_csr(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pack `weight` [rows, columns] (fp32, bf16 or fp16; fp64 on the reference).

    Returns:
        (indices, values, offsets) as the module describes them, on the device of `weight`.

    Raises:
        ValueError: `weight` is not a float matrix.
    """
    return torch.ops.sparc3.pack_csr(weight)


def unpack_csr(indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Return the weight [rows, columns] that was packed, zeros as +0.

    Raises:
        ValueError: what `check_csr` finds.
    """
    return torch.ops.sparc3.unpack_csr(indices, values, offsets, columns)


def csr_linear(
    x: Tensor, indices: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x W^T + bias without unpacking W where that is faster.

    Args:
        x: [..., columns], dtype and device of `values`.
        indices, values, offsets: W [rows, columns] as `pack_csr` returns it.
        bias: [rows], dtype of `x`, or None.

    Returns:
        y [..., rows], dtype of `x`; products are summed up in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together. Corrupt indices are an error where they are
            noticed, else a wrong product: run `check_csr` once on a weight from outside.
    """
    return torch.ops.sparc3.csr_linear(x, indices, values, offsets, bias)


def check_csr(indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> None:
    """Check that three tensors are a CSR weight with `columns` columns.

    Raises:
        ValueError: wrong shapes or dtypes; offsets that do not climb from 0 to nnz; a row whose columns do not
            ascend below `columns`. The message names the tensor and the row.
    """
    check_shapes(indices, values, offsets, columns)
    check_offsets(values, offsets)
    rows, column = rows_of(offsets), indices.to(torch.int64)
    wrong = (column < 0) | (column >= columns)
    wrong[1:] |= (column.diff() <= 0) & (rows.diff() == 0)
    if bool(wrong.any()):
        place = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"indices of row {int(rows[place])} are not ascending below {columns}: column {int(column[place])} "
            f"as value {place - int(offsets[rows[place]])} of the row"
        )


def index_dtype(columns: int) -> torch.dtype:
    """uint16 where it can count `columns` columns, else int32."""
    return torch.uint16 if columns <= 1 << 16 else torch.int32


def rows_of(offsets: Tensor) -> Tensor:
    """The row of each value, int64 [nnz]."""
    rows = torch.arange(offsets.numel() - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff())


def check_shapes(indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> None:
    """Raise ValueError unless shapes, dtypes and devices are those of the format; contents are not looked at."""
    check_lists(values, offsets)
    if columns < 0 or indices.dtype != index_dtype(columns) or indices.shape != values.shape:
        raise ValueError(
            f"indices of {values.numel()} values in {columns} columns are {index_dtype(columns)} "
            f"[{values.numel()}], got {indices.dtype} {list(indices.shape)}"
        )
    if not indices.device == values.device == offsets.device:
        raise ValueError(
            "indices, values and offsets must share a device, got "
            f"{indices.device}, {values.device}, {offsets.device}"
        )
