"""Scores of weights: how much each one matters, one tensor a prunable weight.

Relevance of a weight (arXiv 2506.13727, Eq. 8): R_W[j, i] = W[j, i] * sum_t g[t, j] x[t, i], with g the
relevance (or gradient) of the linear's output and x its input. Over samples s it is reduced to

============ ====================== ==========================================================
reduce       score                  source
============ ====================== ==========================================================
signed       W * sum_s G_s^T X_s    the paper's Eq. 1; ranked by magnitude when pruning
abs          |W| sum_s |G_s^T X_s|  SNIP on samples (Wei et al. 2024)
square       W^2 sum_s (G_s^T X_s)^2
token-square W^2 (G*G)^T (X*X)      every token its own sample: the empirical Fisher's diagonal
============ ====================== ==========================================================

A weight that is already zero scores -inf, so that it is pruned first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sparc3_kernels.weight_relevance import REDUCTIONS, accumulate_weight_relevance_
from sparc3_kernels.weight_score import weight_scores_
from transformers import PreTrainedModel

from sparc3.engine import Blocks, attribute_batch
from sparc3.errors import InputError
from sparc3.families import Prunable, prunable
from sparc3.rules import Rule
from sparc3.samples import Batch, batches
from sparc3.targets import TargetFunction, check_target
from sparc3.wrap import wrap

if TYPE_CHECKING:
    from sparc3.mask import Mask

# Tokens that go through the model at once; more fill a GEMM no better. A CPU's are full with fewer, whose activations
# a given memory holds of more blocks, so that less is recomputed.
TOKENS_IN_FLIGHT, TOKENS_ON_CPU = 2048, 512
# Weights that relevance is multiplied with at once, so that the temporaries stay small beside the largest tensor.
_SCORED_AT_ONCE = 1 << 22

Progress = Callable[[int], None]


@dataclass
class Scores:
    """One fp32 tensor [..., out, in] a weight, and how it was made.

    Attributes:
        tensors: by state-dict name, canonical orientation.
        transposed: names stored as [in, out].
        fingerprint: of the model that was scored (sparc3.mask.fingerprint).
        settings: method, rule, target, reduce, samples, length, ... as plain JSON values.
    """

    tensors: dict[str, torch.Tensor]
    transposed: frozenset[str] = frozenset()
    fingerprint: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())

    def select(
        self,
        sparsity: float | None,
        pattern: str = "row",
        by: str = "magnitude",
        budgets: Mapping[str, float] | None = None,
    ) -> Mask:
        """The mask that prunes the lowest scores; see sparc3.select.select."""
        from sparc3.select import select

        return select(self, sparsity, pattern, by, budgets)


class Accumulators:
    """One fp32 accumulator a weight, filled in the backward of each linear (a sparc3.autograd.WeightSink).

    Args:
        held: the weights that have their accumulators now; None: all of them.
    """

    def __init__(
        self,
        weights: Mapping[str, Prunable],
        reduce: str,
        skip_first: bool = False,
        held: Sequence[str] | None = None,
    ) -> None:
        self.weights, self.reduce, self.skip_first = weights, reduce, skip_first
        self.samples = 1
        self.sums: dict[str, torch.Tensor] = {}
        self.hold(list(weights) if held is None else held)

    def hold(self, names: Sequence[str]) -> None:
        """Give these weights accumulators of zeros."""
        for name in names:
            weight = self.weights[name]
            self.sums[name] = torch.zeros_like(
                weight.canonical(weight.weight), dtype=torch.float32
            ).contiguous()

    def take(self) -> dict[str, torch.Tensor]:
        """``scores`` of what is held, which is held no more."""
        found = self.scores()
        self.sums = {}
        return found

    def linear(self, name: str, g: torch.Tensor, x: torch.Tensor) -> None:
        if self.skip_first:
            g = g.masked_fill(self.first[:, None], 0)
        g, x = g.view(self.samples, -1, g.shape[-1]), x.view(self.samples, -1, x.shape[-1])
        accumulate_weight_relevance_(self.sums[name], g, x, self.reduce)

    def expert(self, name: str, index: int, g: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor) -> None:
        sample = torch.div(tokens, self.length, rounding_mode="floor")
        if self.skip_first:
            g = g.masked_fill(self.first[tokens, None], 0)
        for number in torch.unique(sample).tolist():
            of_sample = sample == number
            accumulate_weight_relevance_(
                self.sums[name][index], g[of_sample][None], x[of_sample][None], self.reduce
            )

    def start(self, batch: Batch) -> None:
        """Say which samples the next backward is about."""
        ids = batch["input_ids"]
        self.samples, self.length = ids.shape
        mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
        # The first real token of each sample, sample-major: padding may be on the left.
        self.first = ((mask.cumsum(1) == 1) & (mask == 1)).view(-1)

    def scores(self) -> dict[str, torch.Tensor]:
        """The accumulated sums times W, |W| or W^2, in place; zero weights become -inf."""
        for name, total in self.sums.items():
            weight = self.weights[name].canonical(self.weights[name].weight).detach()
            rows = max(1, _SCORED_AT_ONCE // total.shape[-1])
            for part in zip(total.flatten(0, -2).split(rows), weight.flatten(0, -2).split(rows), strict=True):
                weight_scores_(*part, self.reduce)
        return self.sums


def attribute(
    model: PreTrainedModel,
    samples: torch.Tensor | Sequence[Batch],
    method: str = "lrp",
    *,
    rule: str | Rule = "attnlrp",
    target: str | TargetFunction = "logprob",
    positions: str = "all",
    reduce: str = "abs",
    skip_first: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score every prunable weight of ``model``.

    Args:
        model: a causal language model of a declared family; unchanged afterwards.
        samples: windows [N, T] int64 (sparc3.samples.windows), or batches with input_ids, attention_mask and
            optionally labels [B, T]. A row is a reference sample. Not read by ``magnitude`` and ``random``.
        method: lrp | gradient (the same with no rule on) | wanda | ria (one pass over the dense model; the
            sequential schedule is sparc3.prune's) | magnitude | random.
        rule: for lrp, see sparc3.rules.
        target, positions: what is explained, see sparc3.targets.
        reduce: how samples are reduced, see the module's table.
        skip_first: leave out the first token's share (attention sinks live there).
        include, exclude: shell patterns on state-dict names.
        seed: of ``random``.
        memory: bytes for kept activations, see sparc3.engine.
        progress: called with the number of samples done since the last call.

    Raises:
        InputError: unknown method, rule, target, positions or reduction; a rule that gives some weights zero
            relevance by construction; a sample with a non-finite relevance.
    """
    from sparc3.mask import fingerprint
    from sparc3.schedules import activation_scores

    parsed = check_settings(method, rule=rule, target=target, positions=positions, reduce=reduce)
    weights = prunable(model, include, exclude)
    settings: dict[str, Any] = {"method": method}
    if method in ("lrp", "gradient"):
        sink = Accumulators(weights, reduce, skip_first)
        settings |= {
            "rule": str(parsed),
            "target": target if isinstance(target, str) else getattr(target, "__name__", "callable"),
            "positions": positions,
            "reduce": reduce,
            "skip_first": skip_first,
        }
        accumulate(
            model, as_batches(model, samples), parsed, target, positions, weights, sink, memory, progress
        )
        tensors = sink.scores()
    elif method in ("wanda", "ria"):
        tensors = activation_scores(model, as_batches(model, samples), method, weights, progress)
    else:
        tensors = {
            name: sample_free_score(weight, position, method, seed)
            for position, (name, weight) in enumerate(weights.items())
        }
        settings |= {"seed": seed} if method == "random" else {}
    check_finite_scores(tensors, weights)
    return Scores(
        tensors,
        frozenset(name for name, weight in weights.items() if weight.transposed),
        fingerprint(model, {name: weight.weight for name, weight in weights.items()}),
        settings,
    )


