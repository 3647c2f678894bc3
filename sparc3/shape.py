"""What the memory and time of pruning a model depend on: its sizes, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sparc3.checkpoint import Checkpoint
from sparc3.families import Prunable, blocks_of, family_of
from sparc3.scores import windows_at_once
from sparc3.weights import OUTSIDE, block_groups

# glibc takes what is larger from the system and gives it back at once (mallopt, M_MMAP_THRESHOLD on 64 bits).
_OWN_PAGES = 32 << 20


@dataclass(frozen=True)
class Shape:
    """What a plan depends on of a model, its checkpoint and the samples.

    Attributes:
        blocks: how many.
        block, outside: bytes in memory of the largest block, and of what is outside of the blocks.
        stored_blocks, stored_outside: bytes of the checkpoint.
        converted: bytes of the checkpoint's largest group that are held while it is brought to the model's dtype.
        small_weights, small_prunable: bytes of the block's tensors, and weights in those, that an allocator does not
            give back to the system one by one.
        prunable, largest_prunable, largest_tensor: weights in all, in the block that has most, in one tensor.
        widest_input, squared_inputs: the most inputs that a weight has, and the sum of their squares over the weights
            of the block that has most.
        width, numbers: of a token in what a block receives, and in a block's activations.
        itemsize: bytes of a number.
        samples, length: reference samples and their tokens.
    """

    blocks: int
    block: int
    outside: int
    stored_blocks: int
    stored_outside: int
    converted: int
    small_weights: int
    small_prunable: int
    prunable: int
    largest_prunable: int
    largest_tensor: int
    widest_input: int
    squared_inputs: int
    block_weights: int
    width: int
    numbers: int
    itemsize: int
    samples: int
    length: int

    @property
    def boundary(self) -> int:
        """Bytes of what one block received, for all samples."""
        return self.samples * self.length * self.width * self.itemsize

    def batch_tokens(self, kind: str) -> int:
        """Of a batch, at most, on a kind of device ("cpu", "cuda")."""
        return min(self.samples, windows_at_once(kind, self.length)) * self.length


def shape_of(
    model: PreTrainedModel,
    weights: Mapping[str, Prunable],
    samples: int,
    length: int,
    checkpoint: Checkpoint | None = None,
) -> Shape:
    """Of an empty model (sparc3.weights.empty_model); without a checkpoint its bytes are those in memory."""
    config, prefix = model.config, family_of(model).blocks
    blocks = [sum(tensor.nbytes for tensor in block.state_dict().values()) for block in blocks_of(model)]
    everything = {tensor.data_ptr() or id(tensor): tensor for tensor in _distinct(model)}
    outside = sum(tensor.nbytes for tensor in everything.values()) - sum(blocks)
    per_block, squared = [0] * (len(blocks) + 1), [0] * (len(blocks) + 1)
    for name, weight in weights.items():
        inside = name.startswith(f"{prefix}.")
        index = int(name.removeprefix(f"{prefix}.").split(".")[0]) if inside else len(blocks)
        per_block[index] += weight.weight.numel()
        squared[index] += _inputs(weight) ** 2 * math.prod(weight.weight.shape[:-2])
    stored_blocks, stored_outside, converted = sum(blocks), outside, 0
    if checkpoint is not None:
        groups = block_groups(model, checkpoint)
        stored_outside = sum(stored.bytes for stored in groups.get(OUTSIDE, {}).values())
        stored_blocks = checkpoint.bytes - stored_outside
        converted = max(
            sum(stored.bytes for stored in group.values() if stored.dtype != model.dtype)
            for group in groups.values()
        )
    of_first = [tensor for tensor in blocks_of(model)[0].parameters() if tensor.nbytes < _OWN_PAGES]
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = head * (heads + 2 * (getattr(config, "num_key_value_heads", None) or heads))
    # GPT-2 names it n_inner, OPT ffn_dim; experts have one of their own, which each token passes several times.
    inner = [getattr(config, name, None) or 0 for name in ("intermediate_size", "ffn_dim", "n_inner")]
    experts = (getattr(config, "moe_intermediate_size", None) or inner[0]) * (
        getattr(config, "num_experts_per_tok", None) or 0
    )
    intermediate = max(*inner, experts) or 4 * config.hidden_size
    return Shape(
        blocks=len(blocks),
        block=max(blocks),
        outside=outside,
        stored_blocks=stored_blocks,
        stored_outside=stored_outside,
        converted=converted,
        small_weights=sum(tensor.nbytes for tensor in of_first),
        small_prunable=sum(
            weight.weight.numel()
            for name, weight in weights.items()
            if name.startswith(f"{prefix}.0.") and 4 * weight.weight.numel() < _OWN_PAGES
        ),
        prunable=sum(per_block),
        largest_prunable=max(per_block),
        largest_tensor=max(weight.weight.numel() for weight in weights.values()),
        widest_input=max(_inputs(weight) for weight in weights.values()),
        squared_inputs=max(squared),
        block_weights=sum(blocks) // model.dtype.itemsize,
        width=config.hidden_size,
        numbers=8 * config.hidden_size + 4 * attention + 6 * intermediate,
        itemsize=model.dtype.itemsize,
        samples=samples,
        length=length,
    )


def _inputs(weight: Prunable) -> int:
    return weight.weight.shape[-2 if weight.transposed else -1]


def _distinct(model: PreTrainedModel) -> list[torch.Tensor]:
    """Parameters once each, tied ones too, and the buffers that are saved."""
    saved = set(model.state_dict())
    return [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in saved)]
