"""Safetensors checkpoints read tensor by tensor, and written piece by piece.

Tensors are read from their place in the file into memory of their own. A memory map would do without that copy, but
its pages count as the process's memory until the map is closed, and an address-space limit refuses it outright.

Format (https://github.com/huggingface/safetensors): 8 bytes n, little-endian; n bytes of JSON
{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}; the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sparc3.errors import InputError

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
# As the format's own reader refuses: a header is never larger.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """Where one tensor is: byte ``begin`` of a file; ``stored[...]`` reads it, as transformers' loader asks for."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own; InputError where the file ends before it does."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.numel():
            read_into(self.file, self.begin, tensor)
        return tensor

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.read()


def read_into(file: Path, begin: int, tensor: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor from byte ``begin`` of a file; InputError where it cannot be read in full."""
    view = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while len(view):
                # Linux reads at most 2 GiB at once.
                done = stream.readinto(view[: 1 << 30])
                if not done:
                    raise InputError(f"{file}: the file ends {len(view)} bytes too early; fetch it again")
                view = view[done:]
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error})") from error


class Checkpoint:
    """The tensors of a folder with model.safetensors, or with shards and their index.

    Attributes:
        folder: where it is.
        tensors: {name in the checkpoint: Stored}.

    Raises:
        InputError: no safetensors, a shard that is missing, cut off or damaged, or a tensor that the index puts
            elsewhere or that two shards hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        self.tensors: dict[str, Stored] = {}
        if not index.is_file():
            single = self.folder / "model.safetensors"
            if not single.is_file():
                raise InputError(
                    f"{self.folder}: no model.safetensors and no {INDEX}; a model that is read block by block must "
                    "be saved as safetensors"
                )
            self.tensors = read_header(single)[0]
            return
        weight_map = _read_index(index)
        for name in sorted(set(weight_map.values())):
            file = self.folder / name
            if not file.is_file():
                raise InputError(f"{file}: this shard is missing, and {INDEX} names it; fetch it again")
            for tensor, stored in read_header(file)[0].items():
                if tensor in self.tensors:
                    raise InputError(f"{tensor} is in two shards: {self.tensors[tensor].file} and {file}")
                if weight_map.get(tensor, name) != name:
                    raise InputError(
                        f"{index}: {tensor} is said to be in {weight_map[tensor]}, but is in {name}"
                    )
                self.tensors[tensor] = stored
        if lacking := sorted(set(weight_map) - set(self.tensors)):
            raise InputError(
                f"{index}: {lacking[0]} is in none of the shards, nor are {len(lacking) - 1} others"
            )

    @property
    def bytes(self) -> int:
        return sum(stored.bytes for stored in self.tensors.values())


def _read_index(index: Path) -> dict[str, str]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise InputError(f"{index}: {name} is named twice")
            found[name] = value
        return found

    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=once)["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of shards ({error!r}); fetch it again") from error


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """(tensors, metadata) of one safetensors file; InputError where it is damaged or cut off."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - _LENGTH_BYTES):
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        start = _LENGTH_BYTES + length
        tensors, ends = {}, start
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            stored = Stored(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin)
            if end - begin != stored.bytes or begin < 0:
                raise ValueError(f"the bytes of {name} do not fit its shape")
            tensors[name], ends = stored, max(ends, start + end)
        if ends > size:
            raise ValueError(f"it should have {ends} bytes and has {size}")
    except KeyError as error:
        raise InputError(f"{file}: a tensor of a type that is not known here ({error})") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: damaged or incomplete safetensors file ({error}); fetch it again"
        ) from error
    return tensors, metadata


def write_tensors(
    file: BinaryIO,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file without holding its tensors together.

    Args:
        shapes: {name: (dtype, shape)}, in the order of ``tensors``; these are asked for one after the other.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for tensor, (dtype, shape) in zip(tensors, shapes.values(), strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
        if tensor.numel():
            # Through a byte view, since numpy has no bfloat16.
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
