"""Where a model's weights are while a block is run: in memory for good, or read block by block from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig

from sparc3.checkpoint import Checkpoint, Stored
from sparc3.errors import InputError
from sparc3.families import blocks_of, family_of


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


# Numbers that are looked through at once.
_CHECKED_AT_ONCE = 1 << 20
# The group of what is outside of the blocks, in place of a block's index.
OUTSIDE = -1


def empty_model(source: str | Path | PreTrainedConfig, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model in eval mode whose parameters have shapes and no values (torch's meta device).

    What is made from the config alone (tables of rotary frequencies, ...) is there.

    Args:
        source: a folder with config.json, or a config.
        dtype: "auto" takes the config's, float32 where it names none.

    Raises:
        InputError: the config cannot be read, or the checkpoint is quantised.
    """
    try:
        config = source if isinstance(source, PreTrainedConfig) else AutoConfig.from_pretrained(source)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"{source}: a quantised checkpoint cannot be read block by block; dequantise it first"
            )
        wanted = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=wanted)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{source}: transformers cannot make this model: {error}") from error
    for module in model.modules():
        made = [name for name in module._buffers if name in module._non_persistent_buffers_set]
        for name in made:
            if (buffer := module._buffers[name]) is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if made:
            # Where transformers fills such buffers itself, after a model was made like this.
            with torch.no_grad():
                model._init_weights(module)
    return model.eval().requires_grad_(False)


class Streamed:
    """Weights that are read from a checkpoint when they are needed, the next block's while this one's are used.

    Renaming and fusing what the checkpoint holds is left to transformers' own loader.

    Attributes:
        groups: {block index or OUTSIDE: {name in the checkpoint: Stored}}.

    Args:
        model: of ``empty_model``; it is left empty whenever nothing is visited.
        device: where weights are brought.
        prefetch: read the next block while this one is used, which takes the memory of a second block.
        visited: called after each block that was visited.

    Raises:
        InputError: when a block is read, and the checkpoint lacks a weight, has it in another shape, or NaN or Inf in
            it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        device: torch.device,
        prefetch: bool = True,
        visited: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.checkpoint, self.device, self.prefetch = model, checkpoint, device, prefetch
        self.visited = visited
        self.groups = block_groups(model, checkpoint)
        self._config = LoadStateDictConfig(
            dtype=model.dtype,
            weight_mapping=get_model_conversion_mapping(model, None, None),  # type: ignore[arg-type]
        )
        self._places = _places(model)
        self._checked: set[int] = set()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        for module in model.modules():
            for name in module._non_persistent_buffers_set:
                if (buffer := module._buffers.get(name)) is not None:
                    module._buffers[name] = buffer.to(device)

    def visit(self, indices: Sequence[int]) -> Iterator[int]:
        ahead: dict[int, Future] = {}
        with ThreadPoolExecutor(1) as reader:
            try:
                for position, index in enumerate(indices):
                    self._wait(index, ahead.pop(index).result() if index in ahead else self._read(index))
                    try:
                        if self.prefetch and position + 1 < len(indices):
                            after = indices[position + 1]
                            ahead[after] = reader.submit(self._read, after)
                        yield index
                    finally:
                        self._drop(index)
                    if self.visited is not None:
                        self.visited()
            finally:
                for index, future in ahead.items():
                    future.exception()  # waits: what is read is dropped after it
                    self._drop(index)

    @contextmanager
    def outside(self) -> Iterator[None]:
        self._wait(OUTSIDE, self._read(OUTSIDE))
        try:
            yield
        finally:
            self._drop(OUTSIDE)

    def held(self, group: int) -> dict[str, torch.Tensor]:
        """{state-dict name: tensor} of a group that is in the model; of names for one tensor, the first."""
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for module, path, name, _ in self._places[group]:
            tensor = getattr(module, name)
            found.setdefault(id(tensor), (path, tensor.detach()))
        return dict(found.values())

    def _wait(self, group: int, ready: Any) -> None:
        if ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(ready)
            for tensor in self.held(group).values():
                # Allocated on the copying stream: freed here, it must not be reused before this one is done with it.
                tensor.record_stream(stream)

    def _read(self, group: int) -> Any:
        """Bring a group's weights, or none; returns the event after which they are on a GPU."""
        try:
            self._load(group)
            self._check(group)
            return self._settle(group)
        except BaseException:
            self._drop(group)
            raise

    def _load(self, group: int) -> None:
        stored = self.groups.get(group, {})
        info, _ = self.model._load_pretrained_model(self.model, dict(stored), None, self._config)
        if info.mismatched_keys:
            name, found, expected = min(info.mismatched_keys)
            raise InputError(
                f"{self.checkpoint.folder}: {name} is {list(found)}, but config.json says {list(expected)}"
            )
        if group == OUTSIDE:
            self.model.tie_weights()

    def _check(self, group: int) -> None:
        for module, path, name, _ in self._places[group]:
            tensor = getattr(module, name)
            if tensor.is_meta:
                raise InputError(f"{self.checkpoint.folder}: the checkpoint lacks {path}; it is incomplete")
            if group not in self._checked and not _finite(tensor):
                raise InputError(
                    f"{self.checkpoint.folder}: NaN or Inf in {path}; the checkpoint is damaged or overflows this "
                    "dtype"
                )
        self._checked.add(group)

    def _settle(self, group: int) -> Any:
        """Move what was read to the device, on a stream of its own where that is a GPU."""
        moved: dict[int, torch.Tensor] = {}
        with torch.cuda.stream(self._copies) if self._copies else nullcontext():
            for module, _, name, _ in self._places[group]:
                tensor = getattr(module, name)
                if id(tensor) not in moved:
                    # Pinned, or the copy would not run beside the computation.
                    data = tensor.data.pin_memory() if self._copies else tensor.data
                    data = data.to(self.device, non_blocking=True)
                    kept = (
                        nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
                    )
                    moved[id(tensor)] = kept
                _put(module, name, moved[id(tensor)])
            return self._copies.record_event() if self._copies else None

    def _drop(self, group: int) -> None:
        for module, _, name, empty in self._places[group]:
            _put(module, name, empty)


