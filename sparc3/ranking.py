"""How much each weight or component of a model matters to a task: the scores that circuits are ranked by.

==================== ============================================ ====================================
method               component c of channels x, with zero for x'  weight W
==================== ============================================ ====================================
lrp                  sum (x - x') g, g under an LRP rule          W dd/dW under the rule
gradient             the same with the plain gradient             W dd/dW
integrated-gradients the same with g averaged along a path        W times dd/dW averaged along it
activation           sum |x - x'|
wanda                sum_i ||x_i||_2 sum_j |W[j, i]|              |W[j, i]| ||x_i||_2
magnitude            sum of |W| that is the component's own       |W|
random               uniform                                      uniform
exact                d(model) - d(model without c)
==================== ============================================ ====================================

Sums run over tokens and channels (by token-abs over channels alone), d is the logit difference (sparc3.tasks), x'
what replaces x when the component is ablated (sparc3.ablation). So scores stand for the effect of the very ablation
that is asked for.
Where a norm N stands between a component and the residual stream (Gemma), lrp of all but neurons is
sum (N(y) - N(y')) g, y what enters N, y' the same with c ablated, g what comes back to N's output: by Euler's theorem
y times the derivative of N, which no scale of y changes, is zero.
The path goes straight from the embedded corrupted prompt to the clean one (Hanna et al. 2024, arXiv 2403.17806), here
in 5 steps by the midpoint rule.
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

from sparc3.ablation import (
    ABLATIONS,
    Progress,
    Replacement,
    ablated_differences,
    activations,
    differences,
    replacement,
)
from sparc3.engine import Blocks, attribute_batch
from sparc3.errors import InputError
from sparc3.families import prunable
from sparc3.mask import fingerprint
from sparc3.rules import Rule
from sparc3.scores import Accumulators, Scores, accumulate, attribute
from sparc3.targets import Batch
from sparc3.tasks import TASK_TARGETS
from sparc3.units import Components, Site, at_outputs, at_sites
from sparc3.wrap import frozen, wrap

COMPONENT_METHODS = (
    "lrp",
    "gradient",
    "integrated-gradients",
    "activation",
    "wanda",
    "magnitude",
    "random",
    "exact",
)
WEIGHT_METHODS = ("lrp", "gradient", "integrated-gradients", "wanda", "magnitude", "random")
# [rows, n] of one batch -> [n], summed over its rows: its samples or, where every token is by itself, their tokens.
COMPONENT_REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "signed": lambda values: values.sum(0),
    "abs": lambda values: values.abs().sum(0),
    "square": lambda values: values.square().sum(0),
    "token-abs": lambda values: values.abs().sum(0),
}
_STEPS = 5


# Weights -----------------------------------------------------------------------------------------------------------


def score_weights(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    method: str,
    *,
    rule: str | Rule = "attnlrp",
    target: str = "difference",
    reduce: str = "signed",
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Scores of all prunable weights for the task of ``batches`` (sparc3.tasks.task_batches).

    Args:
        rule, reduce: as in sparc3.attribute; the reduction of integrated gradients is always signed.
        target: what lrp and the gradients explain, of sparc3.tasks.TASK_TARGETS.
        progress: called with the number of samples done since the last call.

    Raises:
        InputError: as sparc3.attribute.
    """
    if method not in WEIGHT_METHODS:
        raise InputError(f"method {method!r} does not score weights; use {' | '.join(WEIGHT_METHODS)}")
    check_task_target(target)
    if method != "integrated-gradients":
        return attribute(
            model,
            batches,
            method,
            rule=rule,
            target=TASK_TARGETS[target],
            reduce=reduce,
            seed=seed,
            progress=progress,
        )
    weights = prunable(model)
    sink = Accumulators(weights, "signed")
    for batch in batches:
        for share in _midpoints():
            with _interpolated(model, batch, share):
                accumulate(model, [batch], Rule.parse("gradient"), TASK_TARGETS[target], "all", weights, sink)
        if progress is not None:
            progress(len(batch["input_ids"]))
    return Scores(
        {name: total / _STEPS for name, total in sink.scores().items()},
        frozenset(name for name, weight in weights.items() if weight.transposed),
        fingerprint(model, {name: weight.weight for name, weight in weights.items()}),
        {"method": method, "target": target, "reduce": "signed", "steps": _STEPS},
    )


# Components --------------------------------------------------------------------------------------------------------


