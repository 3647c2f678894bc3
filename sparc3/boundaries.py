"""What the blocks received, and the gradients that came back: kept in memory or on disk.

One tensor a batch and boundary, under (block index, batch number); sparc3.engine says which indices it uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

Key = tuple[int, int]


class Boundaries(Protocol):
    """A place for tensors that are put, read any number of times, and dropped."""

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        """Keep a tensor, in place of one of the same key."""

    def get(self, key: Key) -> torch.Tensor:
        """The tensor, on the device that it came from."""

    def drop(self, key: Key) -> None:
        """Forget it."""


class InMemory:
    """Boundaries in memory: where they are, or on another device."""

    def __init__(self, home: torch.device | None = None) -> None:
        self.home = home
        self._kept: dict[Key, tuple[torch.Tensor, torch.device]] = {}

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        detached = tensor.detach()
        self._kept[key] = detached if self.home is None else detached.to(self.home), tensor.device

    def get(self, key: Key) -> torch.Tensor:
        tensor, device = self._kept[key]
        return tensor.to(device)

    def drop(self, key: Key) -> None:
        del self._kept[key]


class OnDisk:
    """Boundaries in files of raw bytes, one a tensor, in a folder that is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[Key, tuple[torch.Size, torch.dtype, torch.device]] = {}

    def put(self, key: Key, tensor: torch.Tensor) -> None:
        self._kept[key] = tensor.shape, tensor.dtype, tensor.device
        raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        # Not tofile, which hides that the disk is full behind a message without a reason.
        with self._file(key).open("wb") as file:
            file.write(raw.data)

    def get(self, key: Key) -> torch.Tensor:
        shape, dtype, device = self._kept[key]
        tensor = torch.empty(shape, dtype=dtype)
        with self._file(key).open("rb") as file:
            file.readinto(tensor.view(torch.uint8).numpy().data)
        return tensor.to(device)

    def drop(self, key: Key) -> None:
        del self._kept[key]
        self._file(key).unlink()

    def _file(self, key: Key) -> Path:
        return self.folder / f"{key[0]}-{key[1]}"
