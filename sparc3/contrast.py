"""Contrastive relevance: what matters to an undesired behaviour and not to text in general.

Two relevances, each a mean over the tokens that are explained, make one score, and the lowest are removed first:

============== =================================================================================
contrast       score
============== =================================================================================
difference     R_general - R_undesired (arXiv 2506.13727, Eq. 7)
set-difference -R_undesired, but the top ``PROTECTED`` of R_general never goes
               (Wei et al. 2024, arXiv 2402.05162: the top of one set without that of the other)
absolute       ``GUARD`` |R_general| - R_undesired, |R| of every token by itself and of the
               log-probability; of neurons and heads the mean, the first token of a text left out of
               both, of weights the root of the mean square over all tokens
============== =================================================================================

R is signed: of a component that helps at one token of general text and hurts at another only |R| tells that it
matters. What is explained is the logit by default: the log-probability of one undesired word is also raised by what
lowers the other undesired ones, and hardly depends on anything where a loop is already certain. The absolute contrast
explains how far an undesired token is ahead of the best other one, on which a greedy continuation turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from sparc3.engine import model_inputs
from sparc3.errors import InputError
from sparc3.explain import relevance
from sparc3.rules import Rule
from sparc3.scores import attribute, check_settings
from sparc3.targets import Batch, next_tokens
from sparc3.units import components, recorded
from sparc3.wrap import frozen

CONTRASTS = ("difference", "set-difference", "absolute")
METHODS = {
    "weight": ("lrp", "gradient", "random"),
    "neuron": ("lrp", "gradient", "activation", "random"),
    "head": ("lrp", "gradient", "activation", "random"),
}
# Share of the weights or components that a set difference leaves alone.
PROTECTED = 0.05
# How much more a loss of general text counts than as much of the behaviour, where |R| is compared.
GUARD = 4.0

# What is explained unless told otherwise.
DEFAULT_TARGETS = {"difference": "logit", "set-difference": "logit", "absolute": "lead"}


def default_rule(unit: str, contrast: str) -> str:
    """The LRP rule unless told otherwise."""
    # Where weights of a model compete, the constants that LRP's rules for norms and products put on whole rows decide
    # (docs/quality.md); a neuron or head has the same constant on all that it is. The absolute contrast sets two
    # targets against each other, and the full rule breaks SmolLM2 by it (docs/correction.md).
    return "gradient,activation=identity" if unit == "weight" or contrast == "absolute" else "attnlrp"


Progress = Callable[[int], None]
# By state-dict name for weights [..., out, in], and {unit: [n]} for components.
Values = dict[str, torch.Tensor]


def check_contrast(unit: str, method: str, contrast: str, rule: str | Rule, target: str) -> None:
    """InputError where ``mean_relevance`` and ``contrasted`` would refuse, whatever the model."""
    if unit not in METHODS:
        raise InputError(f"unit {unit!r} is not known; use {' | '.join(METHODS)}")
    if method not in METHODS[unit]:
        raise InputError(f"method {method!r} does not score {unit}s; use {' | '.join(METHODS[unit])}")
    if contrast not in CONTRASTS:
        raise InputError(f"contrast {contrast!r} is not known; use {' | '.join(CONTRASTS)}")
    if contrast == "absolute" and method == "activation":
        raise InputError("contrast absolute compares lrp or gradient, not activation; use difference")
    check_settings("lrp" if method == "lrp" and unit == "weight" else "gradient", rule=rule, target=target)


def mean_relevance(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    unit: str,
    method: str,
    *,
    rule: str | Rule = "attnlrp",
    target: str = "logit",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    absolute: bool = False,
    skip_first: bool = False,
    progress: Progress | None = None,
) -> Values:
    """Signed relevance of each weight or component to ``batches``, a mean over the explained tokens.

    Args:
        batches: input_ids, attention_mask and, where not all next tokens are explained, labels [B, T].
        unit: weight | neuron | head.
        method: lrp | gradient | activation (mean |x| where a token is explained).
        rule, target: of lrp, see sparc3.rules and sparc3.targets; the target is gradient's too.
        include, exclude: shell patterns on the names of weights.
        absolute: under lrp or gradient, |R| of positions by themselves: its mean of components, of weights the root
            of its mean square.
        skip_first: of components under lrp or gradient, leave the first position out.
        progress: called with the number of samples done since the last call.

    Returns:
        fp32 [..., out, in] by name for weights, -inf for those that are zero; {unit: float64 [n]} else.

    Raises:
        InputError: as sparc3.attribute; unknown unit or method.
    """
    check_contrast(unit, method, "difference", rule, target)
    tokens = sum(int((next_tokens(batch) >= 0).sum()) for batch in batches)
    if tokens == 0:
        raise InputError("no token is explained")
    if unit == "weight":
        settings = {
            "rule": rule,
            "target": target,
            "reduce": "token-square" if absolute else "signed",
            "include": include,
            "exclude": exclude,
        }
        found = attribute(model, batches, method, progress=progress, **settings).tensors  # type: ignore[arg-type]
        return {
            name: _root_(tensor.div_(tokens)) if absolute else tensor.div_(tokens)
            for name, tensor in found.items()
        }
    if method == "activation":
        total = _activations(model, batches, unit, progress)
    else:
        rule = "gradient" if method == "gradient" else rule
        total = _relevance(model, batches, unit, rule, target, absolute, skip_first, progress)
    if not total.isfinite().all():
        raise InputError("the relevance is not finite; the model overflows: run it with --dtype float32")
    return {unit: total / tokens}


def contrasted(general: Values, undesired: Values, contrast: str) -> Values:
    """One score each, the lowest to be removed first; +inf for what is never removed, and for zero weights."""
    if contrast == "difference":
        found = {name: general[name] - undesired[name] for name in general}
    elif contrast == "absolute":
        found = {name: GUARD * general[name] - undesired[name] for name in general}
    else:
        limit = _quantile(general, 1 - PROTECTED)
        found = {
            name: torch.where(general[name] > limit, torch.inf, -undesired[name].double()).to(
                undesired[name].dtype
            )
            for name in general
        }
    # A zero weight has -inf in both: to remove it changes nothing, so it must not count.
    return {name: scores.masked_fill_(general[name].isneginf(), torch.inf) for name, scores in found.items()}


def random_scores(shapes: dict[str, torch.Size], seed: int) -> Values:
    """Uniform scores for the names and shapes given."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def _root_(scores: torch.Tensor) -> torch.Tensor:
    """The square root, in place; -inf stays, and with it what is zero already."""
    zero = scores.isneginf()
    return scores.sqrt_().masked_fill_(zero, -torch.inf)