def score_components(
    model: PreTrainedModel,
    found: Components,
    batches: Sequence[Batch],
    method: str,
    *,
    ablation: str = "zero",
    rule: str | Rule = "attnlrp",
    target: str = "difference",
    reduce: str = "signed",
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Scores [n] float64 of components, a mean over samples; see the module's table.

    Args:
        batches: of sparc3.tasks.task_batches.
        ablation: zero | mean | patch, what the score stands for; means are taken over ``batches``.
        rule: for lrp; CP is welcome here.
        target: what lrp and the gradients explain, of sparc3.tasks.TASK_TARGETS.
        reduce: signed | abs | square, how lrp, gradient and integrated-gradients are taken over samples; token-abs is
            abs with every token its own sample.
        progress: called with the number of samples done since the last call.

    Raises:
        InputError: unknown method, ablation or reduction, exact ablation of neurons, or scores that are not finite.
    """
    check_component_settings(found.unit, method, ablation, reduce)
    check_task_target(target)
    samples = sum(len(batch["input_ids"]) for batch in batches)
    replace = replacement(model, found, ablation, batches)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(found.names), generator=generator, dtype=torch.float64)
    if method == "magnitude":
        return found.gather(_magnitudes(model, found)).cpu()
    if method == "wanda":
        return _wanda(model, found, batches, progress)
    if method == "exact":
        each = ~torch.eye(len(found.names), dtype=torch.bool)
        share = samples / (len(batches) * len(each))
        tell = None if progress is None else lambda _: progress(share)  # type: ignore[arg-type]
        without = ablated_differences(model, found, batches, list(each), replace, tell)
        scores = (differences(model, batches) - without).double().mean(1)
    else:
        parsed = Rule.parse(rule if method == "lrp" else "gradient")
        shares = _midpoints() if method == "integrated-gradients" else [1.0]
        scores = torch.zeros(len(found.names), dtype=torch.float64)
        # A neuron is a small part of what its norm sees, and there are too many to take out one by one.
        behind = method == "lrp" and found.unit != "neuron"
        through = {site.name: site.norm for site in found.sites if behind and site.norm is not None}
        with wrap(model, parsed):
            for batch in batches:
                path = None if method == "activation" else shares
                each = _of_batch(
                    model, found, batch, replace, target, path, reduce.startswith("token"), through
                )
                scores += COMPONENT_REDUCTIONS[reduce](each.double()).cpu() / samples
                if progress is not None:
                    progress(len(batch["input_ids"]))
    if not scores.isfinite().all():
        raise InputError("the scores are not finite; the model overflows: run it with --dtype float32")
    return scores


def check_task_target(target: str) -> None:
    """InputError where no such target is known."""
    if target not in TASK_TARGETS:
        raise InputError(f"target {target!r} is not known; use {' | '.join(TASK_TARGETS)}")


def check_component_settings(unit: str, method: str, ablation: str, reduce: str) -> None:
    """InputError where ``score_components`` would refuse, whatever the model."""
    if method not in COMPONENT_METHODS:
        raise InputError(f"method {method!r} is not known; use {' | '.join(COMPONENT_METHODS)}")
    if method == "exact" and unit == "neuron":
        raise InputError(
            "exact ablation runs the model once for every component, which neurons are too many for; "
            "use unit head, kv-head, mlp, node or layer"
        )
    if ablation not in ABLATIONS:
        raise InputError(f"ablation {ablation!r} is not known; use {' | '.join(ABLATIONS)}")
    if reduce not in COMPONENT_REDUCTIONS:
        raise InputError(
            f"reduce {reduce!r} is not known for components; use {' | '.join(COMPONENT_REDUCTIONS)}"
        )


def _of_batch(
    model: PreTrainedModel,
    found: Components,
    batch: Batch,
    replace: Replacement,
    target: str,
    shares: Sequence[float] | None,
    by_token: bool,
    through: Mapping[str, nn.Module],
) -> torch.Tensor:
    """(x - x') g with g the mean over ``shares`` of the path, or |x - x'| where there are none.

    [B, n], summed over tokens, or [B * T, n] where each is by itself; padding has zeros. Sites ``through`` a norm
    have what ``through_norm`` says instead.
    """
    samples = len(batch["input_ids"])
    received, instead = activations(model, found, batch), replace(batch)
    change = {name: _wide(x) if instead is None else _wide(x) - instead[name] for name, x in received.items()}
    if shares is None:
        real = batch["attention_mask"].reshape(samples, -1, 1)
        weighted = {name: _by_sample(x.abs(), samples) * real for name, x in change.items()}
    else:
        gradients = _gradients(model, found, batch, target, shares, through)
        effects = {name: x * gradients[name] for name, x in change.items() if name not in through}
        for site in found.sites:
            if site.name in through:
                effects[site.name] = through_norm(
                    *(through[site.name], site),
                    *(values[site.name] for values in (received, change, gradients)),
                )
        weighted = {name: _by_sample(x, samples) for name, x in effects.items()}
    return found.gather({name: x.flatten(0, 1) if by_token else x.sum(1) for name, x in weighted.items()})


@torch.no_grad()
def through_norm(
    norm: nn.Module, site: Site, x: torch.Tensor, change: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """(N(y) - N(y')) g of each component of a site: what the norm puts out, less what it does without the component.

    Args:
        norm: N, behind the site's linear.
        x, change: [..., channels], what enters the site, and that less what replaces it.
        gradient: [..., D] fp32, at the norm's output.

    Returns:
        [..., channels] fp32, all of a component in its first channel.
    """
    y, weight = _wide(site.module(x)), site.module.get_parameter("weight")
    effects, whole = torch.zeros_like(change), norm(y)
    for component in site.component.unique():
        own = site.component == component
        # In 16 bits y without it would be lost in the rounding of y.
        gone = _wide(F.linear(change[..., own].to(weight.dtype), weight[:, own]))
        effects[..., own.nonzero()[0, 0]] = ((whole - norm(y - gone)) * gradient).sum(-1)
    return effects


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_sample(x: torch.Tensor, samples: int) -> torch.Tensor:
    """[B, T, channels]; OPT flattens samples and tokens in its MLP."""
    return x.view(samples, -1, x.shape[-1])


def _gradients(
    model: PreTrainedModel,
    found: Components,
    batch: Batch,
    target: str,
    shares: Sequence[float],
    through: Mapping[str, nn.Module],
) -> dict[str, torch.Tensor]:
    """Mean gradient at each site, fp32, over inputs at these shares of the way from corrupted to clean.

    It is that of what enters the site or, of sites ``through`` a norm, of the norm's output.
    """
    blocks = Blocks(model)
    total: dict[str, torch.Tensor] = {}

    def add(name: str, gradient: torch.Tensor) -> None:
        share = _wide(gradient) / len(shares)
        total[name] = total[name] + share if name in total else share

    def watch(name: str, x: torch.Tensor) -> None:
        if x.requires_grad and not blocks.passing_through:
            x.register_hook(partial(add, name))

    def watch_site(site: Site, x: torch.Tensor) -> None:
        if site.name not in through:
            watch(site.name, x)

    with at_sites(found, watch_site), at_outputs(through, watch):
        for share in shares:
            with _interpolated(model, batch, share):
                attribute_batch(blocks, batch, TASK_TARGETS[target])
    return total


def _midpoints() -> list[float]:
    return [(step + 0.5) / _STEPS for step in range(_STEPS)]


@contextmanager
def _interpolated(model: PreTrainedModel, batch: Batch, share: float) -> Iterator[None]:
    """Within the context the embedded prompts lie at this share of the way from the corrupted to the clean ones."""
    if share == 1:
        yield
        return

    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        corrupted = module.forward(batch["corrupted_ids"])
        return torch.lerp(corrupted, output, share)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _magnitudes(model: PreTrainedModel, found: Components, makers: bool = True) -> dict[str, torch.Tensor]:
    """{site: [channels] float64}: sum of |W| of what reads a channel and, with ``makers``, of what makes it."""
    weights = {weight.module: weight for weight in prunable(model).values()}
    sums = {}
    for site in found.sites:
        reader = weights[site.module]
        total = reader.canonical(reader.weight).detach().double().abs().sum(0)
        for maker in site.makers if makers else ():
            rows = maker.canonical(maker.weight).detach().double().abs().sum(1)
            total += rows.view(-1, len(total)).sum(0)
        sums[site.name] = total
    return sums


def _wanda(
    model: PreTrainedModel, found: Components, batches: Sequence[Batch], progress: Progress | None
) -> torch.Tensor:
    squares: Mapping[str, torch.Tensor] = {
        site.name: torch.zeros(len(site.component), dtype=torch.float64, device=site.component.device)
        for site in found.sites
    }
    with frozen(model):
        for batch in batches:
            real = batch["attention_mask"].reshape(-1, 1)
            for name, x in activations(model, found, batch).items():
                squares[name].add_((x.reshape(-1, x.shape[-1]).double().square() * real).sum(0))
            if progress is not None:
                progress(len(batch["input_ids"]))
    sums = _magnitudes(model, found, makers=False)
    return found.gather({name: squares[name].sqrt() * total for name, total in sums.items()}).cpu()
