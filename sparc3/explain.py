"""Relevance of tokens, heads, neurons, residual streams and weights, for whoever wants to look at it.

with sparc3.relevance(model, target="logit", positions="last") as r:
    r.backward(tokenizer("The capital of France is", return_tensors="pt"))
r.tokens            # [1, T]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparc3.engine import Blocks, attribute_batch
from sparc3.families import family_of, find, prunable
from sparc3.rules import Rule
from sparc3.scores import Accumulators
from sparc3.targets import Batch, TargetFunction, check_target
from sparc3.wrap import wrap


class Relevance:
    """What ``relevance`` yields. Relevance of a tensor is the tensor times its gradient under the rule.

    Attributes, filled by ``backward`` (fp32 where the model computes in less):
        shape: (B, T).
        value: [B] the explained scalar.
        tokens: [B, T] of the embedded tokens; learned positions count with their token.
        residual: {layer: [B, T, D]} of the stream that enters each block; the last key, the number of blocks,
            is the stream that leaves the last one.
        heads: {layer: [B, T, H]} of each attention head's output.
        neurons: {layer: [B, T, I]} of the MLP's hidden neurons; layers with fused experts have none.
        weights: {name: [..., out, in]} of the prunable weights, summed over samples and tokens since the context
            was entered; empty with ``weights=False``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        target: str | TargetFunction,
        positions: str,
        sink: Accumulators | None,
        memory: int | None,
    ) -> None:
        self._blocks, self._target, self._positions = Blocks(model), target, positions
        self._sink, self._memory = sink, memory
        self.shape: tuple[int, ...] = (0, 0)
        self.value = self.tokens = torch.empty(0)
        self.residual: dict[int, torch.Tensor] = {}
        self.heads: dict[int, torch.Tensor] = {}
        self.neurons: dict[int, torch.Tensor] = {}

    def backward(self, batch: Batch) -> torch.Tensor:
        """Run a batch (input_ids [B, T], attention_mask, optionally labels) and return the scalars [B]."""
        self.shape = tuple(batch["input_ids"].shape)
        if self._sink is not None:
            self._sink.start(batch)
        self.value, embedded, gradient = attribute_batch(
            self._blocks, batch, self._target, self._positions, self._memory
        )
        self.tokens = product(embedded, gradient).sum(-1)
        return self.value

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """See the class; a fresh product of weights and accumulated gradients each time."""
        if self._sink is None:
            return {}
        return {
            name: total * self._sink.weights[name].canonical(self._sink.weights[name].weight).detach()
            for name, total in self._sink.sums.items()
        }


def product(tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The relevance of a tensor, in at least fp32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(dtype) * gradient.to(dtype)


@contextmanager
def relevance(
    model: PreTrainedModel,
    rule: str | Rule = "attnlrp",
    target: str | TargetFunction = "logit",
    positions: str = "last",
    *,
    weights: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    memory: int | None = None,
) -> Iterator[Relevance]:
    """Explain a model's outputs with LRP; the model is unchanged afterwards.

    Args:
        model: a causal language model of a declared family.
        rule: see sparc3.rules; CP is welcome here.
        target: a name of sparc3.targets.TARGETS, or a callable (logits [B, T, V], batch) -> [B].
        positions: "all" or the "last" position with a next token; give ``labels`` in the batch to explain another
            token, such as one that is not in the text.
        weights: accumulate the relevance of weights too (one fp32 copy of the prunable weights).
        include, exclude: shell patterns on the weights' names.
        memory: bytes for kept activations, see sparc3.engine.

    Raises:
        InputError: unknown architecture, rule, target or positions.
    """
    parsed = Rule.parse(rule)
    check_target(target, positions)
    family = family_of(model)
    chosen = prunable(model, include, exclude) if weights else {}
    sink = Accumulators(chosen, "signed") if weights else None
    result = Relevance(model, target, positions, sink, memory)
    blocks = result._blocks
    heads = model.config.num_attention_heads

    def watch(tensor: torch.Tensor, store: Callable[[torch.Tensor], None]) -> None:
        if tensor.requires_grad and not blocks.passing_through:
            # Detached: a hook that holds its own tensor keeps the graph alive for good.
            value = tensor.detach()
            tensor.register_hook(lambda gradient: store(product(value, gradient)))

    def before(layer: int, kind: str, module: nn.Module, args: tuple) -> None:
        watch(args[0], partial(keep, layer, kind))

    def after(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        watch(output[0] if isinstance(output, tuple) else output, partial(keep, layer + 1, "residual"))

    def keep(layer: int, kind: str, value: torch.Tensor) -> None:
        if kind == "heads":
            value = value.unflatten(-1, (heads, -1)).sum(-1)
        # OPT flattens samples and tokens in its MLP.
        getattr(result, kind)[layer] = value.view(*result.shape, -1)

    with wrap(model, parsed, chosen, sink):
        handles = []
        for layer, block in enumerate(blocks.blocks):
            handles.append(block.register_forward_pre_hook(partial(before, layer, "residual")))
            inputs = {
                "heads": find(block, family.attention_output),
                "neurons": find(block, family.mlp_output),
            }
            for kind, module in inputs.items():
                if module is not None:
                    handles.append(module.register_forward_pre_hook(partial(before, layer, kind)))
        handles.append(blocks.blocks[-1].register_forward_hook(partial(after, len(blocks.blocks) - 1)))
        try:
            yield result
        finally:
            for handle in handles:
                handle.remove()