def _relevance(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    unit: str,
    rule: str | Rule,
    target: str,
    absolute: bool,
    skip_first: bool,
    progress: Progress | None,
) -> torch.Tensor:
    """[n] float64: relevance of each component, summed over tokens and samples."""
    total = torch.zeros((), dtype=torch.float64)
    with relevance(model, rule, target, "all", weights=False) as found:
        for batch in batches:
            found.backward(batch)
            layers = found.neurons if unit == "neuron" else found.heads
            values = [layers[layer].double()[:, int(skip_first) :] for layer in sorted(layers)]
            sums = [(one.abs() if absolute else one).sum((0, 1)) for one in values]
            total = total + torch.cat(sums).cpu()
            _tell(progress, batch)
    return total


def _activations(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    unit: str,
    progress: Progress | None,
) -> torch.Tensor:
    """[n] float64: |x| of each component, summed over the positions where a token is explained."""
    parts = components(model, unit)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), frozen(model):
        for batch in batches:
            explained = (next_tokens(batch) >= 0).reshape(-1, 1)
            with recorded(parts) as seen:
                model.base_model(**model_inputs(batch), use_cache=False)
            channels = {
                name: (x.reshape(-1, x.shape[-1]).double().abs() * explained).sum(0)
                for name, x in seen.items()
            }
            total = total + parts.gather(channels).cpu()
            _tell(progress, batch)
    return total


def _tell(progress: Progress | None, batch: Batch) -> None:
    if progress is not None:
        progress(len(batch["input_ids"]))


def _quantile(values: Values, share: float) -> float:
    """The value that ``share`` of all values are at or below."""
    flat = torch.cat([tensor.flatten() for tensor in values.values()])
    return flat.kthvalue(max(1, round(share * flat.numel()))).values.item()
