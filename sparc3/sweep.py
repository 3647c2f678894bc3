"""A sweep over how many weights or components are removed: what was measured at each number, and which is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparc3.continuations import Continuation

POINTS = 6
# Where a sweep that is not told otherwise ends, as a share; and how many times that it goes on to within the budget.
SHARES = {"weight": 0.001, "neuron": 0.005, "head": 0.1}
BEYOND = (2, 4, 8)


@dataclass(frozen=True)
class Measured:
    """A model on the judging prompts and on general text.

    Attributes:
        count, fraction: removed weights or components, and their share.
        shown: share of the continuations that show the behaviour.
        score: their mean score.
        length: their mean length in tokens; distinct: their mean share of different tokens.
        perplexity: of the judging windows of general text; increase: over the whole model's, as a share of it.
        said: the continuations.
    """

    count: int
    fraction: float
    shown: float
    score: float
    length: float
    distinct: float
    perplexity: float
    increase: float
    said: tuple[Continuation, ...] = field(repr=False)

    def described(self) -> dict[str, Any]:
        """All but the continuations, as plain JSON values."""
        return {name: value for name, value in vars(self).items() if name != "said"}


def halvings(last: int, points: int = POINTS) -> list[int]:
    """Up to ``points`` numbers that end with ``last``, each half the next, ascending."""
    return sorted({max(1, round(last / 2**step)) for step in range(points)})


def goes_on(sweep: Sequence[Measured], budget: float) -> bool:
    """Whether more may be removed: all of a sweep keeps to the budget, and the behaviour is still shown."""
    return bool(sweep) and within_budget(sweep, budget) is sweep[-1] and sweep[-1].shown > 0


def within_budget(sweep: Sequence[Measured], budget: float) -> Measured | None:
    """The largest N that keeps to the budget, as all smaller ones do; None where the smallest does not."""
    chosen = None
    for point in sorted(sweep, key=lambda point: point.count):
        if not point.increase <= budget:
            break
        chosen = point
    return chosen
