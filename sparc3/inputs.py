"""What the weights of one block receive: sums over the reference tokens, taken by hooks while the block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparc3.families import Prunable
from sparc3.ranks import Ranks
from sparc3.samples import Batch


@dataclass
class Inputs:
    """Sums over the real tokens that one weight [..., out, in] received, fp32.

    Attributes:
        squares: [..., in], sum of x_i^2.
        tokens: [...], how many were summed.
        gram: [..., in, in], sum of x x^T, where asked for; weights with the same input share the tensor.
    """

    squares: torch.Tensor
    tokens: torch.Tensor
    gram: torch.Tensor | None = None

    @property
    def norms(self) -> torch.Tensor:
        """||X_i||_2, [..., in]."""
        return self.squares.sqrt()


def observe(
    samples: Sequence[Batch],
    weights: Mapping[str, Prunable],
    run: Callable[[int], torch.Tensor],
    gram: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    total: int | None = None,
) -> tuple[dict[str, Inputs], list[torch.Tensor]]:
    """Run every batch and watch the inputs of ``weights``.

    Each batch's sums are made by themselves and added in the order of batches, in whatever process they are made.

    Args:
        run: runs a batch by its number.
        gram: sum the second moments too.
        ranks: the processes that share the batches in turns (Ranks.deal), of which ``samples`` are this one's.
        total: how many batches all processes have; None: this is the only one.

    Returns:
        (inputs by name, of all processes' batches in the one that writes and none in the others; what ``run``
        returned for each batch).
    """
    watcher = _Watcher(weights, gram)
    outputs = []
    with watcher.hooks():
        for number, batch in enumerate(samples):
            mask = batch["attention_mask"] if "attention_mask" in batch else None
            watcher.real = (torch.ones_like(batch["input_ids"]) if mask is None else mask).reshape(-1).bool()
            outputs.append(run(number))
            watcher.latest = None
            if ranks.writes:
                for sender in ranks.others_in_turn(number, len(samples) if total is None else total):
                    ranks.add_from(sender, watcher.parts())
            else:
                ranks.give(watcher.parts())
    return (watcher.inputs() if ranks.writes else {}), outputs


class _Watcher:
    """Sums each weight's inputs; linears that get the very same tensor (q, k and v) share their sums."""

    real: torch.Tensor  # [B * T] bool
    latest: tuple[str, torch.Tensor] | None = None

    def __init__(self, weights: Mapping[str, Prunable], gram: bool) -> None:
        self.weights, self.gram = weights, gram
        self.sums: dict[str, Inputs] = {}
        self.shared: dict[str, str] = {}

    def parts(self) -> Iterator[torch.Tensor]:
        """Every sum, one weight's, or one expert's, at a time; in an order that is the same in all processes."""
        for sums in self.sums.values():
            yield sums.squares
            yield sums.tokens
            yield from _grams(sums)

    def inputs(self) -> dict[str, Inputs]:
        for sums in self.sums.values():
            for gram in _grams(sums):
                _mirror_(gram)
        return {name: self.sums[self.shared.get(name, name)] for name in self.weights}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles, experts = [], dict[nn.Module, dict[str, str]]()
        for name, weight in self.weights.items():
            if weight.attribute == "weight":
                handles.append(weight.module.register_forward_pre_hook(self._linear_hook(name)))
            else:
                experts.setdefault(weight.module, {})[weight.attribute] = name
                self._sums_of(name)  # also those of experts that see no token
        handles += [
            module.register_forward_pre_hook(self._experts_hook(names)) for module, names in experts.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _sums_of(self, name: str) -> Inputs:
        if name not in self.sums:
            weight = self.weights[name]
            row = weight.canonical(weight.weight)[..., 0, :]
            squares = torch.zeros_like(row, dtype=torch.float32)
            grams = squares.new_zeros((*row.shape, row.shape[-1])) if self.gram else None
            self.sums[name] = Inputs(squares, squares.new_zeros(squares.shape[:-1]), grams)
        return self.sums[name]

    def _linear_hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if self.latest is not None and self.latest[1] is args[0]:
                self.shared[name] = self.latest[0]
                return
            self.latest = (name, args[0])
            x = args[0].reshape(-1, args[0].shape[-1])[self.real].float()
            sums = self._sums_of(name)
            sums.squares.add_(x.square().sum(0))
            sums.tokens += len(x)
            if sums.gram is not None:
                _add_products_(sums.gram, x)

        return hook

    def _experts_hook(self, names: Mapping[str, str]) -> Callable:
        def hook(module: Any, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            x, chosen, _ = args
            for expert in torch.unique(chosen).tolist():
                if expert >= module.gate_up_proj.shape[0]:
                    continue
                received = x[(chosen == expert).any(-1) & self.real]
                if "gate_up_proj" in names:
                    self._add_expert(names["gate_up_proj"], expert, received)
                if "down_proj" in names:
                    # down_proj's inputs never leave the fused module: they are computed once more.
                    gate, up = F.linear(received, module.gate_up_proj[expert]).chunk(2, dim=-1)
                    self._add_expert(names["down_proj"], expert, module.act_fn(gate) * up)

        return hook

    def _add_expert(self, name: str, expert: int, x: torch.Tensor) -> None:
        sums, x = self._sums_of(name), x.float()
        sums.squares[expert] += x.square().sum(0)
        sums.tokens[expert] += len(x)
        if sums.gram is not None:
            _add_products_(sums.gram[expert], x)


def _grams(sums: Inputs) -> Sequence[torch.Tensor]:
    """The second moments, a matrix for each expert."""
    if sums.gram is None:
        return ()
    return tuple(sums.gram.flatten(0, -3)) if sums.gram.dim() > 2 else (sums.gram,)


# Columns of second moments are taken in so many blocks, those left of a block are not formed: 10 of 16.
_BLOCKS = 4


def _blocks(width: int) -> Iterator[slice]:
    step = -(-width // _BLOCKS)
    return (slice(start, min(start + step, width)) for start in range(0, width, step))


def _add_products_(gram: torch.Tensor, x: torch.Tensor) -> None:
    """gram [in, in] += x^T x, of x [tokens, in], but for the blocks below its diagonal."""
    for block in _blocks(x.shape[1]):
        # Not addmm_, whose sum may differ from adding a product that another process made.
        gram[block, block.start :] += x[:, block].T @ x[:, block.start :]


def _mirror_(gram: torch.Tensor) -> None:
    """Fill what ``_add_products_`` left out."""
    for block in _blocks(len(gram)):
        gram[block.stop :, block] = gram[block, block.stop :].T
