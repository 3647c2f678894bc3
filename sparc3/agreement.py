"""How well scores of components agree with what their exact ablation costs."""

from __future__ import annotations

import torch


def agreement(scores: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How scores [n] of components agree with exact ablation.

    Returns:
        pearson, spearman, and pearson_without_two: without the two components of the largest |exact|, which
        otherwise make a correlation by themselves. NaN where one side does not vary, or fewer than three are left.
    """
    scores, exact = scores.double(), exact.double()
    others = torch.argsort(exact.abs(), descending=True, stable=True)[2:]
    return {
        "pearson": _pearson(scores, exact),
        "spearman": _pearson(_ranks(scores), _ranks(exact)),
        "pearson_without_two": _pearson(scores[others], exact[others]) if len(others) > 2 else float("nan"),
    }


def _pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    if len(a) < 2:
        return float("nan")
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks, the mean of their places for equal values."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
