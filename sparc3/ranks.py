"""Many processes on torch.distributed: each takes a share of the batches, and sums pass from one to the next.

The accumulators of a block start at rank 0, which adds what its batches give and hands them to rank 1 while it turns
to the next block, and so on; the last rank holds the sums of all batches, selects and writes. Floating-point sums
depend on their order, and this is the order in which one process adds: the masks are equal bit by bit, at the same
number of threads. The ranks work at different blocks at the same time, so that N ranks over L blocks lose N - 1 turns
in L.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from sparc3.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the one that selects and writes: the last."""
        return self.rank == self.size - 1

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's batches, in order; InputError where there are fewer than processes."""
        if len(batches) < self.size:
            raise InputError(
                f"{self.size} processes share {len(batches)} batches; start fewer processes or give more samples"
            )
        return batches[self.first(len(batches)) : (self.rank + 1) * len(batches) // self.size]

    def first(self, count: int) -> int:
        """The number of this process's first batch, of ``count``."""
        return self.rank * count // self.size

    def receive(self, tensors: Iterable[torch.Tensor]) -> None:
        """Fill tensors with what the process before sent; rank 0 keeps its own."""
        if self.rank > 0:
            for tensor in tensors:
                distributed.recv(tensor, self.rank - 1)

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Send tensors to the process after this one, if there is one."""
        if not self.writes:
            for tensor in tensors:
                distributed.send(tensor, self.rank + 1)

    def told(self, value: Any) -> Any:
        """The writer's value, for every process; waits for it."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, self.size - 1)
        return values[0]


@contextmanager
def started(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started; one where it did not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    # A process may wait for hours while another one selects over the whole model; torchrun ends all if one fails.
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=30))
    yield Ranks(distributed.get_rank(), size)
    # Not after an error: the others wait for what never comes, until torchrun ends them.
    distributed.destroy_process_group()
