"""What a pass over a streamed model leaves on disk: a file for each block, and the states that it can go on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparc3.checkpoint import Stored, read_header, write_tensors
from sparc3.samples import Batch
from sparc3.unfinished import Unfinished, note_of

# (dtype, shape) of each tensor of a state
Shapes = Sequence[tuple[torch.dtype, tuple[int, ...]]]


class Pieces:
    """Files of one kind, a block's index in their names; the number of blocks stands for what is outside of them.

    A block is done when its file is there, which comes after everything else that the pass leaves of it.

    Args:
        name: of the kind.
        depth: the number of blocks.
        upwards: whether the pass goes from the first block to the last, or the other way.
    """

    def __init__(self, run: Unfinished, name: str, depth: int, upwards: bool) -> None:
        self.run, self.name, self.depth, self.upwards = run, name, depth, upwards

    def _file(self, kind: str, index: int) -> Path:
        return self.run.scratch / f"{kind}-{index:05d}.safetensors"

    def is_done(self, index: int) -> bool:
        return self._file(self.name, index).is_file()

    def left(self) -> list[int]:
        """The blocks that are not done."""
        return [index for index in range(self.depth + 1) if not self.is_done(index)]

    def last_done(self) -> int | None:
        """The block that the pass came to, all those before it on its way done; None where it did not begin."""
        last = None
        for index in range(self.depth + 1) if self.upwards else range(self.depth, -1, -1):
            if not self.is_done(index):
                break
            last = index
        return last

    def save(self, index: int, tensors: Mapping[str, torch.Tensor], note: Any = None) -> None:
        self.run.save(self._file(self.name, index), tensors, note)

    def stored(self, index: int) -> dict[str, Stored]:
        return read_header(self._file(self.name, index))[0]

    def note(self, index: int) -> Any:
        return note_of(self._file(self.name, index))

    def remove(self) -> None:
        """Forget all that the pass found."""
        for index in range(self.depth + 1):
            self._file(self.name, index).unlink(missing_ok=True)

    # States: what goes from one block to the next, for all batches of a process ------------------------------------

    def save_state(self, index: int, tensors: Iterable[torch.Tensor], shapes: Shapes, rank: int) -> None:
        """Keep what comes out of a block; ``tensors`` are asked for one after the other, memory may not hold all."""
        with self.run.write(self._state(index, rank)) as file:
            write_tensors(file, {str(number): shape for number, shape in enumerate(shapes)}, tensors, {})

    def load_state(self, index: int, rank: int) -> Iterator[torch.Tensor]:
        stored, _ = read_header(self._state(index, rank))
        for number in range(len(stored)):
            yield stored[str(number)].read()

    def forget_states(self, rank: int, over: bool = False) -> None:
        """Remove the states of all blocks that are done but the last of them, and that too where the pass is over."""
        done = [index for index in range(self.depth + 1) if over or self.is_done(index)]
        last = None if over else (max if self.upwards else min)(done, default=None)
        for index in done:
            if index != last:
                self._state(index, rank).unlink(missing_ok=True)

    def _state(self, index: int, rank: int) -> Path:
        return self._file(f"state-{self.name}-{rank}", index)


def state_shapes(batches: Sequence[Batch], width: int, dtype: torch.dtype) -> Shapes:
    """Of what a block receives for each batch."""
    return [(dtype, (*batch["input_ids"].shape, width)) for batch in batches]
