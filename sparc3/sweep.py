"""A sweep over how many weights or components are removed: what was measured at each number, and which is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sparc3.continuations import Continuation

POINTS = 6
# Where a sweep that is not told otherwise ends, as a share; and how many times that it goes on to within the budget.
SHARES = {"weight": 0.001, "neuron": 0.005, "head": 0.1}
BEYOND = (2, 4, 8)
# How often the gap is halved between the largest number within the budget and the next.
REFINED = 3

Ranked = TypeVar("Ranked")


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


def swept(
    counts: Sequence[int],
    total: int | None,
    budget: float | None,
    spared: Callable[[int], tuple[Ranked, int]],
    measure: Callable[[Ranked, int], Measured],
) -> tuple[list[Measured], Ranked]:
    """Measure ``counts``, and others that come closer to what the budget allows.

    These are ``BEYOND`` times the largest of ``counts``, while all keep to the budget and the behaviour is shown;
    then, ``REFINED`` times, the middle between the largest within the budget and the next.

    Args:
        counts: what is measured in any case.
        total: all that others must be below; None: ``counts`` alone are measured.
        budget: of the increase of perplexity, as 0.01; None: ``counts`` alone.
        spared: (how to remove so many, how many of them can be afforded); called once for ``counts``, for each other
            number anew, so that what goes of a smaller number need not be among what goes of a larger one.
        measure: remove so many and measure.

    Returns:
        (what was measured, ascending; how the largest number within the budget was removed).
    """
    last = max(counts)
    ranked, afforded = spared(last)
    sweep = [measure(ranked, count) for count in sorted({min(count, afforded) for count in counts} - {0})]
    if budget is None or total is None:
        return sweep, ranked

    def further(count: int, low: int) -> bool:
        nonlocal ranked
        found, afforded = spared(count)
        if afforded > low:
            sweep.append(measure(found, afforded))
            ranked = found if sweep[-1].increase <= budget else ranked
        return afforded > low

    for times in BEYOND:
        fits = times * last < total and _goes_on(sweep, budget)
        if not (fits and further(times * last, sweep[-1].count)):
            break
    for _ in range(REFINED):
        gap = _gap(sweep, budget)
        if gap is None or not further(sum(gap) // 2, gap[0]):
            break
    return sorted(sweep, key=lambda point: point.count), ranked


def _goes_on(sweep: Sequence[Measured], budget: float) -> bool:
    """Whether more may be removed: all of a sweep keeps to the budget, and the behaviour is still shown."""
    return bool(sweep) and within_budget(sweep, budget) is sweep[-1] and sweep[-1].shown > 0


def _gap(sweep: Sequence[Measured], budget: float) -> tuple[int, int] | None:
    """(The largest N within the budget, the next measured), where the behaviour is shown and others lie between."""
    chosen = within_budget(sweep, budget)
    if chosen is None or chosen.shown == 0:
        return None
    above = min((point.count for point in sweep if point.count > chosen.count), default=0)
    return (chosen.count, above) if above > chosen.count + 1 else None


def within_budget(sweep: Sequence[Measured], budget: float) -> Measured | None:
    """The largest N that keeps to the budget, as all smaller ones do; None where the smallest does not."""
    chosen = None
    for point in sorted(sweep, key=lambda point: point.count):
        if not point.increase <= budget:
            break
        chosen = point
    return chosen
