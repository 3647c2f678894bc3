"""What accumulated relevance A [N, K] says of a weight W [N, K], and the N:M choice straight from it.

============ ==============
reduce       score
============ ==============
signed       A W
abs          A |W|
square       A W^2
token-square A W^2
============ ==============

A weight that is zero scores -inf, so that it is pruned first. The N:M choice keeps, of every m weights that follow
each other in a row, the n whose scores are largest in magnitude; among equal ones the lower index. It reads A and W
once and writes no scores: bits as in `sparc3_kernels.select`, or for 2:4 the two kept values of each group and their
places as 2-bit numbers, lower first, two groups a byte (for bf16: 4 + 2 bytes in and 1.125 out an element).

Triton: elementwise but for the ranks within a group, m comparisons an element. Not yet measured on a GPU.
"""

import torch
from torch import Tensor

from sparc3_kernels import triton_support as support
from sparc3_kernels.backend import choose
from sparc3_kernels.select import select_rows_reference
from sparc3_kernels.triton_support import jit, tl
from sparc3_kernels.weight_relevance import REDUCTIONS

_BLOCK = 1024  # elements a program


# ---- reference


def weight_scores_reference_(acc: Tensor, weight: Tensor, reduce: str) -> None:
    """acc <- score, in plain torch."""
    if reduce == "signed":
        acc *= weight
    elif reduce == "abs":
        acc *= weight.abs()
    else:
        acc *= weight.to(acc.dtype).square()
    acc.masked_fill_(weight == 0, -torch.inf)


def _ranking(acc: Tensor, weight: Tensor, reduce: str) -> Tensor:
    scores = acc.clone()
    weight_scores_reference_(scores, weight, reduce)
    return torch.where(weight == 0, scores, scores.abs())


def choose_nm_reference(acc: Tensor, weight: Tensor, reduce: str, n: int, m: int) -> Tensor:
    """Packed mask of the N:M choice, in plain torch."""
    return select_rows_reference(_ranking(acc, weight, reduce).reshape(-1, m), m - n)


