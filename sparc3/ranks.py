"""Many processes on torch.distributed: each takes a share of the batches, and sums pass from one to the next.

The accumulators of a block start at rank 0, which adds what its batches give and hands them to rank 1 while it turns
to the next block, and so on; the last rank holds the sums of all batches, selects and writes. Floating-point sums
depend on their order, and this is the order in which one process adds: the masks are equal bit by bit, at the same
number of threads. The ranks work at different blocks at the same time, so that N ranks over L blocks lose N - 1 turns
in L.

In a sweep, where a block must be pruned before the next one is run, the ranks take the batches in turns and stay at
one block: each sends what a batch gives to the last rank, which adds that in the order of batches, selects, and sends
the new weights to all.
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

    def check(self, count: int) -> None:
        """InputError where there are fewer batches than processes."""
        if count < self.size:
            raise InputError(
                f"{self.size} processes share {count} batches; start fewer processes or give more samples"
            )

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's batches, in order; InputError where there are fewer than processes."""
        self.check(len(batches))
        return batches[self.first(len(batches)) : (self.rank + 1) * len(batches) // self.size]

    def first(self, count: int) -> int:
        """The number of this process's first batch, of ``count``."""
        return self.rank * count // self.size

    def deal(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's batches where they are taken in turns; the one that writes comes first in each turn."""
        self.check(len(batches))
        return batches[(self.rank + 1) % self.size :: self.size]

    def others_in_turn(self, turn: int, count: int) -> range:
        """The processes that have a batch in a turn beside the one that writes, in the order of ``count`` batches."""
        return range(min(self.size, count - turn * self.size) - 1)

    def give(self, tensors: Iterable[torch.Tensor]) -> None:
        """Send tensors to the process that writes, and make them zero."""
        for tensor in tensors:
            distributed.send(tensor.contiguous(), self.size - 1)
            tensor.zero_()

    def add_from(self, rank: int, tensors: Iterable[torch.Tensor]) -> None:
        """Add to tensors what a process gives."""
        for tensor in tensors:
            part = torch.empty_like(tensor)
            distributed.recv(part, rank)
            tensor += part

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """The writer's values, in the tensor of every process."""
        if self.size > 1:
            tensor = tensor.contiguous()
            distributed.broadcast(tensor, self.size - 1)
        return tensor

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

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            distributed.barrier()

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
