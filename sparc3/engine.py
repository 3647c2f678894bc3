"""The one engine: forward through the decoder blocks keeping what each block received, backward in reverse.

It goes through the model layer by layer: all batches through one block before the next. Where a block's weights come
from (sparc3.weights) and where what the blocks received is kept (sparc3.boundaries) are policies, and so are keeping
or recomputing a block's activations and every boundary or one in so many; all give the same relevance, bit by bit.

The embedding, the masks and the rotary tables come from running the model below its LM head once with pass-through
blocks; the logits come from running all of it with blocks that hand the last block's output on, a chunk of positions
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from sparc3.boundaries import Boundaries, InMemory
from sparc3.families import blocks_of
from sparc3.head import target_gradient
from sparc3.targets import Batch, TargetFunction
from sparc3.weights import Resident, WeightSource


class Blocks:
    """A causal language model as a sequence of blocks that can be run one by one, with bit-equal logits.

    Attributes:
        source: brings the weights of a block while it is run, and those outside of the blocks.
    """

    def __init__(self, model: PreTrainedModel, source: WeightSource | None = None) -> None:
        self.model = model
        self.blocks = list(blocks_of(model))
        self.source = Resident() if source is None else source
        self.passing_through = False

    def record(self, batch: Batch) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
        """(hidden [B, T, D] that the first block receives, what else each block is called with)."""
        calls: list[tuple[tuple, dict]] = [((), {}) for _ in self.blocks]
        received: list[torch.Tensor] = []

        def stub(index: int) -> Any:
            def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if not received:
                    received.append(hidden)
                calls[index] = (args, kwargs)
                return hidden

            return forward

        with torch.no_grad(), self._replaced(stub):
            # Without the LM head: even one position's logits read all of it.
            self.model.base_model(**model_inputs(batch), use_cache=False)
        return received[0], calls

    def run(self, index: int, hidden: torch.Tensor, call: tuple[tuple, dict]) -> torch.Tensor:
        """The output of one block, [B, T, D]."""
        output = self.blocks[index](hidden, *call[0], **call[1])
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: torch.Tensor, batch: Batch, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, C, V] at positions [C], from the last block's output [B, T, D]."""
        last = len(self.blocks) - 1

        def stub(index: int) -> Any:
            return lambda received, *args, **kwargs: hidden if index == last else received

        with self._replaced(stub):
            return self.model(**model_inputs(batch), use_cache=False, logits_to_keep=positions).logits

    @contextmanager
    def _replaced(self, stub: Any) -> Iterator[None]:
        previous = [block.__dict__.get("forward") for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = stub(index)
        self.passing_through = True
        try:
            yield
        finally:
            self.passing_through = False
            for block, forward in zip(self.blocks, previous, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """What a model is called with: input_ids, attention_mask and, where there is padding, position_ids."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    mask = batch.get("attention_mask")
    if mask is not None and "position_ids" not in batch and not mask.all():
        # As generate() does: learned positions (GPT-2) would otherwise count the padding on the left.
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


# Where attribute_batches leaves the gradients that enter the blocks, in place of an index.
GRADIENT = -1


class Visitor(Protocol):
    """What attribute_batches tells on its way backwards."""

    def batch(self, number: int) -> None:
        """Relevance of the weights that comes next is of this batch."""

    def explained(self, number: int, value: torch.Tensor) -> None:
        """The explained scalars [B] of a batch."""

    def enter(self, index: int) -> None:
        """A block, or for the number of blocks all above them, is begun; its weights are there."""

    def done(self, index: int) -> None:
        """All batches went back through it; its weights are still there."""


@dataclass(frozen=True)
class Resume:
    """Where to go on: boundaries hold the GRADIENT of every batch at the output of block ``depth`` - 1."""

    depth: int


def attribute_batches(
    blocks: Blocks,
    batches: Sequence[Batch],
    target: str | TargetFunction,
    positions: str = "all",
    *,
    boundaries: Boundaries | None = None,
    spacing: int | None = None,
    memory: int | None = None,
    visitor: Visitor | None = None,
    resume: Resume | None = None,
) -> None:
    """Run all batches forward and backward, block by block.

    Weights' relevance goes to the sink of the surrounding ``wrap``. Afterwards ``boundaries`` hold the embedded input
    of batch n under (0, n) and its gradient under (GRADIENT, n), both [B, T, D].

    Args:
        blocks: of a wrapped model.
        batches: input_ids [B, T], attention_mask [B, T], optionally labels [B, T].
        target, positions: see sparc3.targets.
        boundaries: where what each block received is kept; None: in memory.
        spacing: what every ``spacing``-th block received is kept, and the blocks between are run forward again; the
            square root of the number of blocks holds fewest. None: all is kept.
        memory: bytes that kept activations may take; None: half of what is free; 0: recompute every block. They hold
            weights too, so it is 0 where the source takes them away.
        visitor: is told of each step.
        resume: leave out the blocks that were done before.
    """
    store = InMemory() if boundaries is None else boundaries
    depth = len(blocks.blocks) if resume is None else resume.depth
    graphs = _Graphs(blocks, memory)
    with blocks.source.outside():
        calls: list[list[tuple[tuple, dict]]] = []
        for number, batch in enumerate(batches):
            hidden, call = blocks.record(batch)
            store.put((0, number), hidden)
            calls.append(_shared(call, calls[-1] if calls else None))

    def forward(indices: range, keep_inner: bool, keep_graphs: bool) -> None:
        for index in blocks.source.visit(indices):
            for number in range(len(batches)):
                received = store.get((index, number))
                output = graphs.run(index, number, received, calls[number][index], keep_graphs)
                store.put((index + 1, number), output)
                if not keep_inner and index > indices.start:
                    store.drop((index, number))

    step = spacing or depth
    segments = [range(start, min(start + step, depth)) for start in range(0, depth, step)]
    for segment in segments:
        last = segment is segments[-1]
        forward(segment if last and resume is None else segment[: len(segment) - last], last, last)
    if resume is None:
        _explain(blocks, batches, target, positions, store, visitor)
    for segment in reversed(segments):
        if segment is not segments[-1]:
            forward(segment[:-1], True, False)
        for index in blocks.source.visit(segment[::-1]):
            if visitor is not None:
                visitor.enter(index)
            for number in range(len(batches)):
                if visitor is not None:
                    visitor.batch(number)
                received, output = graphs.take(index, number, store, calls[number][index])
                gradient = store.get((GRADIENT, number))
                (gradient,) = torch.autograd.grad(output, received, gradient)
                del received, output
                store.put((GRADIENT, number), gradient)
                if index:
                    store.drop((index, number))
            if visitor is not None:
                visitor.done(index)


def attribute_batch(
    blocks: Blocks,
    batch: Batch,
    target: str | TargetFunction,
    positions: str = "all",
    memory: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One batch through ``attribute_batches``.

    Returns:
        (explained scalar [B], embedded input [B, T, D], its gradient [B, T, D]).
    """
    boundaries, values = InMemory(), _Values()
    attribute_batches(
        blocks, [batch], target, positions, boundaries=boundaries, memory=memory, visitor=values
    )
    return values.found[0], boundaries.get((0, 0)), boundaries.get((GRADIENT, 0))


class _Values:
    """A visitor that keeps the explained scalars."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def batch(self, number: int) -> None:
        pass

    def explained(self, number: int, value: torch.Tensor) -> None:
        self.found.append(value)

    def enter(self, index: int) -> None:
        pass

    def done(self, index: int) -> None:
        pass


class _Graphs:
    """Blocks' outputs with their graphs, kept as far as memory goes and made again where they were not."""

    def __init__(self, blocks: Blocks, memory: int | None) -> None:
        self.blocks, self.memory = blocks, memory
        self.one = 0  # bytes that a block's graph holds; known after the first
        self.kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, index: int, number: int, received: torch.Tensor, call: Any, keep: bool) -> torch.Tensor:
        """A block's output, detached."""
        if self.memory is None:
            self.memory = free_memory(received.device) // 2
        keep = keep and self.memory > self.one
        received = received.detach().requires_grad_(keep)
        with torch.set_grad_enabled(keep), _count_saved(keep and not self.one) as saved:
            output = self.blocks.run(index, received, call)
        self.one = self.one or saved.bytes
        if keep:
            self.memory -= self.one
            self.kept[index, number] = received, output
        return output.detach()

    def take(
        self, index: int, number: int, store: Boundaries, call: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what a block received, its output with the graph)."""
        if (index, number) in self.kept:
            return self.kept.pop((index, number))
        received = store.get((index, number)).detach().requires_grad_()
        with torch.enable_grad():
            return received, self.blocks.run(index, received, call)


def _explain(
    blocks: Blocks,
    batches: Sequence[Batch],
    target: str | TargetFunction,
    positions: str,
    store: Boundaries,
    visitor: Visitor | None,
) -> None:
    """Replace the last block's outputs by their gradients."""
    depth = len(blocks.blocks)
    with blocks.source.outside():
        if visitor is not None:
            visitor.enter(depth)
        for number, batch in enumerate(batches):
            if visitor is not None:
                visitor.batch(number)
            value, gradient = target_gradient(blocks, store.get((depth, number)), batch, target, positions)
            store.drop((depth, number))
            store.put((GRADIENT, number), gradient)
            if visitor is not None:
                visitor.explained(number, value)
        if visitor is not None:
            visitor.done(depth)


def _shared(
    calls: list[tuple[tuple, dict]], others: list[tuple[tuple, dict]] | None
) -> list[tuple[tuple, dict]]:
    """``calls`` with the tensors of ``others`` where these are equal: most batches have the same masks and tables."""
    same: dict[int, Any] = {}

    def share(mine: Any, theirs: Any) -> Any:
        if isinstance(mine, torch.Tensor):
            if id(mine) not in same:
                equal = isinstance(theirs, torch.Tensor) and mine.dtype == theirs.dtype
                same[id(mine)] = theirs if equal and torch.equal(mine, theirs) else mine
            return same[id(mine)]
        if isinstance(mine, tuple | list) and isinstance(theirs, tuple | list) and len(mine) == len(theirs):
            return type(mine)(share(one, other) for one, other in zip(mine, theirs, strict=True))
        if isinstance(mine, dict) and isinstance(theirs, dict):
            return {key: share(value, theirs.get(key)) for key, value in mine.items()}
        return mine

    return calls if others is None else share(calls, others)


def free_memory(device: torch.device) -> int:
    """Bytes free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class _Saved:
    bytes = 0


@contextmanager
def _count_saved(active: bool) -> Iterator[_Saved]:
    """Counts the bytes of the storages that autograd saves, once each, parameters left out."""
    saved, seen = _Saved(), set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved.bytes += storage.nbytes()
        return tensor

    if not active:
        yield saved
        return
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
