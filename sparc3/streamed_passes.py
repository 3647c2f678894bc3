"""Passes over a model that is read block by block (sparc3.passes), each going on from where it was broken off.

Each pass tells what it found about a block to ``take``, while the block's weights are there; ``take`` leaves the file
that says that the block is done (sparc3.pieces). An index is a block's, their number that of what is outside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from sparc3.boundaries import Boundaries, InMemory, OnDisk
from sparc3.engine import GRADIENT, Blocks, Resume, attribute_batches
from sparc3.families import Prunable
from sparc3.pieces import Pieces, state_shapes
from sparc3.plan import Plan
from sparc3.ranks import Ranks
from sparc3.rules import Rule
from sparc3.samples import Batch
from sparc3.schedules import Visitor, sweep
from sparc3.scores import Accumulators, batches_on, check_explained
from sparc3.unfinished import Unfinished
from sparc3.weights import Streamed
from sparc3.wrap import wrap

# (index, scores [..., out, in] by name)
Take = Callable[[int, dict[str, torch.Tensor]], None]


class Passes:
    """The passes of one run.

    Args:
        source: the model, empty, and its checkpoint.
        weights: those to prune.
        names: {index: names of its weights}, in model order.
        samples: as in sparc3.prune.
        ranks: this process among those that share the samples; each makes the same passes in the same order, and
            only the one that writes is told what they find.
    """

    def __init__(
        self,
        source: Streamed,
        weights: Mapping[str, Prunable],
        names: Mapping[int, Sequence[str]],
        run: Unfinished,
        plan: Plan,
        samples: torch.Tensor | Sequence[Batch],
        ranks: Ranks,
    ) -> None:
        self.source, self.weights, self.names = source, weights, names
        self.run, self.plan, self.samples, self.ranks = run, plan, samples, ranks
        self.depth = len(names) - 1

    def pieces(self, name: str, upwards: bool = True) -> Pieces:
        return Pieces(self.run, name, self.depth, upwards)

    @cached_property
    def batches(self) -> list[Batch]:
        """All of them, also those of other processes."""
        return batches_on(self.source.device, self.samples)

    def is_over(self, pieces: Pieces) -> bool:
        """Whether a pass came to its end; what it could go on from is removed then."""
        over = self.ranks.told(not pieces.left())
        if over:
            pieces.forget_states(self.ranks.rank, over=True)
        return over

    def backward(self, pieces: Pieces, rule: Rule, settings: Mapping[str, Any], take: Take) -> None:
        """Score by relevance or the gradient, from the last block down to the first.

        Args:
            settings: target, positions, reduce and skip_first of sparc3.attribute.
        """
        if self.is_over(pieces):
            return
        batches = list(self.ranks.share(self.batches))
        skip_first = settings.get("skip_first", False)
        sink = Accumulators(self.weights, settings.get("reduce", "abs"), skip_first, held=())
        boundaries = self._boundaries()
        depth = self.ranks.told(pieces.last_done())
        if depth is not None:
            for number, gradient in enumerate(pieces.load_state(depth, self.ranks.rank)):
                boundaries.put((GRADIENT, number), gradient.to(self.source.device))
        with wrap(self.source.model, rule, self.weights, sink):
            attribute_batches(
                Blocks(self.source.model, self.source),
                batches,
                settings.get("target", "logprob"),
                settings.get("positions", "all"),
                boundaries=boundaries,
                spacing=self.plan.spacing,
                memory=0,
                visitor=_Backward(self, batches, sink, boundaries, pieces, take),
                resume=None if depth is None else Resume(depth),
            )
        self.is_over(pieces)

    def sweep(
        self,
        pieces: Pieces,
        visit: Visitor,
        take: Callable[[int], None],
        gram: bool = False,
        prunes: bool = True,
    ) -> None:
        """From the first block up; ``visit`` as in sparc3.schedules.sweep, then ``take`` for the whole block."""
        if self.is_over(pieces):
            return
        batches = self.ranks.deal(self.batches)
        last = self.ranks.told(pieces.last_done())

        def done(index: int, outputs: list[torch.Tensor]) -> None:
            self.save_state(pieces, index, outputs, batches)
            # What the writer calls done, every one can resume from.
            self.ranks.wait()
            if self.ranks.writes:
                take(index)
            pieces.forget_states(self.ranks.rank)

        sweep(
            self.source.model,
            self.batches,
            self.weights,
            visit,
            gram=gram,
            source=self.source,
            home=torch.device("cpu"),
            done=done,
            start=0 if last is None else last + 1,
            received=() if last is None else list(pieces.load_state(last, self.ranks.rank)),
            ranks=self.ranks,
            prunes=prunes,
        )
        self.is_over(pieces)

    def visit(self, indices: Sequence[int], take: Callable[[int], None]) -> None:
        """Each of some blocks, without samples."""
        for index in self.source.visit([index for index in indices if index < self.depth]):
            take(index)
        if self.depth in indices:
            with self.source.outside():
                take(self.depth)

    def save_state(
        self, pieces: Pieces, index: int, tensors: Iterable[torch.Tensor], batches: Sequence[Batch]
    ) -> None:
        model = self.source.model
        shapes = state_shapes(batches, model.config.hidden_size, model.dtype)
        pieces.save_state(index, tensors, shapes, self.ranks.rank)

    def _boundaries(self) -> Boundaries:
        if not self.plan.on_disk:
            return InMemory(torch.device("cpu"))
        folder = self.run.scratch / f"boundaries-{self.ranks.rank}"
        folder.mkdir(exist_ok=True)
        for left in folder.iterdir():
            left.unlink()
        return OnDisk(folder)


class _Backward:
    """Takes a block's scores when all batches went back through it (a sparc3.engine.Visitor)."""

    def __init__(
        self,
        passes: Passes,
        batches: Sequence[Batch],
        sink: Accumulators,
        boundaries: Boundaries,
        pieces: Pieces,
        take: Take,
    ) -> None:
        self.passes, self.batches, self.sink = passes, batches, sink
        self.boundaries, self.pieces, self.take = boundaries, pieces, take
        self.ranks = passes.ranks

    def batch(self, number: int) -> None:
        self.sink.start(self.batches[number])

    def explained(self, number: int, value: torch.Tensor) -> None:
        check_explained(value)

    def enter(self, index: int) -> None:
        self.sink.hold(self.passes.names[index])
        self.ranks.receive(self.sink.sums.values())

    def done(self, index: int) -> None:
        # Before the sums go on: what the last process calls done, every one can resume from.
        gradients = (self.boundaries.get((GRADIENT, number)) for number in range(len(self.batches)))
        self.passes.save_state(self.pieces, index, gradients, self.batches)
        self.ranks.send(self.sink.sums.values())
        if self.ranks.writes:
            self.take(index, self.sink.take())
        else:
            self.sink.sums = {}
        self.pieces.forget_states(self.ranks.rank)