def block_groups(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[int, dict[str, Stored]]:
    """{block index or OUTSIDE: {name: Stored}}: what a checkpoint holds for each block."""
    list_name = family_of(model).blocks.rpartition(".")[2]
    groups: dict[int, dict[str, Stored]] = {}
    for name, stored in checkpoint.tensors.items():
        # The path before it may have another prefix in the checkpoint, as GPT-2's has.
        match = re.search(rf"(?:^|\.){list_name}\.(\d+)\.", name)
        groups.setdefault(int(match[1]) if match else OUTSIDE, {})[name] = stored
    return groups


_Place = tuple[nn.Module, str, str, torch.Tensor]


def _places(model: PreTrainedModel) -> dict[int, list[_Place]]:
    """{group: [(module, state-dict name, attribute, the empty tensor)]} of parameters and persistent buffers."""
    prefix = family_of(model).blocks
    places: dict[int, list[_Place]] = {index: [] for index in range(len(blocks_of(model)))}
    places[OUTSIDE] = []
    for path, module in model.named_modules():
        inside = path.startswith(f"{prefix}.")
        group = int(path.removeprefix(f"{prefix}.").split(".")[0]) if inside else OUTSIDE
        held = {**module._parameters, **module._buffers}
        for name, tensor in held.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                places[group].append((module, f"{path}.{name}" if path else name, name, tensor))
    return places


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all is finite, without temporaries of the tensor's size: another block is in use meanwhile."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.reshape(-1).split(_CHECKED_AT_ONCE))


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = tensor  # type: ignore[assignment]
    else:
        module._buffers[name] = tensor
