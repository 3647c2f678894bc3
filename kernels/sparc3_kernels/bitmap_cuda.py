"""A bitmap in the order in which tensor cores take it, what a CUDA device holds in place of bits, values and offsets.

Strips of 16 rows are cut into chunks of 256 columns, strip by strip. Lane 4 g + t of the warp that takes a chunk
owns 128 of its elements: in each quarter q of 64 columns, the 16 columns from 64 q + 16 t on of rows g and g + 8.

    masks    int32 [chunks, 32, 4]   bits 8 f + j of word q of a lane: row g, column 64 q + 16 t + 4 f + j is kept;
                                     bits 8 f + 4 + j: row g + 8
    starts   int32 [chunks + 1]      where the values of a chunk begin, in 16 bytes
    values   [8 starts[chunks]]      of a chunk: the first two kept elements of each lane that has some, in order of
                                     lanes, then the third and fourth, and so on; filled up with zeros
    deepest  the largest number of such pairs that a lane has, at most 64

bf16 or fp16. About as many bytes as the neutral form; at 50 % the pairs that are not full add about 1 %.
arranged_bitmap_linear is y = x W^T + bias, products summed up in fp32: up to 64 vectors by a kernel that decodes the
weight between tensor-core products (csrc/cuda/bitmap_linear.cu), more by unpacking for a dense product. Not measured
on a GPU yet; about 4.1 lane-instructions a weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc3_kernels import native
from sparc3_kernels.packed import check_input
from sparc3_kernels.packed_cuda import FUSED_BATCH, HALVES, calls_library, multiply, unpack
from sparc3_kernels.select import pack_bits, unpack_bits
from sparc3_kernels.select_native import stream_of

_STRIP, _CHUNK = 16, 256


class ArrangedBitmap(NamedTuple):
    """A weight as the module describes it."""

    masks: Tensor
    starts: Tensor
    values: Tensor
    deepest: int


def arrange_bitmap(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> ArrangedBitmap:
    """Arrange a sound bitmap (sparc3_kernels.bitmap) of bf16 or fp16 on a CUDA device. Waits for the device.

    Raises:
        NativeError: the library is not there, or a CUDA call failed.
    """
    library, rows, device = native.library("sparc3_cuda"), bits.shape[0], values.device
    bits, values, offsets = bits.contiguous(), values.contiguous(), offsets.contiguous()
    chunks = library.sparc3_cuda_bitmap_chunks(rows, columns)
    masks = torch.empty(chunks, 32, 4, dtype=torch.int32, device=device)
    starts = torch.empty(chunks + 1, dtype=torch.int32, device=device)
    deepest = torch.empty(1, dtype=torch.int32, device=device)
    with stream_of(device) as stream:
        native.check(
            library.sparc3_cuda_bitmap_arrange_masks(
                *(bits.data_ptr(), rows, columns, masks.data_ptr(), starts.data_ptr(), deepest.data_ptr()),
                stream,
            )
        )
        sizes = torch.stack((starts[-1], deepest[0])).tolist()
        arranged = torch.empty(8 * sizes[0], dtype=values.dtype, device=device)
        native.check(
            library.sparc3_cuda_bitmap_arrange_values(
                *(native.DTYPES[values.dtype], offsets.data_ptr(), values.data_ptr(), rows, columns),
                *(masks.data_ptr(), starts.data_ptr(), arranged.data_ptr(), stream),
            )
        )
    return ArrangedBitmap(masks, starts, arranged, sizes[1])


def restore_bitmap(arranged: ArrangedBitmap, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(bits, values, offsets) that were arranged, on the same device, to the last bit."""
    kept = _kept(arranged.masks, rows, columns)
    weight = unpack_arranged_bitmap(*arranged, rows, columns)
    counts = kept.sum(dim=1, dtype=torch.int64)
    bits = pack_bits(F.pad(kept, (0, -columns % 32))).view(rows, (columns + 31) // 32 * 4)
    return bits, weight[kept], F.pad(counts.cumsum(0), (1, 0))


def unpack_arranged_bitmap_reference(
    masks: Tensor, starts: Tensor, values: Tensor, deepest: int, rows: int, columns: int
) -> Tensor:
    """Plain torch `unpack_arranged_bitmap`, on any device."""
    set_bits = _bits_of(masks)  # [chunks, 32 lanes, 128]
    order = set_bits.cumsum(2) - set_bits.long()  # how many elements a lane has before this one
    pairs = (set_bits.sum(2) + 1) // 2
    # Before pair w of a lane: the first w pairs of every lane, and pair w of the lanes before it.
    depth = torch.arange(max(deepest, 1), device=masks.device)
    rank = (pairs[..., None] > depth).long()
    before = pairs[..., None].minimum(depth).sum(1, keepdim=True) + rank.cumsum(1) - rank
    place = before.gather(2, (order // 2).clamp(max=max(deepest, 1) - 1)) * 2 + order % 2
    place += 8 * starts[:-1].long()[:, None, None]
    elements = values.new_zeros(set_bits.shape)
    elements[set_bits] = values[place[set_bits]]
    return _by_rows(elements, rows, columns)


def arranged_bitmap_linear_reference(
    x: Tensor,
    masks: Tensor,
    starts: Tensor,
    values: Tensor,
    deepest: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
) -> Tensor:
    """Plain torch `arranged_bitmap_linear`: unpack and multiply."""
    weight = unpack_arranged_bitmap_reference(masks, starts, values, deepest, rows, columns)
    return F.linear(x, weight, bias)


torch.library.define(
    "sparc3::unpack_arranged_bitmap",
    "(Tensor masks, Tensor starts, Tensor values, int deepest, int rows, int columns) -> Tensor",
)
torch.library.define(
    "sparc3::arranged_bitmap_linear",
    "(Tensor x, Tensor masks, Tensor starts, Tensor values, int deepest, int rows, int columns, "
    "Tensor? bias=None) -> Tensor",
)


def _native(
    masks: Tensor, starts: Tensor, values: Tensor, deepest: int, rows: int, columns: int
) -> native.CudaBitmap:
    return native.CudaBitmap(
        *(native.DTYPES[values.dtype], rows, columns),
        *(masks.data_ptr(), starts.data_ptr(), values.data_ptr(), deepest),
    )


@torch.library.impl("sparc3::unpack_arranged_bitmap", "default")
def _unpack(masks: Tensor, starts: Tensor, values: Tensor, deepest: int, rows: int, columns: int) -> Tensor:
    _check_shapes(masks, starts, values, rows, columns)
    if not calls_library("unpack_arranged_bitmap", values.device):
        return unpack_arranged_bitmap_reference(masks, starts, values, deepest, rows, columns)
    weight = values.new_empty(rows, columns)
    return unpack("bitmap", _native(masks, starts, values, deepest, rows, columns), weight)


@torch.library.impl("sparc3::arranged_bitmap_linear", "default")
def _linear(
    x: Tensor,
    masks: Tensor,
    starts: Tensor,
    values: Tensor,
    deepest: int,
    rows: int,
    columns: int,
    bias: Tensor | None = None,
) -> Tensor:
    check_input(x, columns, rows, values, bias)
    _check_shapes(masks, starts, values, rows, columns)
    if not calls_library("arranged_bitmap_linear", values.device):
        return arranged_bitmap_linear_reference(x, masks, starts, values, deepest, rows, columns, bias)
    if x.shape[:-1].numel() > FUSED_BATCH:
        return F.linear(x, unpack_arranged_bitmap(masks, starts, values, deepest, rows, columns), bias)
    return multiply("bitmap", _native(masks, starts, values, deepest, rows, columns), x, rows, bias)


@torch.library.register_fake("sparc3::unpack_arranged_bitmap")
def _fake_unpack(
    masks: Tensor, starts: Tensor, values: Tensor, deepest: int, rows: int, columns: int
) -> Tensor:
    return values.new_empty(rows, columns)


@torch.library.register_fake("sparc3::arranged_bitmap_linear")
def _fake_linear(
    x: Tensor,
    masks: Tensor,
    starts: Tensor,
    values: Tensor,
    deepest: int,
    rows: int,
    columns: int,
    bias: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def unpack_arranged_bitmap(
    masks: Tensor, starts: Tensor, values: Tensor, deepest: int, rows: int, columns: int
) -> Tensor:
    """Return the weight [rows, columns], zeros as +0.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    return torch.ops.sparc3.unpack_arranged_bitmap(masks, starts, values, deepest, rows, columns)


def arranged_bitmap_linear(
    x: Tensor,
    masks: Tensor,
    starts: Tensor,
    values: Tensor,
    deepest: int,
    rows: int,
    columns: int,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias.

    Args:
        x: [..., columns], dtype and device of `values`.
        masks, starts, values, deepest: W [rows, columns] as `arrange_bitmap` returns it.
        rows, columns: of W.
        bias: [rows], dtype of `x`, or None.

    Returns:
        y [..., rows], dtype of `x`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    return torch.ops.sparc3.arranged_bitmap_linear(x, masks, starts, values, deepest, rows, columns, bias)


def _bits_of(masks: Tensor) -> Tensor:
    """bool [chunks, 32 lanes, 128]: a lane's bits, word by word, the lowest first."""
    octets = masks.view(torch.uint8).view(masks.shape[0], 32, 16)
    return unpack_bits(octets.flatten(), (masks.shape[0], 32, 128))


def _by_rows(elements: Tensor, rows: int, columns: int) -> Tensor:
    """[chunks, 32 lanes, 128] to [rows, columns]."""
    strips, chunks = -(-rows // _STRIP), -(-columns // _CHUNK)
    # strip, chunk, g, t, q, f, upper row or not, j
    parts = elements.view(strips, chunks, 8, 4, 4, 4, 2, 4)
    ordered = parts.permute(0, 6, 2, 1, 4, 3, 5, 7).reshape(strips * _STRIP, chunks * _CHUNK)
    return ordered[:rows, :columns].contiguous()


def _kept(masks: Tensor, rows: int, columns: int) -> Tensor:
    return _by_rows(_bits_of(masks), rows, columns)


def _check_shapes(masks: Tensor, starts: Tensor, values: Tensor, rows: int, columns: int) -> None:
    chunks = -(-rows // _STRIP) * -(-columns // _CHUNK)
    if masks.dtype != torch.int32 or tuple(masks.shape) != (chunks, 32, 4):
        raise ValueError(
            f"masks of a weight [{rows}, {columns}] are int32 [{chunks}, 32, 4], got {masks.dtype} "
            f"{list(masks.shape)}"
        )
    if starts.dtype != torch.int32 or tuple(starts.shape) != (chunks + 1,):
        raise ValueError(
            f"starts of a weight [{rows}, {columns}] are int32 [{chunks + 1}], got {starts.dtype} "
            f"{list(starts.shape)}"
        )
    if values.dim() != 1 or values.dtype not in HALVES or values.numel() % 8:
        raise ValueError(
            f"arranged values are bf16 or fp16 [a multiple of 8], got {values.dtype} {list(values.shape)}"
        )
