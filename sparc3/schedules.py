"""The sequential schedule: one forward sweep in which each block sees the pruned blocks before it.

Wanda (Sun et al. 2023, arXiv 2306.11695): score = |W[j, i]| * ||X_i||_2.
RIA (Zhang et al. 2024, ICLR): score = (|W[j, i]| / sum_i |W[j, i]| + |W[j, i]| / sum_j |W[j, i]|) * ||X_i||_2 ^ a,
a = 1/2. X_i is the i-th input of the linear over all reference tokens.
GBLM (Das et al. 2023, arXiv 2311.04902): score = |W[j, i]| * (||X_i||_2 / sqrt(N) + 100 ||G[j, i]||_2), over N
samples, G the gradients of each sample's mean loss on the dense model; N and 100 as in its published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel

from sparc3.engine import Blocks
from sparc3.families import Prunable, family_of
from sparc3.inputs import Inputs, observe
from sparc3.ranks import Ranks
from sparc3.samples import Batch
from sparc3.targets import next_tokens
from sparc3.weights import WeightSource
from sparc3.wrap import frozen

Progress = Callable[[int], None]
# (name, what the weight received) -> new values [..., out, in], or None to leave the weight
Visitor = Callable[[str, Inputs], torch.Tensor | None]
# (index of a block, or their number for what is outside of them, what comes out of it [B, T, D] for each batch)
Done = Callable[[int, list[torch.Tensor]], None]
_RIA_POWER, _GBLM_GRADIENT = 0.5, 100.0
# Of sparc3.attribute by the gradient: what ``gblm_gradients_`` begins with.
GBLM_SETTINGS = {"target": "logprob", "reduce": "square"}


def activation_scores(
    model: PreTrainedModel,
    samples: Sequence[Batch],
    method: str,
    weights: Mapping[str, Prunable],
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Wanda's or RIA's scores of the dense model, in one pass."""
    scores: dict[str, torch.Tensor] = {}

    def score(name: str, inputs: Inputs) -> None:
        scores[name] = activation_score(weights[name], inputs, method)

    sweep(model, samples, weights, score, progress)
    return scores


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    samples: Sequence[Batch],
    weights: Mapping[str, Prunable],
    visit: Visitor,
    progress: Progress | None = None,
    *,
    gram: bool = False,
    source: WeightSource | None = None,
    home: torch.device | None = None,
    done: Done | None = None,
    start: int = 0,
    received: Sequence[torch.Tensor] = (),
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    prunes: bool = True,
) -> None:
    """Block by block: observe inputs, let ``visit`` give new values, and go on with the block's new outputs.

    The weights are put back, bit for bit, before the next block.

    Args:
        visit: called once for each weight, with what it received while its whole block was still dense.
        progress: called with samples-equivalents that add up to the number of samples.
        gram: sum the second moments of the inputs.
        source: brings the weights; None: they are all in the model.
        home: where what blocks hand on is kept meanwhile; None: where it is.
        done: is told of each block that is done, its weights dense and still there.
        start, received: go on at this block with what it receives, [B, T, D] for each batch.
        ranks: this process among those that share the samples; each calls this with all of them, and ``visit`` is
            called in the one that writes. ``done`` is told of this process's batches (Ranks.deal).
        prunes: whether ``visit`` gives new values, for the processes that wait for them.
    """
    count = len(samples)
    samples = ranks.deal(samples)
    with frozen(model):
        blocks = Blocks(model, source)
        with blocks.source.outside():
            recorded = [blocks.record(batch) for batch in samples]
        hidden = list(received) if start else [first.to(home or first.device) for first, _ in recorded]
        total, reported = sum(len(batch["input_ids"]) for batch in samples), 0
        prefix = family_of(model).blocks

        def run_block(index: int, states: list[torch.Tensor], number: int) -> torch.Tensor:
            received = states[number].to(samples[number]["input_ids"].device)
            output = blocks.run(index, received, recorded[number][1][index])
            return output.to(home or output.device)

        def run_head(states: list[torch.Tensor], number: int) -> torch.Tensor:
            device = samples[number]["input_ids"].device
            everywhere = torch.arange(states[number].shape[1], device=device)
            blocks.logits(states[number].to(device), samples[number], everywhere)
            return states[number]

        def visit_all(
            some: Mapping[str, Prunable], run: Callable[[list[torch.Tensor], int], torch.Tensor]
        ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
            inputs, outputs = observe(samples, some, partial(run, hidden), gram, ranks, count)
            values = {}
            for name, weight in some.items():
                value = visit(name, inputs[name]) if ranks.writes else None
                if prunes and ranks.size > 1:
                    canonical = weight.canonical(weight.weight)
                    value = ranks.copied(torch.empty_like(canonical) if value is None else value)
                if value is not None:
                    values[name] = value
            return values, outputs

        depth = len(blocks.blocks)
        of_head = {name: weight for name, weight in weights.items() if not name.startswith(f"{prefix}.")}
        # Whether anything reads what the last block puts out.
        goes_on = bool(of_head) or done is not None
        for index in blocks.source.visit(range(start, depth)):
            of_block = {
                name: weight for name, weight in weights.items() if name.startswith(f"{prefix}.{index}.")
            }
            values, hidden_then = visit_all(of_block, partial(run_block, index))
            if values and (index + 1 < depth or goes_on):
                with _replaced(of_block, values):
                    hidden_then = [run_block(index, hidden, number) for number in range(len(samples))]
            hidden = hidden_then
            if done is not None:
                done(index, hidden)
            if progress is not None:
                share = total * (index + 1) // depth
                progress(share - reported)
                reported = share
        if goes_on:
            with blocks.source.outside():
                if of_head:
                    visit_all(of_head, run_head)
                if done is not None:
                    done(depth, hidden)


def activation_score(weight: Prunable, inputs: Inputs, method: str) -> torch.Tensor:
    """Wanda's or RIA's score [..., out, in] of a weight; -inf where the weight is zero."""
    size = weight.canonical(weight.weight).detach().float().abs()
    scale = inputs.norms.unsqueeze(-2)
    if method == "ria":
        # A row or column of zeros scores zero instead of 0/0.
        rows, columns = size.sum(-1, keepdim=True), size.sum(-2, keepdim=True)
        size = size / rows.clamp_min(1e-30) + size / columns.clamp_min(1e-30)
        scale = scale**_RIA_POWER
    scores = size * scale
    return scores.masked_fill_(weight.canonical(weight.weight) == 0, -torch.inf).contiguous()


def gblm_gradients_(scores: torch.Tensor, samples: Sequence[Batch]) -> torch.Tensor:
    """|W| ||G||_2, in place of the gradient's scores under ``GBLM_SETTINGS``; G as in the module."""
    predicted = sum(int((next_tokens(batch) >= 0).sum()) for batch in samples)
    # The engine explains sums over tokens; the loss is their mean.
    return scores.clamp_(min=0).sqrt_().mul_(sum(len(batch["input_ids"]) for batch in samples) / predicted)


def gblm_score(weight: Prunable, inputs: Inputs, gradients: torch.Tensor, samples: int) -> torch.Tensor:
    """GBLM's score [..., out, in] from ``gradients`` = |W| ||G||_2; -inf where the weight is zero."""
    return activation_score(weight, inputs, "wanda") / math.sqrt(samples) + _GBLM_GRADIENT * gradients


@contextmanager
def _replaced(weights: Mapping[str, Prunable], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the context the weights have other values [..., out, in]; afterwards they are back, bit for bit."""
    dense = {name: weights[name].weight.detach().clone() for name in values}
    try:
        for name, value in values.items():
            weights[name].weight.copy_(weights[name].canonical(value))
        yield
    finally:
        for name, stored in dense.items():
            weights[name].weight.copy_(stored)
