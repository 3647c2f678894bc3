"""Where the relevance of a target went: what reached the inputs, and which parts of the model took the rest.

LRP hands the explained value down from the logits to the embedded tokens. What a part takes on the way is measured
at that part, as the relevance of its output minus that of its inputs, relevance being tensor times gradient:

=========== ==========================================================================================
part        takes
=========== ==========================================================================================
target      the value minus the logits' relevance: logprob is not linear in them, nor is a final soft-cap
biases      bias times gradient, of linears and LayerNorms
norms       zero under norm=constant; nearly all that enters under norm=gradient
softmax     of the attention (soft-cap included) and of the experts' router; zero where they are constant
products    activations, gates, experts and the products of the attention; zero where the rule halves them
unaccounted what is left of a block's loss: always zero, unless the family's declaration misses a part
=========== ==========================================================================================

The value is what reached the inputs plus all that was taken. A part that must take nothing under a rule and does is
a sign of a wrong declaration (sparc3.families). Linears, residual sums and rotary embeddings take nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparc3.explain import Relevance, product, relevance
from sparc3.families import blocks_of, family_of, find
from sparc3.rules import Rule
from sparc3.targets import Batch, TargetFunction
from sparc3.wrap import is_norm

PARTS = ("target", "biases", "norms", "softmax", "products", "unaccounted")


@dataclass(frozen=True)
class Row:
    """What one block, or the head above all blocks, took; summed over samples, tokens and channels.

    Attributes:
        block: its index; the number of blocks for the head (final norm, LM head and target).
        above, below: relevance of the stream that leaves it (for the head: the value), and that enters it.
        taken: {part: relevance}, all of ``PARTS``; above = below + sum of these.
        rounding: how far from zero a part may be in the model's dtype and still be taken as zero.
    """

    block: int
    above: float
    below: float
    taken: dict[str, float]
    rounding: float


@dataclass(frozen=True)
class Conservation:
    """Attributes: rows, the head first and block 0 last; zero, the parts that must take nothing under the rule."""

    rows: list[Row]
    zero: tuple[str, ...]

    @property
    def value(self) -> float:
        """The explained value, summed over the samples."""
        return self.rows[0].above

    @property
    def inputs(self) -> float:
        """Relevance of the embedded tokens."""
        return self.rows[-1].below

    @property
    def taken(self) -> dict[str, float]:
        """{part: relevance} of the whole model; value = inputs + sum of these."""
        return {part: sum(row.taken[part] for row in self.rows) for part in PARTS}

    @property
    def broken(self) -> list[tuple[int, str]]:
        """(block, part) wherever something was taken by a part that must take nothing."""
        return [
            (row.block, part)
            for row in self.rows
            for part in self.zero
            if not abs(row.taken[part]) <= row.rounding
        ]


def conservation(
    model: PreTrainedModel,
    batch: Batch,
    rule: str | Rule = "attnlrp",
    target: str | TargetFunction = "logit",
    positions: str = "last",
    memory: int | None = None,
) -> tuple[Relevance, Conservation]:
    """Explain a batch, and say where its relevance went.

    Args:
        model, rule, target, positions, memory: as in sparc3.relevance.
        batch: input_ids [B, T], attention_mask [B, T] (optional), labels [B, T] (optional).

    Raises:
        InputError: unknown architecture, rule, target or positions.
    """
    parsed = Rule.parse(rule)
    books = [_Book() for _ in range(len(blocks_of(model)) + 1)]
    with (
        relevance(model, parsed, target, positions, weights=False, memory=memory) as found,
        _watched(model, parsed, books),
    ):
        value = found.backward(batch).sum().item()
    books[-1].taken["target"] += value
    streams = [found.residual[block].sum().item() for block in range(len(books))] + [value]
    # Tiny models of every family, in fp32, bf16 and fp16, stay below 0.15 eps of their terms.
    precision = 10 * torch.finfo(model.dtype).eps
    rows = []
    for block, book in reversed(list(enumerate(books))):
        above, below = streams[block + 1], streams[block]
        book.taken["unaccounted"] = above - below - sum(book.taken.values())
        # The sums' terms cancel, so that rounding is relative to their sizes.
        terms = book.terms + found.residual[block].abs().sum().item()
        rows.append(Row(block, above, below, book.taken, precision * terms))
    return found, Conservation(rows, _zero(model, parsed, target))


def _zero(model: PreTrainedModel, rule: Rule, target: str | TargetFunction) -> tuple[str, ...]:
    """The parts that take nothing under a rule, in any sound model."""
    capped = getattr(model.config, "final_logit_softcapping", None) is not None
    experts = any(find(block, family_of(model).experts) is not None for block in blocks_of(model))
    zero = {
        "target": target in ("logit", "logit-mean", "lead", "max-logit") and not capped,
        "norms": rule.norm == rule.qknorm == "constant",
        "softmax": rule.attention == "value" and (rule.gate == "up" or not experts),
        "products": rule.activation_identity and "gradient" not in (rule.gate, rule.attention),
        "unaccounted": True,
    }
    return tuple(part for part in PARTS if zero.get(part))


class _Book:
    """What was measured in one block: relevance taken, by part, and the size of the terms of these sums."""

    def __init__(self) -> None:
        self.taken = dict.fromkeys(PARTS, 0.0)
        self.terms = 0.0

    def watch(
        self, tensor: torch.Tensor, shares: dict[str, float], factor: torch.Tensor | None = None
    ) -> None:
        """In the backward, give each part its share of gradient times the tensor, or times ``factor``."""
        if tensor.requires_grad:
            # Detached: a hook that holds its own tensor keeps the graph alive for good.
            value = (tensor if factor is None else factor).detach()
            tensor.register_hook(lambda gradient: self._enter(product(value, gradient), shares))

    def _enter(self, values: torch.Tensor, shares: dict[str, float]) -> None:
        total = values.sum().item()
        self.terms += values.abs().sum().item()
        for part, share in shares.items():
            self.taken[part] += share * total


@contextmanager
def _watched(model: PreTrainedModel, rule: Rule, books: list[_Book]) -> Iterator[None]:
    """Within the context a backward through ``model``, which has the rule on it, fills the books."""
    family = family_of(model)
    handles: list[Any] = []
    attentions: list[Any] = []

    def outputs(module: nn.Module, enter: Callable[[torch.Tensor], None]) -> None:
        handles.append(module.register_forward_hook(lambda m, args, output: enter(output)))

    def through(module: nn.Module, book: _Book, shares: dict[str, float]) -> None:
        """Share out the output's relevance less the inputs'."""
        minus = {part: -share for part, share in shares.items()}

        def before(module: nn.Module, args: tuple) -> tuple:
            # Views: their gradients are what comes through this module alone.
            views = tuple(x.view_as(x) if x.requires_grad else x for x in args)
            for view in views:
                book.watch(view, minus)
            return views

        handles.append(module.register_forward_pre_hook(before))
        outputs(module, partial(book.watch, shares=shares))

    for path, module in model.named_modules():
        book = books[_block_of(path, family.blocks, len(books) - 1)]
        bias = getattr(module, "bias", None)
        if is_norm(module):
            through(module, book, {"norms": 1.0})
            if bias is not None:
                outputs(module, partial(book.watch, shares={"biases": 1.0, "norms": -1.0}, factor=bias))
        elif isinstance(module, nn.Linear | Conv1D) and bias is not None:
            outputs(module, partial(book.watch, shares={"biases": 1.0}, factor=bias))
    outputs(model.get_output_embeddings(), partial(books[-1].watch, shares={"target": -1.0}))

    for block, book in zip(blocks_of(model), books, strict=False):
        attention: Any = find(block, family.attention)
        attention._sparc3_watch = partial(_watch_attention, book, rule)
        attentions.append(attention)
        share = _pattern_share(rule)
        into_output = partial(_watch_input, book, {"softmax": share, "products": 1.0 - share})
        handles.append(block.get_submodule(family.attention_output).register_forward_pre_hook(into_output))
        experts, mlp = find(block, family.experts), find(block, family.mlp)
        if experts is not None and mlp is not None:
            # What the MLP takes and its experts do not is the router's.
            through(mlp, book, {"softmax": 1.0})
            through(experts, book, {"products": 1.0, "softmax": -1.0})
        elif mlp is not None:
            into_down = partial(_watch_input, book, {"products": 1.0})
            handles.append(block.get_submodule(family.mlp_output).register_forward_pre_hook(into_down))
            for name in (family.gate, family.up):
                if name is not None:
                    outputs(mlp.get_submodule(name), partial(book.watch, shares={"products": -1.0}))
        else:
            through(block.get_submodule(family.activation), book, {"products": 1.0})
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in attentions:
            del attention._sparc3_watch


def _block_of(path: str, blocks: str, count: int) -> int:
    """Index of the block that a module's path lies in; ``count``, the head's, for the others."""
    below = path.removeprefix(f"{blocks}.")
    return int(below.split(".")[0]) if below != path else count


def _watch_input(book: _Book, shares: dict[str, float], module: nn.Module, args: tuple) -> None:
    book.watch(args[0], shares)


def _pattern_share(rule: Rule) -> float:
    """Share of a head's output that its attention pattern takes, and that queries and keys take of the scores."""
    return math.sqrt(rule.attention_scales[0])


def _watch_attention(
    book: _Book, rule: Rule, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """The softmax takes the pattern's relevance less the scores', of which queries and keys have a share each."""
    share = _pattern_share(rule)
    scores = 1.0 / share if share else 0.0
    book.watch(query, {"softmax": -scores, "products": scores - 1.0})
    book.watch(key, {"products": -1.0})
    book.watch(value, {"products": -1.0})
