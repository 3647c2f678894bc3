"""How faithful circuits of all sizes are, by the protocol of MIB (Mueller et al. 2025, arXiv 2504.13151).

Faithfulness of the circuit of the leading share k is

    f(k) = (m(k) - m(empty)) / (m(model) - m(empty)),

m the mean logit difference; CPR = area under f over k, CMD = area under |1 - f|, both by trapezoids on the grid
``FRACTIONS``. Where the empty model's mean is not below the whole model's there is no scale to measure on, and all
three are NaN. Beside them stands the sparsest circuit that still does the task, by accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Of the full model's accuracy: what a circuit must reach to do the task.
GOAL = 0.9
# Halvings, on a log scale, of the grid's interval in which accuracy falls below the goal: to 3 % of the size.
_HALVINGS = 5


@dataclass(frozen=True)
class Point:
    """A circuit measured on the judging examples.

    Attributes:
        fraction: share of the weights or components that was asked for.
        kept: how many it has.
        logit_difference: mean over examples.
        accuracy: share of the examples on which the right answer is ahead of the wrong one.
        faithfulness: f, see the module; NaN where it is undefined.
    """

    fraction: float
    kept: int
    logit_difference: float
    accuracy: float
    faithfulness: float


def faithfulness(mean: float, full: float, empty: float) -> float:
    """f of a circuit, from mean logit differences of it, the model and the empty circuit; NaN if full <= empty."""
    if not full > empty:
        return math.nan
    return (mean - empty) / (full - empty)


def areas(curve: Sequence[Point]) -> tuple[float, float]:
    """(CPR, CMD): areas under f and under |1 - f| over the fractions of a curve, by trapezoids."""
    x = torch.tensor([point.fraction for point in curve], dtype=torch.float64)
    f = torch.tensor([point.faithfulness for point in curve], dtype=torch.float64)
    return torch.trapezoid(f, x).item(), torch.trapezoid((1 - f).abs(), x).item()


def sparsest(curve: Sequence[Point], goal: float, measure: Callable[[float], Point]) -> Point:
    """The smallest circuit from which on accuracy holds: the grid's, then halving the interval below it."""
    points = sorted(curve, key=lambda point: point.fraction)
    first = len(points) - 1
    while first > 0 and points[first - 1].accuracy >= goal:
        first -= 1
    found = points[first]
    if first == 0:
        return found
    low = points[first - 1]
    for _ in range(_HALVINGS):
        # Few components: the next smaller circuit is the one that failed.
        if found.kept - low.kept <= 1:
            break
        middle = measure((low.fraction * found.fraction) ** 0.5)
        found, low = (middle, low) if middle.accuracy >= goal else (found, middle)
    return found
