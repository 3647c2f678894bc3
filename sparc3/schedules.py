"""The sequential schedule: one forward sweep in which each block sees the pruned blocks before it.

Wanda (Sun et al. 2023, arXiv 2306.11695): score = |W[j, i]| * ||X_i||_2.
RIA (Zhang et al. 2024, ICLR): score = (|W[j, i]| / sum_i |W[j, i]| + |W[j, i]| / sum_j |W[j, i]|) * ||X_i||_2 ^ a,
a = 1/2. X_i is the i-th input of the linear over all reference tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparc3.engine import Blocks
from sparc3.families import Prunable, family_of
from sparc3.samples import Batch
from sparc3.wrap import frozen

Progress = Callable[[int], None]
# (name, scores [..., out, in]) -> kept [..., out, in] bool
Selector = Callable[[str, torch.Tensor], torch.Tensor]
_RIA_POWER = 0.5


def activation_scores(
    model: PreTrainedModel,
    samples: Sequence[Batch],
    method: str,
    weights: Mapping[str, Prunable],
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Wanda's or RIA's scores of the dense model, in one pass."""
    scores: dict[str, torch.Tensor] = {}
    sweep(model, samples, method, weights, lambda name, tensor: scores.update({name: tensor}), progress)
    return scores


def sequential_masks(
    model: PreTrainedModel,
    samples: Sequence[Batch],
    method: str,
    weights: Mapping[str, Prunable],
    select: Selector,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """What Wanda or RIA keeps, each block scored on the outputs of the pruned blocks before it.

    Args:
        select: kept weights (bool) from a name and its scores, canonical [..., out, in].

    Returns:
        kept, bool [..., out, in], by name. The model is unchanged.
    """
    kept: dict[str, torch.Tensor] = {}

    def prune(name: str, scores: torch.Tensor) -> torch.Tensor:
        kept[name] = select(name, scores)
        return kept[name]

    sweep(model, samples, method, weights, prune, progress)
    return kept


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    samples: Sequence[Batch],
    method: str,
    weights: Mapping[str, Prunable],
    visit: Callable[[str, torch.Tensor], torch.Tensor | None],
    progress: Progress | None = None,
) -> None:
    """Block by block: observe inputs, score, let ``visit`` prune, and go on with the block's outputs.

    Where ``visit`` returns kept weights the block's outputs are computed with the others at zero; the weights
    are put back before the next block. ``progress`` is called with samples-equivalents that add up to the number
    of samples.
    """
    with frozen(model):
        blocks = Blocks(model)
        recorded = [blocks.record(batch) for batch in samples]
        hidden = [first for first, _ in recorded]
        total, reported = sum(len(batch["input_ids"]) for batch in samples), 0
        prefix = family_of(model).blocks

        def run_block(index: int, number: int) -> torch.Tensor:
            return blocks.run(index, hidden[number], recorded[number][1][index])

        def run_head(number: int) -> torch.Tensor:
            everywhere = torch.arange(hidden[number].shape[1], device=hidden[number].device)
            blocks.logits(hidden[number], samples[number], everywhere)
            return hidden[number]

        for index in range(len(blocks.blocks)):
            of_block = {
                name: weight for name, weight in weights.items() if name.startswith(f"{prefix}.{index}.")
            }
            norms, outputs = _observe(samples, of_block, partial(run_block, index))
            kept = {
                name: visit(name, _scores(weight, norms[name], method)) for name, weight in of_block.items()
            }
            if any(keep is not None for keep in kept.values()):
                with _pruned(of_block, kept):
                    outputs = [run_block(index, number) for number in range(len(samples))]
            hidden = outputs
            if progress is not None:
                done = total * (index + 1) // len(blocks.blocks)
                progress(done - reported)
                reported = done
        of_head = {name: weight for name, weight in weights.items() if not name.startswith(f"{prefix}.")}
        if of_head:
            norms, _ = _observe(samples, of_head, run_head)
            for name, weight in of_head.items():
                visit(name, _scores(weight, norms[name], method))


def _observe(
    samples: Sequence[Batch], weights: Mapping[str, Prunable], run: Callable[[int], torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """(||X_i||_2 of each weight's inputs over the real tokens, what ``run`` returns for each batch)."""
    squares = {
        name: torch.zeros_like(weight.canonical(weight.weight)[..., 0, :], dtype=torch.float32)
        for name, weight in weights.items()
    }
    real = torch.empty(0)

    def linear_hook(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            squares[name].add_(x[real].float().square().sum(0))

        return hook

    def experts_hook(names: Mapping[str, str]) -> Callable:
        def hook(module: nn.Module, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            _observe_experts(module, *args, real, {key: squares[name] for key, name in names.items()})

        return hook

    experts: dict[nn.Module, dict[str, str]] = {}
    handles = []
    for name, weight in weights.items():
        if weight.attribute == "weight":
            handles.append(weight.module.register_forward_pre_hook(linear_hook(name)))
        else:
            experts.setdefault(weight.module, {})[weight.attribute] = name
    handles += [module.register_forward_pre_hook(experts_hook(names)) for module, names in experts.items()]
    try:
        outputs = []
        for number, batch in enumerate(samples):
            mask = (
                batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
            )
            real = mask.reshape(-1).bool()
            outputs.append(run(number))
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt_() for name, total in squares.items()}, outputs


def _observe_experts(
    module: Any,
    x: torch.Tensor,
    chosen: torch.Tensor,
    router_weights: torch.Tensor,
    real: torch.Tensor,
    squares: Mapping[str, torch.Tensor],
) -> None:
    """Add each expert's squared inputs; the inputs of down_proj are recomputed."""
    for expert in torch.unique(chosen).tolist():
        if expert >= module.gate_up_proj.shape[0]:
            continue
        inputs = x[(chosen == expert).any(-1) & real]
        if "gate_up_proj" in squares:
            squares["gate_up_proj"][expert] += inputs.float().square().sum(0)
        if "down_proj" in squares:
            gate, up = F.linear(inputs, module.gate_up_proj[expert]).chunk(2, dim=-1)
            squares["down_proj"][expert] += (module.act_fn(gate) * up).float().square().sum(0)


def _scores(weight: Prunable, norms: torch.Tensor, method: str) -> torch.Tensor:
    """[..., out, in] from the weight and the norms [..., in] of its inputs; -inf where the weight is zero."""
    size = weight.canonical(weight.weight).detach().float().abs()
    scale = norms.unsqueeze(-2)
    if method == "ria":
        # A row or column of zeros scores zero instead of 0/0.
        rows, columns = size.sum(-1, keepdim=True), size.sum(-2, keepdim=True)
        size = size / rows.clamp_min(1e-30) + size / columns.clamp_min(1e-30)
        scale = scale**_RIA_POWER
    scores = size * scale
    return scores.masked_fill_(weight.canonical(weight.weight) == 0, -torch.inf).contiguous()


@contextmanager
def _pruned(weights: Mapping[str, Prunable], kept: Mapping[str, torch.Tensor | None]) -> Iterator[None]:
    """Within the context the weights that are not kept are zero; afterwards they are back, bit for bit."""
    dense = {
        name: weight.weight.detach().clone() for name, weight in weights.items() if kept[name] is not None
    }
    try:
        for name in dense:
            weight = weights[name]
            weight.weight.masked_fill_(~weight.canonical(kept[name]), 0)  # type: ignore[arg-type]
        yield
    finally:
        for name, values in dense.items():
            weights[name].weight.copy_(values)