METHODS = ("lrp", "gradient", "wanda", "ria", "magnitude", "random")


def check_settings(
    method: str,
    *,
    rule: str | Rule = "attnlrp",
    target: str | TargetFunction = "logprob",
    positions: str = "all",
    reduce: str = "abs",
    skip_first: bool = False,
) -> Rule:
    """The rule that a method scores by; InputError where ``attribute`` would refuse these, whatever the model."""
    if method not in METHODS:
        raise InputError(f"method {method!r} is not known; use {' | '.join(METHODS)}")
    parsed = Rule.parse(rule)
    if method == "lrp" and parsed.zero_parts():
        raise InputError(
            f"rule {parsed} gives exactly zero relevance to {' and '.join(parsed.zero_parts())}, "
            "so it cannot score them; use another rule, or sparc3.relevance for tokens and neurons"
        )
    check_target(target, positions)
    if reduce not in REDUCTIONS:
        raise InputError(f"reduce {reduce!r} is not known; use {' | '.join(REDUCTIONS)}")
    return parsed if method == "lrp" else Rule.parse("gradient")


def accumulate(
    model: PreTrainedModel,
    samples: Sequence[Batch],
    rule: Rule,
    target: str | TargetFunction,
    positions: str,
    weights: Mapping[str, Prunable],
    sink: Accumulators,
    memory: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Run every batch through the engine under ``rule`` and fill ``sink``; see ``attribute``."""
    with wrap(model, rule, weights, sink):
        blocks = Blocks(model)
        for batch in samples:
            sink.start(batch)
            value, _, _ = attribute_batch(blocks, batch, target, positions, memory)
            check_explained(value)
            if progress is not None:
                progress(len(batch["input_ids"]))


def check_explained(value: torch.Tensor) -> None:
    """InputError where one of the explained scalars [B] is not finite."""
    if not torch.isfinite(value).all():
        row = int(torch.nonzero(~torch.isfinite(value))[0])
        raise InputError(f"the explained scalar of sample {row} of a batch is {value[row].item()}")


def as_batches(model: PreTrainedModel, samples: torch.Tensor | Sequence[Batch]) -> list[Batch]:
    """Windows [N, T] or batches as a list of batches on the model's device; InputError if there are none."""
    return batches_on(model.device, samples)


def batches_on(device: torch.device, samples: torch.Tensor | Sequence[Batch]) -> list[Batch]:
    """``as_batches`` on a given device."""
    if len(samples) == 0:
        raise InputError("no reference samples are given")
    if isinstance(samples, torch.Tensor):
        samples = list(batches(samples, windows_at_once(device.type, samples.shape[1])))
    return [{name: value.to(device) for name, value in batch.items()} for batch in samples]


def windows_at_once(kind: str, length: int) -> int:
    """How many windows of ``length`` tokens make a batch on a kind of device ("cpu", "cuda")."""
    return max(1, (TOKENS_ON_CPU if kind == "cpu" else TOKENS_IN_FLIGHT) // max(1, length))


def sample_free_score(weight: Prunable, position: int, method: str, seed: int) -> torch.Tensor:
    """Magnitude's or random's score [..., out, in] of the weight at a position in the model; -inf where it is 0."""
    stored = weight.canonical(weight.weight).detach()
    if method == "magnitude":
        scores = stored.float().abs()
    else:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        scores = torch.rand(stored.shape, generator=generator).to(stored.device)
    return scores.masked_fill_(stored == 0, -torch.inf).contiguous()


def check_finite_scores(tensors: Mapping[str, torch.Tensor], weights: Mapping[str, Prunable]) -> None:
    """InputError where a weight that is not zero has a score that is not finite."""
    for name, scores in tensors.items():
        weight = weights[name].canonical(weights[name].weight)
        if not (scores.isfinite() | (weight == 0)).all():
            dtype = str(weight.dtype).removeprefix("torch.")
            raise InputError(
                f"the scores of {name} are not finite; the model overflows in {dtype}: run it with "
                "--dtype float32 or bfloat16"
            )