def compress_24_reference(acc: Tensor, weight: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """(kept values, places) of the 2:4 choice, in plain torch."""
    ranking = _ranking(acc, weight, reduce).reshape(-1, 4)
    kept = torch.sort(ranking + 0, dim=-1, descending=True, stable=True).indices[:, :2].sort(-1).values
    values = weight.reshape(-1, 4).gather(1, kept).view(weight.shape[0], -1)
    nibbles = (kept[:, 0] | kept[:, 1] << 2).to(torch.uint8)
    return values, (nibbles[0::2] | nibbles[1::2] << 4).view(weight.shape[0], -1)


# ---- Triton


@jit
def _score(acc, weight, REDUCE: tl.constexpr):
    if REDUCE == "signed":
        score = acc * weight
    elif REDUCE == "abs":
        score = acc * tl.abs(weight)
    else:
        score = acc * (weight * weight)
    return tl.where(weight == 0, float("-inf"), score)


@jit
def _weight_scores_kernel(acc_ptr, weight_ptr, count, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    acc = tl.load(acc_ptr + place, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(acc_ptr + place, _score(acc, weight, REDUCE), mask=inside)


@jit
def _keep(acc_ptr, weight_ptr, place, count, REDUCE: tl.constexpr, n, M: tl.constexpr):
    """(weight, kept) of groups [G, M]: an element is kept if fewer than n of its group come before it."""
    inside = place < count
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    score = _score(tl.load(acc_ptr + place, mask=inside, other=0.0), weight, REDUCE)
    score = tl.where(weight == 0, score, tl.abs(score))
    index = tl.arange(0, M)
    mine, other = score[:, :, None], score[:, None, :]
    earlier = (index[None, :] < index[:, None])[None, :, :]
    before = (other > mine) | ((other == mine) & earlier)
    return weight, inside & (tl.sum(before.to(tl.int32), axis=2) < n)


@jit
def _choose_nm_kernel(
    acc_ptr, weight_ptr, bits_ptr, count, n, REDUCE: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = start + tl.arange(0, BLOCK // M)[:, None] * M + tl.arange(0, M)[None, :]
    _, kept = _keep(acc_ptr, weight_ptr, place, count, REDUCE, n, M)
    bits = tl.reshape(kept.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(bits_ptr + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte < count // 8)


@jit
def _compress_24_kernel(
    acc_ptr, weight_ptr, values_ptr, places_ptr, count, REDUCE: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, 4)
    place = start + tl.arange(0, BLOCK // 4)[:, None] * 4 + index[None, :]
    weight, kept = _keep(acc_ptr, weight_ptr, place, count, REDUCE, 2, 4)
    # Two of four are kept: the first is the least index kept, the second the largest.
    first = tl.min(tl.where(kept, index[None, :], 4), axis=1)
    second = tl.max(tl.where(kept, index[None, :], -1), axis=1)
    lower = tl.sum(tl.where(index[None, :] == first[:, None], weight, 0.0), axis=1)
    upper = tl.sum(tl.where(index[None, :] == second[:, None], weight, 0.0), axis=1)
    group = start // 4 + tl.arange(0, BLOCK // 4)
    value = group[:, None] * 2 + tl.arange(0, 2)[None, :]
    kept_values = tl.join(lower, upper).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + value, kept_values, mask=(group < count // 4)[:, None])
    nibbles = tl.reshape(first | (second << 2), (BLOCK // 8, 2)) << (4 * tl.arange(0, 2))[None, :]
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    tl.store(places_ptr + byte, tl.sum(nibbles, axis=1).to(tl.uint8), mask=byte < count // 8)


def _weight_scores_triton_(acc: Tensor, weight: Tensor, reduce: str) -> None:
    grid = (support.ceil_div(acc.numel(), _BLOCK),)
    support.launch(
        _weight_scores_kernel,
        grid,
        acc,
        weight.contiguous(),
        acc.numel(),
        REDUCE=reduce,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def _choose_nm_triton(acc: Tensor, weight: Tensor, reduce: str, n: int, m: int) -> Tensor:
    bits = torch.empty(acc.numel() // 8, dtype=torch.uint8, device=acc.device)
    grid = (support.ceil_div(acc.numel(), _BLOCK),)
    support.launch(
        _choose_nm_kernel, grid, acc.contiguous(), weight.contiguous(), bits, acc.numel(), n,
        REDUCE=reduce, M=m, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return bits


def _compress_24_triton(acc: Tensor, weight: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    values = torch.empty(rows, columns // 2, dtype=weight.dtype, device=weight.device)
    places = torch.empty(rows, columns // 8, dtype=torch.uint8, device=weight.device)
    grid = (support.ceil_div(acc.numel(), _BLOCK),)
    support.launch(
        _compress_24_kernel, grid, acc.contiguous(), weight.contiguous(), values, places, acc.numel(),
        REDUCE=reduce, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return values, places


def _unfit(acc: Tensor, weight: Tensor, m: int = 4) -> str | None:
    if acc.dtype != torch.float32 or acc.numel() == 0 or acc.numel() % 8 or m not in (2, 4, 8, 16):
        return f"it takes a multiple of 8 fp32 sums and m of 2, 4, 8 or 16, not {acc.numel()} {acc.dtype} and {m}"
    return support.unfit(acc, weight)


# ---- ops

torch.library.define("sparc3::weight_scores_", "(Tensor(a!) acc, Tensor weight, str reduce) -> ()")
torch.library.define("sparc3::choose_nm", "(Tensor acc, Tensor weight, str reduce, int n, int m) -> Tensor")
torch.library.define("sparc3::compress_24", "(Tensor acc, Tensor weight, str reduce) -> (Tensor, Tensor)")


@torch.library.impl("sparc3::weight_scores_", "default")
def _weight_scores(acc: Tensor, weight: Tensor, reduce: str) -> None:
    unfit = None if acc.is_contiguous() else "acc is not contiguous"
    if choose("weight_scores_", {"triton": unfit or _unfit(acc, weight)}) == "triton":
        _weight_scores_triton_(acc, weight, reduce)
    else:
        weight_scores_reference_(acc, weight, reduce)


@torch.library.register_fake("sparc3::weight_scores_")
def _weight_scores_fake(acc: Tensor, weight: Tensor, reduce: str) -> None:
    return None


@torch.library.impl("sparc3::choose_nm", "default")
def _choose_nm(acc: Tensor, weight: Tensor, reduce: str, n: int, m: int) -> Tensor:
    if choose("choose_nm", {"triton": _unfit(acc, weight, m)}) == "triton":
        return _choose_nm_triton(acc, weight, reduce, n, m)
    return choose_nm_reference(acc, weight, reduce, n, m)


@torch.library.register_fake("sparc3::choose_nm")
def _choose_nm_fake(acc: Tensor, weight: Tensor, reduce: str, n: int, m: int) -> Tensor:
    return acc.new_empty((acc.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.impl("sparc3::compress_24", "default")
def _compress_24(acc: Tensor, weight: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    if choose("compress_24", {"triton": _unfit(acc, weight)}) == "triton":
        return _compress_24_triton(acc, weight, reduce)
    return compress_24_reference(acc, weight, reduce)


@torch.library.register_fake("sparc3::compress_24")
def _compress_24_fake(acc: Tensor, weight: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    return weight.new_empty(rows, columns // 2), weight.new_empty(rows, columns // 8, dtype=torch.uint8)


def weight_scores_(acc: Tensor, weight: Tensor, reduce: str) -> Tensor:
    """Turn accumulated relevance into scores, in place, and return it.

    Args:
        acc: [...] fp32 (fp64 on the reference backend), from `accumulate_weight_relevance_`.
        weight: [...] the weight, any float dtype.
        reduce: what acc was accumulated with, one of `REDUCTIONS`.

    Raises:
        ValueError: unknown `reduce`, or shapes that differ.
    """
    _check(acc, weight, reduce)
    torch.ops.sparc3.weight_scores_(acc, weight, reduce)
    return acc


def choose_nm(acc: Tensor, weight: Tensor, reduce: str, n: int, m: int) -> Tensor:
    """Packed mask, uint8 [ceil(N K / 8)], that keeps n of every m weights of a row; see the module's text.

    Args:
        acc: [N, K] fp32, not NaN; left as it is.
        weight: [N, K].
        reduce: one of `REDUCTIONS`.
        n, m: 0 <= n <= m, m divides K.

    Raises:
        ValueError: unknown `reduce`, shapes that differ, or n and m that do not fit.
    """
    _check(acc, weight, reduce)
    if not 0 <= n <= m or m < 1 or acc.shape[-1] % m:
        raise ValueError(
            f"n:m needs 0 <= n <= m and rows of a multiple of m, got {n}:{m} and {acc.shape[-1]}"
        )
    return torch.ops.sparc3.choose_nm(acc, weight, reduce, n, m)


def compress_24(acc: Tensor, weight: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """(values [N, K / 2] in the weight's dtype, places uint8 [N, K / 8]) of the 2:4 choice.

    Byte b of a row holds groups 2 b (lower four bits) and 2 b + 1: first place in two bits, second in the next two.

    Raises:
        ValueError: as `choose_nm`; K must be a multiple of 8.
    """
    _check(acc, weight, reduce)
    if acc.dim() != 2 or acc.shape[1] % 8:
        raise ValueError(f"2:4 values need [N, K] with K a multiple of 8, got {list(acc.shape)}")
    return torch.ops.sparc3.compress_24(acc, weight, reduce)


def _check(acc: Tensor, weight: Tensor, reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if acc.shape != weight.shape:
        raise ValueError(
            f"acc and weight must have one shape, got {list(acc.shape)} and {list(weight.shape)}"
        )
