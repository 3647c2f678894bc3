"""The one engine: forward through the decoder blocks keeping what each block received, backward in reverse.

A block's activations are kept or recomputed, as memory allows; both give the same relevance. The embedding, the
masks and the rotary tables come from running the model below its LM head once with pass-through blocks; the logits
come from running all of it with blocks that hand the last block's output on, a chunk of positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from sparc3.families import blocks_of
from sparc3.targets import Batch, TargetFunction, explained, next_tokens

# Logits in flight, in elements: 64 MiB in fp32, small beside a block and large enough to fill a GEMM.
_LOGITS_IN_FLIGHT = 1 << 24


class Blocks:
    """A causal language model as a sequence of blocks that can be run one by one, with bit-equal logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.blocks = list(blocks_of(model))
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


@dataclass
class Kept:
    """One block's input and, where its activations were kept, its output with the graph."""

    hidden: torch.Tensor
    output: torch.Tensor | None


def attribute_batch(
    blocks: Blocks,
    batch: Batch,
    target: str | TargetFunction,
    positions: str = "all",
    memory: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one batch forward and backward; weights' relevance goes to the sink of the surrounding ``wrap``.

    Args:
        blocks: of a wrapped model.
        batch: input_ids [B, T], attention_mask [B, T], optionally labels [B, T].
        target, positions: see sparc3.targets.
        memory: bytes that kept activations may take; None: half of what is free; 0: recompute every block.

    Returns:
        (explained scalar [B], embedded input [B, T, D], its gradient [B, T, D]).
    """
    hidden, calls = blocks.record(batch)
    embedded = hidden
    budget = free_memory(hidden.device) // 2 if memory is None else memory
    kept: list[Kept] = []
    block_bytes = 0  # what one block's graph holds; known after the first
    for index, call in enumerate(calls):
        received, keep = hidden.detach(), budget > block_bytes
        with torch.set_grad_enabled(keep), _count_saved(keep and index == 0) as saved:
            output = blocks.run(index, received.requires_grad_(keep), call)
        block_bytes = block_bytes or saved.bytes
        budget -= block_bytes
        kept.append(Kept(received, output if keep else None))
        hidden = output.detach()
    value, gradient = target_gradient(blocks, hidden, batch, target, positions)
    for index in reversed(range(len(calls))):
        block = kept.pop()
        with torch.enable_grad():
            received = block.hidden.requires_grad_()
            output = blocks.run(index, received, calls[index]) if block.output is None else block.output
        del block
        (gradient,) = torch.autograd.grad(output, received, gradient)
    return value, embedded, gradient


def target_gradient(
    blocks: Blocks, hidden: torch.Tensor, batch: Batch, target: str | TargetFunction, positions: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(explained scalar [B], its gradient [B, T, D]) at the last block's output ``hidden`` [B, T, D]."""
    leaf = hidden.detach().requires_grad_()
    samples, length = batch["input_ids"].shape
    if not isinstance(target, str):
        everything = torch.arange(length, device=hidden.device)
        with torch.enable_grad():
            value = target(blocks.logits(leaf, batch, everything), batch)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient
    labels = next_tokens(batch, positions)
    wanted = torch.nonzero((labels >= 0).any(0)).squeeze(1)
    chunk = max(1, _LOGITS_IN_FLIGHT // (samples * blocks.model.config.vocab_size))
    if "forward" in vars(blocks.model.get_output_embeddings()):
        # The head's own relevance is wanted (see sparc3.wrap), and it is reduced over whole samples.
        wanted, chunk = torch.arange(length, device=hidden.device), length
    value = torch.zeros(samples, device=hidden.device, dtype=torch.float32)
    for some in wanted.split(chunk):
        with torch.enable_grad():
            part = explained(blocks.logits(leaf, batch, some), labels[:, some], target)
            part.sum().backward()
        value += part.detach()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return value, gradient


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
