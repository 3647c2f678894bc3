"""Masks: which weights of one model are kept, one bit a weight.

File format (safetensors, version 1): one uint8 tensor a weight under the weight's state-dict key, bit
``bits[i >> 3] >> (i & 7) & 1`` for element i of the row-major tensor as stored, 1 = kept; the header's metadata holds
``sparc3_mask`` = a JSON object with version, shapes, fingerprint and settings.

A mask of a method that also changes the weights it keeps says so in its settings, as ``updates``. The new values are
in the pruned model and not in the file: such a mask, once loaded, can be looked at, compared and undone (with the
base model), but not applied.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sparc3_kernels.select import apply_bits_, count_bits, unpack_bits
from torch import nn

from sparc3.errors import InputError

VERSION = 1
_KEY = "sparc3_mask"
# Bytes of a tensor that its fingerprint reads: spread evenly, so that any changed region of a weight shows.
_SAMPLED_BYTES = 1 << 16


def fingerprint(model: nn.Module, tensors: Mapping[str, torch.Tensor], full: bool = False) -> dict[str, Any]:
    """What a model is recognised by: names, shapes, dtypes and bytes of the tensors given.

    Args:
        model: its class and model type are recorded for messages.
        tensors: by state-dict name.
        full: hash every byte instead of 64 KiB a tensor.

    Returns:
        {"model": ..., "full": bool, "tensors": {name: {"shape", "dtype", "sha256"}}}, plain JSON values.
    """
    return {
        "model": type(model).__name__,
        "full": full,
        "tensors": {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sha256": _digest(tensor, full),
            }
            for name, tensor in tensors.items()
        },
    }


def mask_metadata(
    shapes: Mapping[str, Sequence[int]], fingerprint: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a mask's file, see the module."""
    described = {
        "version": VERSION,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "fingerprint": fingerprint,
        "settings": settings,
    }
    return {_KEY: json.dumps(described)}


