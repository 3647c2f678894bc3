"""Bitmap: one bit a weight and the kept values, the format for about 30 to 90 % of pruned weights.

A weight [rows, columns] is

    bits     uint8 [rows, 4 ceil(columns / 32)]   bit c & 7 of byte c >> 3 of a row: column c is kept; padding bits 0
    values   [nnz]                                the kept values, row by row, columns ascending
    offsets  int64 [rows + 1]                     values[offsets[r]:offsets[r + 1]] is row r, offsets[rows] = nnz

A weight is kept if it is not zero; NaN and infinities are values like any other. What is kept comes back bit by
bit, everything else as +0 (so -0 becomes +0). bf16 at 50 % takes 0.5625 of the dense bytes and 8 bytes a row.

bitmap_linear is y = x W^T + bias with W from these three, as `torch.nn.functional.linear` has it: pruned weights
are zeros that multiply, so an infinite input gives NaN as it does in a dense layer.

Measured on 2 cores of an AMD EPYC with AVX-512 BF16, bf16, one vector, weights beyond the cache, against the better
of torch's two dense products in the same run (bench/results/packed-kernels-cpu.json): 1.9 to 3.5 times as fast at
50 %, 3.3 to 4.6 at 70 %, 4.5 to 6.4 at 90 %; with AVX2 alone 1.6 to 1.9, 1.8 to 2.3 and 2.2 to 2.5. For 16 vectors
1.2 to 1.6 at 50 %, but 0.97 on 4096x11008.
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
from sparc3_kernels.select import pack_bits, unpack_bits


def pack_bitmap_reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch `pack_bitmap`, on any device."""
    kept = weight != 0
    padded = torch.nn.functional.pad(kept, (0, -weight.shape[1] % 32))
    bits = pack_bits(padded).view(weight.shape[0], padded.shape[1] // 8)
    return bits, weight[kept], row_offsets(kept)


def unpack_bitmap_reference(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Plain torch `unpack_bitmap`, on any device."""
    check_bitmap(bits, values, offsets, columns)
    rows, padded = bits.shape[0], bits.shape[1] * 8
    kept = unpack_bits(bits, (rows, padded))[:, :columns]
    return values.new_zeros(rows, columns).masked_scatter_(kept, values)


def bitmap_linear_reference(
    x: Tensor, bits: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """Plain torch `bitmap_linear`: unpack and multiply."""
    weight = unpack_bitmap_reference(bits, values, offsets, x.shape[-1])
    return torch.nn.functional.linear(x, weight, bias)


def _pack_native(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.contiguous()
    rows, columns = weight.shape
    offsets = count_kept(weight)
    bits = native.huge_empty((rows, row_bytes(columns)), torch.uint8)
    values = native.huge_empty((int(offsets[-1]),), weight.dtype)
    status = native.library().sparc3_bitmap_pack(
        *(native.DTYPES[weight.dtype], weight.data_ptr(), rows, columns, offsets.data_ptr(), bits.data_ptr()),
        *(values.data_ptr(), values.numel(), torch.get_num_threads()),
    )
    native.check(status)
    return bits, values, offsets


def struct_of(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> native.Bitmap:
    """The C struct of contiguous tensors."""
    return native.Bitmap(
        *(native.DTYPES[values.dtype], offsets.numel() - 1, columns, values.numel()),
        *(bits.data_ptr(), values.data_ptr(), offsets.data_ptr()),
    )


torch.library.define("sparc3::pack_bitmap", "(Tensor weight) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "sparc3::unpack_bitmap", "(Tensor bits, Tensor values, Tensor offsets, int columns) -> Tensor"
)
torch.library.define(
    "sparc3::bitmap_linear",
    "(Tensor x, Tensor bits, Tensor values, Tensor offsets, Tensor? bias=None) -> Tensor",
)


@torch.library.impl("sparc3::pack_bitmap", "default")
def _pack_bitmap(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_weight(weight)
    if runs_on_cpu("pack_bitmap", weight):
        return _pack_native(weight)
    return pack_bitmap_reference(weight)


@torch.library.impl("sparc3::unpack_bitmap", "default")
def _unpack_bitmap(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    check_shapes(bits, values, offsets, columns)
    if not runs_on_cpu("unpack_bitmap", values):
        return unpack_bitmap_reference(bits, values, offsets, columns)
    bits, values, offsets = bits.contiguous(), values.contiguous(), offsets.contiguous()
    if offsets[0] != 0 or offsets[-1] != values.numel():
        check_offsets(values, offsets)
    status, weight = unpack_by(
        native.library().sparc3_bitmap_unpack,
        struct_of(bits, values, offsets, columns),
        (bits.shape[0], columns),
        values.dtype,
    )
    check_status(status, lambda: check_bitmap(bits, values, offsets, columns))
    return weight


@torch.library.impl("sparc3::bitmap_linear", "default")
def _bitmap_linear(
    x: Tensor, bits: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    check_input(x, None, bits.shape[0], values, bias)
    check_shapes(bits, values, offsets, x.shape[-1])
    if not runs_on_cpu("bitmap_linear", values):
        return bitmap_linear_reference(x, bits, values, offsets, bias)
    bits, values, offsets = bits.contiguous(), values.contiguous(), offsets.contiguous()
    library, columns = native.library(), x.shape[-1]

    def part(first: int, many: int) -> native.Bitmap:
        packed = struct_of(bits, values, offsets, columns)
        packed.rows = many
        packed.bits = bits.data_ptr() + first * bits.shape[1]
        packed.offsets = offsets.data_ptr() + first * 8
        return packed

    status, y = multiply_by(
        library.sparc3_bitmap_linear, library.sparc3_bitmap_unpack, part, bits.shape[0], x, bias
    )
    check_status(status, lambda: check_bitmap(bits, values, offsets, x.shape[-1]))
    return y


@torch.library.register_fake("sparc3::pack_bitmap")
def _fake_pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    bits = weight.new_empty((rows, row_bytes(columns)), dtype=torch.uint8)
    return bits, dynamic_length(weight), weight.new_empty(rows + 1, dtype=torch.int64)


@torch.library.register_fake("sparc3::unpack_bitmap")
def _fake_unpack(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    return values.new_empty(bits.shape[0], columns)


@torch.library.register_fake("sparc3::bitmap_linear")
def _fake_linear(
    x: Tensor, bits: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], bits.shape[0])


def pack_bitmap(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pack `weight` [rows, columns] (fp32, bf16 or fp16; fp64 on the reference).

    Returns:
        (bits, values, offsets) as the module describes them, on the device of `weight`.

    Raises:
        ValueError: `weight` is not a float matrix.
    """
    return torch.ops.sparc3.pack_bitmap(weight)


def unpack_bitmap(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Return the weight [rows, columns] that was packed, zeros as +0.

    Raises:
        ValueError: what `check_bitmap` finds.
    """
    return torch.ops.sparc3.unpack_bitmap(bits, values, offsets, columns)


def bitmap_linear(
    x: Tensor, bits: Tensor, values: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = x W^T + bias without unpacking W where that is faster.

    Args:
        x: [..., columns], dtype and device of `values`.
        bits, values, offsets: W [rows, columns] as `pack_bitmap` returns it.
        bias: [rows], dtype of `x`, or None.

    Returns:
        y [..., rows], dtype of `x`; products are summed up in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, or what `check_bitmap` finds.
    """
    return torch.ops.sparc3.bitmap_linear(x, bits, values, offsets, bias)


def check_bitmap(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> None:
    """Check that three tensors are a bitmap of a weight with `columns` columns.

    Raises:
        ValueError: wrong shapes or dtypes; offsets that do not climb from 0 to nnz; a row whose bits and offsets
            disagree; padding bits that are set. The message names the tensor and the row.
    """
    check_shapes(bits, values, offsets, columns)
    check_offsets(values, offsets)
    set_bits = unpack_bits(bits, (bits.shape[0], bits.shape[1] * 8))
    counts = set_bits.sum(dim=1, dtype=torch.int64)
    wrong = counts != offsets.diff()
    if bool(wrong.any()):
        row = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"bits and offsets disagree: row {row} has {int(counts[row])} bits set and "
            f"{int(offsets[row + 1] - offsets[row])} values"
        )
    beyond = set_bits[:, columns:].any(dim=1)
    if bool(beyond.any()):
        row = int(beyond.to(torch.uint8).argmax())
        raise ValueError(f"bits of row {row} are set beyond its {columns} columns")


def row_bytes(columns: int) -> int:
    """Bytes of the bits of a row."""
    return (columns + 31) // 32 * 4


def check_shapes(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> None:
    """Raise ValueError unless shapes, dtypes and devices are those of the format; contents are not looked at."""
    check_lists(values, offsets)
    expected = (offsets.numel() - 1, row_bytes(columns))
    if bits.dtype != torch.uint8 or columns < 0 or tuple(bits.shape) != expected:
        raise ValueError(
            f"bits of a weight [{expected[0]}, {columns}] are uint8 {list(expected)}, "
            f"got {bits.dtype} {list(bits.shape)}"
        )
    if not bits.device == values.device == offsets.device:
        raise ValueError(
            f"bits, values and offsets must share a device, got {bits.device}, {values.device}, {offsets.device}"
        )
