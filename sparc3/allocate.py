"""Budgets: which share of each tensor goes, such that the model as a whole loses the share that was asked for.

owl (Yin et al. 2024, arXiv 2310.05175): D = share of a block's Wanda scores above M times their mean; D is brought
to a range of 2 lambda, and a block's share is s + mean(D) - D. M = 5 and lambda = 0.08, the published defaults.
relevance: a tensor's share is what one threshold on the relevance of all weights prunes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sparc3_kernels.select import count_bits

from sparc3.errors import InputError
from sparc3.select import ScoresLike, parse_pattern, select

ALLOCATIONS = ("uniform", "owl", "relevance")
_OUTLIER, _RANGE = 5.0, 0.08


def check_allocation(allocate: str, pattern: str) -> None:
    """InputError for an allocation that is not known or that the pattern leaves no room for."""
    if allocate not in ALLOCATIONS:
        raise InputError(f"allocation {allocate!r} is not known; use {' | '.join(ALLOCATIONS)}")
    if allocate == "uniform":
        return
    if parse_pattern(pattern)[1]:
        raise InputError(
            f"{pattern} fixes the share of every group, so there is nothing to allocate: no hardware runs groups "
            "that keep different numbers. Use --pattern row or layer, or --allocate uniform"
        )
    if pattern == "global":
        raise InputError(
            "pattern global allocates by itself; use --pattern row or layer, or --allocate uniform"
        )


def owl_budgets(scores: Mapping[str, torch.Tensor], sparsity: float, blocks: str) -> dict[str, float]:
    """OWL's share to prune of every tensor.

    Args:
        scores: Wanda's, of the dense model, by state-dict name.
        blocks: path of the decoder blocks (Family.blocks); tensors outside them get ``sparsity``.

    Raises:
        InputError: as ``owl_shares``.
    """
    members: dict[str, list[str]] = {}
    for name in scores:
        if name.startswith(f"{blocks}."):
            members.setdefault(name.removeprefix(f"{blocks}.").split(".")[0], []).append(name)
    shares = owl_shares(
        [outliers([scores[name] for name in names]) for names in members.values()],
        [sum(scores[name].numel() for name in names) for names in members.values()],
        sparsity,
    )
    budgets = dict.fromkeys(scores, sparsity)
    for names, share in zip(members.values(), shares, strict=True):
        budgets |= dict.fromkeys(names, share)
    return budgets


def owl_shares(density: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
    """OWL's share to prune of every block.

    Args:
        density: ``outliers`` of each block.
        sizes: how many weights each block has.

    Raises:
        InputError: a share comes out below 0 or above 1.
    """
    wide, counts = (torch.tensor(values, dtype=torch.float64) for values in (density, sizes))
    width = (wide.max() - wide.min()).clamp_min(torch.finfo(torch.float64).tiny)
    spread = (wide - wide.min()) * (2 * _RANGE / width)
    # The mean by size, so that the model as a whole is exact where blocks differ; the paper's are equal.
    shares = sparsity + (spread * counts).sum() / counts.sum() - spread
    if not ((shares >= 0) & (shares < 1)).all():
        raise InputError(
            f"OWL moves shares by up to {2 * _RANGE}, which sparsity {sparsity} leaves no room for: "
            f"blocks would lose {shares.min():.2f} to {shares.max():.2f}"
        )
    return shares.tolist()


def outliers(scores: Sequence[torch.Tensor]) -> float:
    """Share of a block's scores above M times their mean; a weight that is already zero scores -inf, in OWL zero."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.clamp_min(0).double().sum().item() for score in scores) / count
    return sum(int((score > _OUTLIER * mean).sum()) for score in scores) / count


def relevance_budgets(scores: ScoresLike, sparsity: float) -> dict[str, float]:
    """The share of every tensor that one threshold over all scores prunes."""
    mask = select(scores, sparsity, "global")
    return {name: 1 - count_bits(bits) / scores.tensors[name].numel() for name, bits in mask.bits.items()}
