"""Spare what costs text in general more than its share, by measuring groups and halving those that cost too much.

Relevance is of first order: it says what a small change does, and to remove a neuron or weight is no small one. Some
of the lowest cost general text far more than their scores say. Why is not settled: massive activations that later
norms divide by (arXiv 2402.17762) may be the cause. Runs without them find them whatever it is: of k such among N,
some k log2(N) runs do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sparc3.families import Prunable

# Of the number asked for: how far down the order candidates are looked for, and the size of a first group.
DEPTH, _FIRST = 4, 0.25
# Of the number asked for: groups are halved down to this share, or to one.
_SMALLEST = 1 / 64


def affordable(
    order: torch.Tensor,
    count: int,
    cost: Callable[[torch.Tensor], float],
    budget: float,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The first ``count`` of ``order`` [m] that may go; fewer where no more can be afforded.

    Args:
        order: indices, the first to go first.
        cost: of removing the indices that it is given, in nats a token over removing none.
        budget: of all ``count``; a group of g may cost g / count of it on top of those accepted before.
        progress: called before each run with the number of those accepted.

    Returns:
        Indices in the order of ``order``.
    """
    accepted, spent, place = order[:0], 0.0, 0
    smallest = max(1, int(_SMALLEST * count))
    while len(accepted) < count and place < min(len(order), DEPTH * count):
        group = order[place : place + min(max(1, int(_FIRST * count)), count - len(accepted))]
        place += len(group)
        groups = [group]
        while groups:
            group = groups.pop(0)
            if progress is not None:
                progress(len(accepted))
            total = cost(torch.cat([accepted, group]))
            # Not greater: a model that breaks has a cost of NaN.
            if total - spent <= budget * len(group) / count:
                accepted, spent = torch.cat([accepted, group]), total
            elif len(group) > smallest:
                half = len(group) // 2
                groups[:0] = [group[:half], group[half:]]
    return accepted


@contextmanager
def zeroed(weights: Sequence[Prunable], removed: torch.Tensor) -> Iterator[None]:
    """Within the context some weights are zero; they come back after, bit for bit.

    Args:
        weights: numbered one after another, each in the order of its canonical form [..., out, in].
        removed: [m] int64, which.
    """
    changed = []
    start = 0
    for weight in weights:
        tensor = weight.canonical(weight.weight).detach()
        own = removed[(removed >= start) & (removed < start + tensor.numel())] - start
        start += tensor.numel()
        at = torch.unravel_index(own, tensor.shape)
        changed.append((tensor, at, tensor[at].clone()))
        tensor[at] = 0
    try:
        yield
    finally:
        for tensor, at, values in changed:
            tensor[at] = values
