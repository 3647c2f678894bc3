"""Exact selection: which weights to keep, given one score each.

The `prune` lowest of n scores are pruned: exactly so many, and among equal scores the lower linear index is
kept. -0 and +0 are equal, +-inf are ordinary values, NaN is an error. A result is a packed mask, `bits`:
uint8 [ceil(n / 8)] over the row-major flattened scores, element i at `bits[i >> 3] >> (i & 7) & 1`, 1 = kept,
padding bits 0.

The reference is a stable sort. The CPU library finds the threshold with two counting passes, over the upper
and the lower 16 bits of a monotone 32-bit key (one pass for 16-bit scores): the radix select of Alabi et al.
2012, "Fast k-selection algorithms for graphics processing units", with a radix of 2^16.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Multiplying eight 0/1 bytes by this moves byte i to bit 56 + i, all products landing on distinct bits.
_GATHER_BITS = 0x0102040810204080


def pack_bits(keep: Tensor) -> Tensor:
    """Pack a bool tensor of any shape (n elements) into uint8 [ceil(n / 8)], lowest bit first."""
    flat = torch.nn.functional.pad(keep.reshape(-1).view(torch.uint8), (0, -keep.numel() % 8))
    return (flat.view(torch.int64) * _GATHER_BITS >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack uint8 [ceil(n / 8)] into a bool tensor of `shape` (n elements); True = kept.

    Raises:
        ValueError: `bits` is not uint8 or its length is not that of `shape`.
    """
    n = torch.Size(shape).numel()
    if bits.dtype != torch.uint8 or bits.numel() != (n + 7) // 8:
        raise ValueError(
            f"a packed mask for shape {tuple(shape)} is uint8 [{(n + 7) // 8}], "
            f"got {bits.dtype} [{bits.numel()}]"
        )
    place = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.reshape(-1, 1) & place).ne(0).view(-1)[:n].view(shape)


def apply_bits_(weight: Tensor, bits: Tensor) -> Tensor:
    """Set the pruned entries of `weight` (any shape, strides and float dtype) to +0 in place and return it.

    Kept entries are not touched. Raises ValueError where `bits` does not fit `weight`.
    """
    with torch.no_grad():
        return weight.masked_fill_(~unpack_bits(bits, weight.shape), 0)


def count_bits(bits: Tensor) -> int:
    """Return the number of kept entries of a packed mask."""
    pairs = bits - (bits >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return int((fours + (fours >> 4) & 0x0F).sum(dtype=torch.int64))


def select_rows_reference(scores: Tensor, prune: int) -> Tensor:
    """Plain torch `select_rows`: a stable descending sort keeps the first C - prune of each row."""
    # Adding 0 turns -0 into +0, so that a bitwise sort (CUDA) cannot order the two zeros.
    order = torch.sort(scores + 0, dim=-1, descending=True, stable=True).indices
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep.scatter_(-1, order[:, scores.shape[-1] - prune :], False)
    return pack_bits(keep)


def select_flat(scores: Tensor, prune: int) -> Tensor:
    """Prune the `prune` lowest of all n scores (any shape, in row-major order).

    Returns:
        packed mask, uint8 [ceil(n / 8)].

    Raises:
        ValueError: a score is NaN, or not 0 <= prune <= n.
    """
    _check(scores, prune, scores.numel(), "scores")
    return select_rows_reference(scores.reshape(1, -1), prune)


def select_rows(scores: Tensor, prune: int) -> Tensor:
    """Prune the `prune` lowest of the C scores of each row of `scores` [R, C].

    Returns:
        packed mask over the flattened tensor, uint8 [ceil(R * C / 8)].

    Raises:
        ValueError: a score is NaN, `scores` is not 2-D, or not 0 <= prune <= C.
    """
    _check_matrix(scores)
    _check(scores, prune, scores.shape[1], "scores of a row")
    return select_rows_reference(scores, prune)


def select_nm(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores along the rows of `scores` [R, C]; m <= 32.

    Returns:
        packed mask over the flattened tensor, uint8 [ceil(R * C / 8)].

    Raises:
        ValueError: a score is NaN, `scores` is not 2-D, not 0 <= n <= m, m > 32, or m does not divide C.
    """
    _check_matrix(scores)
    if not (0 <= n <= m and 1 <= m <= 32):
        raise ValueError(f"{n}:{m} needs 0 <= N <= M and 1 <= M <= 32")
    if scores.shape[1] % m:
        raise ValueError(f"{n}:{m} does not divide a row of {scores.shape[1]} scores; choose an M that does")
    _check(scores, m - n, m, "scores of a group")
    return select_rows_reference(scores.reshape(-1, m), m - n)


def select_stream(chunks: Callable[[], Iterable[Tensor]], prune: int) -> Iterator[Tensor]:
    """Prune the `prune` lowest scores over several tensors, taken in their order as one long row.

    Args:
        chunks: each call returns a fresh iterable over the same tensors (any shapes, one dtype). It is called
            once per pass; no more than one tensor is held at a time (the reference backend holds all).
        prune: how many to prune over all tensors.

    Yields:
        one packed mask per tensor, each starting at a byte of its own.

    Raises:
        ValueError: a score is NaN, dtypes differ, or not 0 <= prune <= n.
    """
    scores = list(chunks())
    flat = torch.cat([chunk.reshape(-1) for chunk in scores]) if scores else torch.empty(0)
    keep = unpack_bits(select_flat(flat, prune), flat.shape)
    for part in keep.split([chunk.numel() for chunk in scores]):
        yield pack_bits(part)


def _check_matrix(scores: Tensor) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores must be a matrix [R, C], got shape {tuple(scores.shape)}")


def _check(scores: Tensor, prune: int, n: int, what: str) -> None:
    if not 0 <= prune <= n:
        raise ValueError(f"cannot prune {prune} of {n} {what}")
    nan = scores.isnan()
    if count := int(nan.sum()):
        first = int(nan.reshape(-1).to(torch.uint8).argmax())
        raise ValueError(f"{count} of {scores.numel()} scores are NaN, the first at linear index {first}")