def _digest(tensor: torch.Tensor, full: bool) -> str:
    flat = tensor.detach().reshape(-1)
    count = flat.numel() if full else min(flat.numel(), _SAMPLED_BYTES // tensor.element_size())
    # Integer arithmetic, since a float step would round differently for tensors beyond 2^24 elements.
    index = torch.arange(count, device=flat.device) * flat.numel() // max(1, count)
    values = flat[index].contiguous().cpu().view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


@dataclass
class Mask:
    """Kept weights of one model.

    Attributes:
        bits: packed uint8 [ceil(n / 8)] by state-dict name, over the tensor as stored.
        shapes: of the tensors as stored.
        fingerprint: of the model that it was made for.
        settings: how it was made, plain JSON values; ``updates`` names what changed the kept weights, if anything.
        values: the new tensors as stored, zero where pruned, by name; empty unless kept weights change.
    """

    bits: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]
    fingerprint: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    _values: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> int:
        """Weights under the mask."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def sparsity(self) -> float:
        """Share of them that is pruned."""
        return 1 - sum(count_bits(bits) for bits in self.bits.values()) / self.total

    @property
    def updates(self) -> str | None:
        """What changed the kept weights too, or None."""
        return self.settings.get("updates")

    def kept(self, name: str) -> torch.Tensor:
        """bool tensor of the shape as stored, True where the weight is kept."""
        return unpack_bits(self.bits[name], self.shapes[name])

    def __repr__(self) -> str:
        method, pattern = self.settings.get("method", "?"), self.settings.get("pattern", "?")
        size = f"{len(self.bits)} tensors, {self.total} weights, {self.sparsity:.4%} pruned"
        return f"Mask({size}, {method}, {pattern})"

    # Applying ------------------------------------------------------------------------------------------------------

    def apply(self, model: nn.Module, keep: bool = False) -> None:
        """Zero the pruned weights of ``model`` in place, and give the kept ones their new values, if there are any.

        Args:
            keep: keep the dense values in this object, so that ``undo`` needs no checkpoint.

        Raises:
            InputError: the mask was made for another model, or it changes kept weights and was loaded from a file;
                nothing is changed then.
        """
        weights = self.check_applies(model)
        if keep:
            self._values = self._dense_values(weights)
        for name, weight in weights.items():
            self.prune_(name, weight.detach())

    def prune_(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """One dense tensor as ``apply`` leaves it, in place."""
        if name in self.values:
            return weight.copy_(self.values[name])
        return apply_bits_(weight, self.bits[name].to(weight.device))

    def undo(self, model: nn.Module, base: str | Path | None = None) -> None:
        """Put the dense values back, bit for bit.

        Args:
            base: name of the model that the mask was made from, as ``sparc3.load`` takes it; it is loaded whole, in
                the dtype of ``model``. Not needed after ``apply(keep=True)`` of this object.

        Raises:
            InputError: there is nothing to take the values from, the base cannot be loaded, or it is another model.
        """
        weights = self._weights(model)
        if base is not None:
            values = self._from_base(base, weights)
        elif self._values:
            values = self._values
        else:
            raise InputError(
                "the pruned values are not known: give the checkpoint that the mask was made from as base, or apply "
                "the mask with keep=True"
            )
        with torch.no_grad():
            for name, weight in weights.items():
                weight.detach()[self._touched(name, weight)] = values[name].to(weight.device)
        self._values = {}

    def is_applied(self, model: nn.Module) -> bool:
        """Whether ``model`` is as ``apply`` leaves it, as far as the mask knows: without ``values``, whether every
        pruned weight is zero. InputError where it lacks a weight of the mask."""
        return all(
            torch.equal(weight, self.values[name].to(weight.device))
            if name in self.values
            else bool(weight.detach()[~self.kept(name).to(weight.device)].eq(0).all())
            for name, weight in self._weights(model).items()
        )

    def check(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights under the mask; InputError unless ``model`` is the one that it was made for."""
        weights = self._weights(model)
        if self.fingerprint:
            theirs = fingerprint(model, weights, self.fingerprint["full"])["tensors"]
            for name, expected in self.fingerprint["tensors"].items():
                _compare(name, expected, theirs[name])
        return weights

    def check_applies(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """``check``, and InputError where only the pruned model has the new values of the kept weights."""
        weights = self.check(model)
        if self.updates and not self.values:
            raise InputError(
                f"{self.updates} changed the kept weights too, and a mask file does not hold their new values: take "
                "the pruned model itself"
            )
        return weights

    def _weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        weights = {}
        for name, shape in self.shapes.items():
            try:
                weights[name] = model.get_parameter(name)
            except AttributeError as error:
                raise InputError(f"the mask is for another model: this one has no weight {name}") from error
            if tuple(weights[name].shape) != shape:
                raise InputError(
                    f"the mask is for another model: {name} is {list(weights[name].shape)} here, {list(shape)} there"
                )
        return weights

    def _touched(self, name: str, weight: torch.Tensor) -> Any:
        """Index of what ``apply`` changes in a weight."""
        return ... if self.updates else ~self.kept(name).to(weight.device)

    def _dense_values(self, weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        return {
            name: weight.detach()[self._touched(name, weight)].clone() for name, weight in weights.items()
        }

    def _from_base(self, base: str | Path, weights: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        # Through transformers, since a file may name and cut weights otherwise than the model does: fused experts
        # are stored one by one, a tied head not at all.
        from sparc3.models import load

        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        return self._dense_values(self.check(load(base, dtype=dtype).model))

    # Algebra -------------------------------------------------------------------------------------------------------

    def invert(self) -> Mask:
        """Keeps what this one prunes."""
        return self._map(lambda name: ~self.kept(name), {"inverted": self.settings})

    def combine(self, other: Mask, how: str = "and") -> Mask:
        """Keeps what both keep ("and") or what either keeps ("or"); InputError for masks of different models."""
        self._check_pair(other)
        if how not in ("and", "or"):
            raise InputError(f"masks combine by and | or, not by {how!r}")
        settings = {"combined": how, "of": [self.settings, other.settings]}
        if how == "and":
            return self._map(lambda name: self.kept(name) & other.kept(name), settings)
        return self._map(lambda name: self.kept(name) | other.kept(name), settings)

    def diff(self, other: Mask) -> dict[str, dict[str, int]]:
        """Weights kept only_here, only_there, by both and by neither, for each tensor."""
        self._check_pair(other)
        counts = {}
        for name in self.bits:
            here, there = self.kept(name), other.kept(name)
            both, either = int((here & there).sum()), int((here | there).sum())
            counts[name] = {
                "only_here": int(here.sum()) - both,
                "only_there": int(there.sum()) - both,
                "both": both,
                "neither": here.numel() - either,
            }
        return counts

    def _map(self, kept: Callable[[str], torch.Tensor], settings: dict[str, Any]) -> Mask:
        from sparc3_kernels.select import pack_bits

        return Mask(
            {name: pack_bits(kept(name)) for name in self.bits}, self.shapes, self.fingerprint, settings
        )

    def _check_pair(self, other: Mask) -> None:
        if self.shapes != other.shapes:
            name = next(iter(set(self.shapes.items()) ^ set(other.shapes.items())))[0]
            raise InputError(f"the two masks cover different weights; {name} is one that differs")
        if self.fingerprint and other.fingerprint:
            for name, expected in self.fingerprint["tensors"].items():
                _compare(name, expected, other.fingerprint["tensors"][name])

    # Files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the mask to a safetensors file, whole or not at all; InputError where that is not possible."""
        path = Path(path)
        tensors = {name: bits.cpu().contiguous() for name, bits in self.bits.items()}
        try:
            descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(descriptor)
            try:
                save_file(
                    tensors, partial, metadata=mask_metadata(self.shapes, self.fingerprint, self.settings)
                )
                # mkstemp makes a file that only its owner may read.
                os.chmod(partial, 0o644)
                os.replace(partial, path)
            except BaseException:
                Path(partial).unlink(missing_ok=True)
                raise
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write the mask to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read a mask; InputError for a file that is missing, damaged, no mask, or of a newer version."""
        if Path(path).is_dir():
            raise InputError(f"cannot read a mask from {path}: it is a folder; give {path}/mask.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get(_KEY)
                bits = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read a mask from {path}: {error}") from error
        if header is None:
            raise InputError(f"{path} is a safetensors file but not a mask: its header has no {_KEY}")
        try:
            described = json.loads(header)
            if described["version"] > VERSION:
                raise InputError(
                    f"{path} is a mask of format {described['version']}; this one reads up to {VERSION}: "
                    "update sparc3"
                )
            shapes = {name: tuple(shape) for name, shape in described["shapes"].items()}
            identity, settings = described["fingerprint"], described["settings"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged: its {_KEY} cannot be read ({error!r})") from error
        for name, shape in shapes.items():
            size = (torch.Size(shape).numel() + 7) // 8
            if name not in bits or bits[name].dtype != torch.uint8 or bits[name].numel() != size:
                raise InputError(f"{path} is damaged: the bits of {name} do not fit its shape {list(shape)}")
        return cls({name: bits[name] for name in shapes}, shapes, identity, settings)


def _compare(name: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for what in ("shape", "dtype", "sha256"):
        if expected[what] != found[what]:
            detail = f"its {what} is {found[what]}, the mask expects {expected[what]}"
            if what == "sha256":
                detail = "its values differ (a model that is already pruned differs too: use the dense one)"
            elif what == "dtype":
                detail += f"; load the model with --dtype {expected[what]}"
            raise InputError(f"the mask was made for another model: {name} differs, {detail}")
