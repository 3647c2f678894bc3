"""N:M: at most N nonzero weights in every M consecutive ones of a row, M <= 16; 2:4 and 4:8 are the common ones.

A weight [rows, columns] is

    values   [rows, columns N / M]    exactly N values a group, in ascending column order
    indices  uint8 [rows, ceil(columns N / M * width / 8)]
                                      the place of each value within its group; width = 2 bits for M <= 4, else 4,
                                      the first one in the lowest bits; each row starts at a byte, padding bits 0

A group with fewer than N nonzeros is filled up with +0 at its first free places. Nonzeros come back bit by bit,
zeros as +0. The layout belongs to no GPU or library; 2:4 in bf16 takes 0.5625 of the dense bytes.

nm_linear is y = x W^T + bias.
"""

import ctypes

import torch
from torch import Tensor

from sparc3_kernels import native
from sparc3_kernels.packed import (
    FLOATS,
    as_bits,
    check_input,
    check_status,
    check_weight,
    multiply_by,
    runs_on_cpu,
    unpack_by,
)


def pack_nm_reference(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Plain torch `pack_nm`, on any device."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // m, m)
    zero = groups == 0
    count = m - zero.sum(dim=2)
    if bool((count > n).any()):
        row, group = divmod(int((count > n).reshape(-1).to(torch.uint8).argmax()), columns // m)
        refuse_group(weight[row], row, group, n, m)
    # Nonzeros first, then zeros, both in column order; the first n of them in column order again.
    places = zero.to(torch.uint8).sort(dim=2, stable=True).indices[..., :n].sort(dim=2).values
    values = as_bits(groups).masked_fill(zero, 0).gather(2, places).view(weight.dtype)
    return values.view(rows, columns // m * n), _pack_places(places.view(rows, columns // m * n), _width(m))


def unpack_nm_reference(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """Plain torch `unpack_nm`, on any device."""
    check_nm(values, indices, n, m)
    rows, groups = values.shape[0], values.shape[1] // n
    places = _unpack_places(indices, values.shape[1], _width(m)).view(rows, groups, n)
    bits = as_bits(values.contiguous())
    weight = bits.new_zeros(rows, groups, m).scatter_(2, places.long(), bits.view(rows, groups, n))
    return weight.view(values.dtype).view(rows, groups * m)


def nm_linear_reference(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None
) -> Tensor:
    """Plain torch `nm_linear`: unpack and multiply."""
    return torch.nn.functional.linear(x, unpack_nm_reference(values, indices, n, m), bias)


def refuse_group(weights: Tensor, row: int, group: int, n: int, m: int) -> None:
    """Raise the ValueError of a group with too many nonzeros; `weights` [columns] is its row."""
    column = group * m
    nonzeros = int((weights[column : column + m] != 0).sum())
    raise ValueError(
        f"the weight is not {n}:{m}: row {row}, columns {column} to {column + m - 1} hold {nonzeros} nonzeros"
    )


def _pack_native(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous()
    rows, columns = weight.shape
    values = native.huge_empty((rows, columns // m * n), weight.dtype)
    indices = native.huge_empty((rows, index_bytes(values.shape[1], m)), torch.uint8)
    wrong = ctypes.c_uint64()
    status = native.library().sparc3_nm_pack(
        *(native.DTYPES[weight.dtype], weight.data_ptr(), rows, columns, n, m),
        *(values.data_ptr(), indices.data_ptr(), ctypes.byref(wrong), torch.get_num_threads()),
    )
    if status == native.PATTERN:
        row, group = divmod(wrong.value, columns // m)
        refuse_group(weight[row], row, group, n, m)
    native.check(status)
    return values, indices


def struct_of(values: Tensor, indices: Tensor, n: int, m: int) -> native.NM:
    """The C struct of contiguous tensors."""
    return native.NM(
        *(native.DTYPES[values.dtype], n, m, values.shape[0], values.shape[1] // n * m),
        *(values.data_ptr(), indices.data_ptr()),
    )


torch.library.define("sparc3::pack_nm", "(Tensor weight, int n, int m) -> (Tensor, Tensor)")
torch.library.define("sparc3::unpack_nm", "(Tensor values, Tensor indices, int n, int m) -> Tensor")
torch.library.define(
    "sparc3::nm_linear",
    "(Tensor x, Tensor values, Tensor indices, int n, int m, Tensor? bias=None) -> Tensor",
)


@torch.library.impl("sparc3::pack_nm", "default")
def _pack_nm(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    check_weight(weight)
    check_pattern(n, m, weight.shape[1])
    if runs_on_cpu("pack_nm", weight):
        return _pack_native(weight, n, m)
    return pack_nm_reference(weight, n, m)


@torch.library.impl("sparc3::unpack_nm", "default")
def _unpack_nm(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    check_shapes(values, indices, n, m)
    if not runs_on_cpu("unpack_nm", values):
        return unpack_nm_reference(values, indices, n, m)
    values, indices = values.contiguous(), indices.contiguous()
    packed = struct_of(values, indices, n, m)
    status, weight = unpack_by(
        native.library().sparc3_nm_unpack, packed, (packed.rows, packed.columns), values.dtype
    )
    check_status(status, lambda: check_nm(values, indices, n, m))
    return weight


@torch.library.impl("sparc3::nm_linear", "default")
def _nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None = None
) -> Tensor:
    check_shapes(values, indices, n, m)
    check_input(x, values.shape[1] // n * m, values.shape[0], values, bias)
    if not runs_on_cpu("nm_linear", values):
        return nm_linear_reference(x, values, indices, n, m, bias)
    values, indices = values.contiguous(), indices.contiguous()
    library = native.library()

    def part(first: int, many: int) -> native.NM:
        packed = struct_of(values, indices, n, m)
        packed.rows = many
        packed.values = values.data_ptr() + first * values.shape[1] * values.element_size()
        packed.indices = indices.data_ptr() + first * indices.shape[1]
        return packed

    status, y = multiply_by(
        library.sparc3_nm_linear, library.sparc3_nm_unpack, part, values.shape[0], x, bias
    )
    check_status(status, lambda: check_nm(values, indices, n, m))
    return y


@torch.library.register_fake("sparc3::pack_nm")
def _fake_pack(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    rows, kept = weight.shape[0], weight.shape[1] // m * n
    indices = weight.new_empty((rows, index_bytes(kept, m)), dtype=torch.uint8)
    return weight.new_empty(rows, kept), indices


@torch.library.register_fake("sparc3::unpack_nm")
def _fake_unpack(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    return values.new_empty(values.shape[0], values.shape[1] // n * m)


@torch.library.register_fake("sparc3::nm_linear")
def _fake_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def pack_nm(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Pack `weight` [rows, columns] (fp32, bf16 or fp16; fp64 on the reference), which must be N:M already.

    Returns:
        (values, indices) as the module describes them, on the device of `weight`.

    Raises:
        ValueError: `weight` is not a float matrix, M does not divide its rows, a group has more than N nonzeros
            (the message names the first one), or not 1 <= N <= M <= 16.
    """
    return torch.ops.sparc3.pack_nm(weight, n, m)


def unpack_nm(values: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """Return the weight [rows, columns] that was packed, zeros as +0.

    Raises:
        ValueError: what `check_nm` finds.
    """
    return torch.ops.sparc3.unpack_nm(values, indices, n, m)


def nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None = None
) -> Tensor:
    """y = x W^T + bias without unpacking W where that is faster.

    Args:
        x: [..., columns], dtype and device of `values`.
        values, indices: W [rows, columns] as `pack_nm` returns it.
        n, m: the pattern W was packed with.
        bias: [rows], dtype of `x`, or None.

    Returns:
        y [..., rows], dtype of `x`; products are summed up in fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together. Corrupt indices are an error where they are
            noticed, else a wrong product: run `check_nm` once on a weight from outside.
    """
    return torch.ops.sparc3.nm_linear(x, values, indices, n, m, bias)


def check_nm(values: Tensor, indices: Tensor, n: int, m: int) -> None:
    """Check that two tensors are an N:M weight.

    Raises:
        ValueError: wrong shapes or dtypes, or a group whose places are not ascending below M. The message names
            the row and the group.
    """
    check_shapes(values, indices, n, m)
    rows, kept = values.shape
    places = _unpack_places(indices, kept, _width(m)).view(rows, kept // n, n)
    wrong = (places >= m).any(dim=2) | (places[..., 1:] <= places[..., :-1]).any(dim=2)
    if bool(wrong.any()):
        row, group = divmod(int(wrong.reshape(-1).to(torch.uint8).argmax()), kept // n)
        raise ValueError(
            f"indices of row {row}, group {group} are {places[row, group].tolist()}, not ascending below {m}"
        )


def index_bytes(kept: int, m: int) -> int:
    """Bytes of the indices of a row of `kept` values."""
    return (kept * _width(m) + 7) // 8


def _width(m: int) -> int:
    """Bits of one index."""
    return 2 if m <= 4 else 4


def _pack_places(places: Tensor, width: int) -> Tensor:
    """Pack places [rows, kept] into uint8 [rows, ceil(kept * width / 8)], the first in the lowest bits."""
    each = 8 // width
    padded = torch.nn.functional.pad(places.to(torch.uint8), (0, -places.shape[1] % each))
    shift = torch.arange(0, 8, width, dtype=torch.uint8, device=places.device)
    return (padded.view(places.shape[0], padded.shape[1] // each, each) << shift).sum(
        dim=2, dtype=torch.uint8
    )


def _unpack_places(indices: Tensor, kept: int, width: int) -> Tensor:
    shift = torch.arange(0, 8, width, dtype=torch.uint8, device=indices.device)
    places = (indices[..., None] >> shift) & ((1 << width) - 1)
    return places.reshape(indices.shape[0], indices.shape[1] * (8 // width))[:, :kept]


def check_pattern(n: int, m: int, columns: int) -> None:
    """Raise ValueError unless rows of `columns` weights can be N:M."""
    if not 1 <= n <= m <= 16:
        raise ValueError(f"{n}:{m} needs 1 <= N <= M <= 16")
    if columns % m:
        raise ValueError(f"{n}:{m} does not divide a row of {columns} weights; choose an M that does")


def check_shapes(values: Tensor, indices: Tensor, n: int, m: int) -> None:
    """Raise ValueError unless shapes, dtypes and devices are those of the format; contents are not looked at."""
    check_pattern(n, m, 0)
    if values.dim() != 2 or values.dtype not in FLOATS or values.shape[1] % n:
        raise ValueError(
            f"values of a {n}:{m} weight are floats [rows, a multiple of {n}], got {values.dtype} "
            f"{list(values.shape)}"
        )
    expected = [values.shape[0], index_bytes(values.shape[1], m)]
    if indices.dtype != torch.uint8 or list(indices.shape) != expected:
        raise ValueError(
            f"indices of {list(values.shape)} values are uint8 {expected}, got {indices.dtype} "
            f"{list(indices.shape)}"
        )
    if values.device != indices.device:
        raise ValueError(f"values and indices must share a device, got {values.device} and {indices.device}")
