"""Where a model's weights are while a block is run: in memory for good, or read block by block from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class WeightSource(Protocol):
    """Brings weights into a model, and takes them away again."""

    def visit(self, indices: Sequence[int]) -> Iterator[int]:
        """The indices in turn, each while the weights of its block are in the model."""

    def outside(self) -> AbstractContextManager[None]:
        """Within the context the weights outside of the blocks (embeddings, last norm, LM head) are in the model."""


class Resident:
    """The whole model is in memory."""

    def visit(self, indices: Sequence[int]) -> Iterator[int]:
        yield from indices

    def outside(self) -> AbstractContextManager[None]:
        return nullcontext()
