"""Which weights a mask keeps, from their scores: grouping and counting.

The thresholds come from sparc3_kernels.select: exactly floor(s n + 1/2) of the n weights of a row, a tensor or the
model are pruned (N:M: exactly N of every M kept), the lowest scores first, and among equal scores the one with the
lower index is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from sparc3_kernels.select import pack_bits, select_flat, select_nm, select_rows, select_stream, unpack_bits

from sparc3.errors import InputError
from sparc3.mask import Mask

PATTERNS = ("row", "layer", "global", "N:M")
RANKINGS = ("magnitude", "value")


class ScoresLike(Protocol):
    """What is selected from; see sparc3.scores.Scores."""

    tensors: dict[str, torch.Tensor]
    transposed: frozenset[str]
    fingerprint: dict
    settings: dict


def select(
    scores: ScoresLike,
    sparsity: float | None,
    pattern: str,
    by: str = "magnitude",
    budgets: Mapping[str, float] | None = None,
) -> Mask:
    """The mask that prunes the lowest scores.

    Args:
        scores: tensors [..., out, in] by name; -inf marks a weight that is already zero and goes first.
        sparsity: share to prune, in [0, 1); for N:M None or 1 - N/M.
        pattern: "row" (each output row by itself), "layer" (each tensor), "global" (all tensors as one), or "N:M"
            (N kept of every M along the input).
        by: rank by "magnitude" |score| or by signed "value".
        budgets: for row and layer, the share to prune of each tensor, in [0, 1], in place of ``sparsity`` (see
            sparc3.allocate); ``sparsity`` is then what the whole is recorded under.

    Raises:
        InputError: sparsity or pattern is out of range, N:M does not divide a width, a score is NaN.
    """
    if by not in RANKINGS:
        raise InputError(f"ranking {by!r} is not known; use {' | '.join(RANKINGS)}")
    sparsity = check_sparsity(sparsity, pattern)
    for name, tensor in scores.tensors.items():
        check_width(name, tensor.shape[-1], pattern)
        if tensor.isnan().any():
            raise InputError(f"{name} has NaN scores: {int(tensor.isnan().sum())} of {tensor.numel()}")
    bits, shapes = {}, {}
    if pattern == "global":
        total = sum(tensor.numel() for tensor in scores.tensors.values())
        chosen = select_stream(
            lambda: (ranked(tensor, by).flatten() for tensor in scores.tensors.values()),
            pruned_count(sparsity, total),
        )
    else:
        shares = dict.fromkeys(scores.tensors, sparsity) if budgets is None else budgets
        chosen = (select_within(tensor, shares[name], pattern, by) for name, tensor in scores.tensors.items())
    for (name, tensor), packed in zip(scores.tensors.items(), chosen, strict=True):
        transposed = name in scores.transposed
        bits[name] = as_stored(packed, tensor.shape, transposed)
        shapes[name] = tuple(tensor.mT.shape if transposed else tensor.shape)
    settings = {**scores.settings, "sparsity": sparsity, "pattern": pattern, "by": by}
    settings |= {} if budgets is None else {"budgets": dict(budgets)}
    return Mask(bits, shapes, scores.fingerprint, settings)


def select_within(scores: torch.Tensor, sparsity: float, pattern: str, by: str = "magnitude") -> torch.Tensor:
    """Packed mask over one tensor of scores [..., out, in], for every pattern but "global"."""
    kept, group = parse_pattern(pattern)
    keys = ranked(scores, by)
    if pattern == "layer":
        return select_flat(keys, pruned_count(sparsity, keys.numel()))
    if pattern == "row":
        return select_rows(keys.flatten(0, -2), pruned_count(sparsity, keys.shape[-1]))
    return select_nm(keys.flatten(0, -2), kept, group)


def as_stored(bits: torch.Tensor, shape: Sequence[int], transposed: bool) -> torch.Tensor:
    """A packed mask over scores of ``shape`` [..., out, in] as one over the weight as it is stored."""
    return pack_bits(unpack_bits(bits, shape).mT.contiguous()) if transposed else bits


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(N, M) of an N:M pattern, (0, 0) of the others; InputError for anything else."""
    if pattern in PATTERNS[:3]:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]) <= 32:
        raise InputError(
            f"pattern {pattern!r} is not known; use row, layer, global or N:M with 0 < N < M <= 32, such as 2:4"
        )
    return int(match[1]), int(match[2])


def check_sparsity(sparsity: float | None, pattern: str) -> float:
    """The share to prune, checked against the pattern; InputError where it makes no sense."""
    kept, group = parse_pattern(pattern)
    if group:
        implied = 1 - kept / group
        if sparsity is not None and not math.isclose(sparsity, implied):
            raise InputError(
                f"sparsity {sparsity} contradicts {pattern}, which prunes {implied:.4g}; leave it out"
            )
        return implied
    if sparsity is None or not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity} is not a share of the weights: it must be in [0, 1)")
    return sparsity


def check_width(name: str, width: int, pattern: str) -> None:
    """InputError where an N:M pattern does not divide the inputs of a weight."""
    _, group = parse_pattern(pattern)
    if group and width % group:
        raise InputError(
            f"{pattern} does not divide {name}: its inputs are {width} wide; exclude it or take another M"
        )


def pruned_count(sparsity: float, count: int) -> int:
    """floor(s n + 1/2)."""
    return math.floor(sparsity * count + 0.5)


def ranked(tensor: torch.Tensor, by: str) -> torch.Tensor:
    """Scores such that the lowest are pruned; -inf, of weights that are zero, stays."""
    if by == "value":
        return tensor
    return tensor.abs().masked_fill_(tensor.isneginf(), -torch.inf)
