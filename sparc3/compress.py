"""Compression: a mask out of one method's scores, and several methods beside each other at equal sparsity.

lrp, gradient, magnitude and random score the dense model and then select (one-shot). wanda and ria select inside the
forward sweep, each block seeing the pruned blocks before it (sequential), as they were published; a threshold over
the whole model needs every score first, so pattern "global" scores them on the dense model in one pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from sparc3_kernels.select import pack_bits
from transformers import PreTrainedModel

from sparc3.errors import InputError
from sparc3.evaluate import Perplexity, paired_interval, perplexity
from sparc3.families import prunable
from sparc3.mask import Mask, fingerprint
from sparc3.samples import Batch
from sparc3.schedules import sequential_masks
from sparc3.scores import METHODS, Scores, as_batches, attribute, check_settings
from sparc3.select import check_sparsity, check_width, parse_pattern

SEQUENTIAL = ("wanda", "ria")

# The methods that a setting of ``sparc3.attribute`` changes.
_USERS = {
    "rule": ("lrp",),
    **dict.fromkeys(("target", "positions", "reduce", "skip_first", "memory"), ("lrp", "gradient")),
    "seed": ("random",),
}

# Chosen by measurement on development text (docs/quality.md). Within a row the constants that a rule puts on whole
# rows cancel, so AttnLRP ranks well. Where rows compete they do not: the rules for norms and products are left out.
_WITHIN_ROWS = {"rule": "attnlrp", "target": "logprob", "reduce": "token-square"}
_ACROSS_ROWS = {"rule": "gradient,activation=identity", "target": "logprob", "reduce": "token-square"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "row": _WITHIN_ROWS,
    "N:M": _WITHIN_ROWS,
    "layer": _ACROSS_ROWS,
    "global": _ACROSS_ROWS,
}


def default_settings(pattern: str) -> dict[str, Any]:
    """What ``prune`` gives ``attribute`` for a pattern; InputError for a pattern that is not known."""
    _, group = parse_pattern(pattern)
    return dict(DEFAULTS["N:M" if group else pattern])


def prune(
    model: PreTrainedModel,
    samples: torch.Tensor | Sequence[Batch],
    method: str = "lrp",
    sparsity: float | None = None,
    pattern: str = "row",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> Mask:
    """The mask of one method; ``model`` is unchanged (mask.apply prunes it).

    Args:
        model: a causal language model of a declared family.
        samples: windows [N, T] int64, or batches, as in ``sparc3.attribute``.
        method: lrp | gradient | wanda | ria | magnitude | random.
        sparsity: share to prune, in [0, 1); None is 0.5, or for N:M the one that it implies.
        pattern: row | layer | global | N:M, see sparc3.select.select.
        include, exclude: shell patterns on state-dict names.
        progress: called with the number of samples done since the last call.
        settings: of ``sparc3.attribute``, over the pattern's default for lrp and gradient.

    Raises:
        InputError: as ``sparc3.attribute`` and ``Scores.select``; a setting that the method does not have.
    """
    sparsity = requested_sparsity(sparsity, pattern)
    check_model(model, [method], pattern, include, exclude)
    check_used(settings, [method])
    if method in SEQUENTIAL and pattern != "global":
        return _prune_in_sweep(model, samples, method, sparsity, pattern, include, exclude, progress)
    scores = _one_shot_scores(model, samples, method, pattern, include, exclude, progress, settings)
    return scores.select(sparsity, pattern)


def compare(
    model: PreTrainedModel,
    samples: torch.Tensor | Sequence[Batch],
    windows: torch.Tensor,
    methods: Sequence[str] = METHODS,
    sparsities: Sequence[float | None] = (None,),
    pattern: str = "row",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Prune by each method at each sparsity, and measure the perplexity of what is left.

    Args:
        windows: [N, T] int64, the text that is judged on; hold it out from ``samples``.
        progress: called with a few words when a step begins, twice for every method and sparsity.
        settings: as in ``prune``, for lrp and gradient alike.

    Yields:
        ({"method", "pattern", "sparsity" (achieved), "perplexity", "seconds" (scoring and selecting), "interval"},
        mask). interval is sparc3.evaluate.paired_interval against Wanda at the same sparsity, as [mean, low, high] in
        nats a token; it is missing for Wanda itself, or where Wanda is not compared. Wanda comes first for that.
        The model is unchanged whenever the iterator rests.
    """
    wanted = [requested_sparsity(sparsity, pattern) for sparsity in sparsities]
    check_model(model, methods, pattern, include, exclude)
    check_used(settings, methods)
    peers: dict[float, Perplexity] = {}
    for method in sorted(dict.fromkeys(methods), key=lambda name: name != "wanda"):
        start = time.perf_counter()
        scores: Scores | None = None
        for sparsity in dict.fromkeys(wanted):
            _tell(progress, f"{method} {sparsity:.0%}: scoring")
            if method in SEQUENTIAL and pattern != "global":
                mask = _prune_in_sweep(model, samples, method, sparsity, pattern, include, exclude)
            else:
                if scores is None:
                    scores = _one_shot_scores(
                        model, samples, method, pattern, include, exclude, None, settings
                    )
                mask = scores.select(sparsity, pattern)
            seconds = time.perf_counter() - start
            _tell(progress, f"{method} {sparsity:.0%}: evaluating")
            found = evaluate_pruned(model, mask, windows)
            row = {
                "method": method,
                "pattern": pattern,
                "sparsity": mask.sparsity,
                "perplexity": found.value,
                "seconds": seconds,
            }
            if method == "wanda":
                peers[sparsity] = found
            elif sparsity in peers and len(windows) > 1:
                row["interval"] = list(paired_interval(found, peers[sparsity]))
            yield row, mask
            start = time.perf_counter()


def evaluate_pruned(model: PreTrainedModel, mask: Mask, windows: torch.Tensor) -> Perplexity:
    """Perplexity of ``model`` under ``mask``; the weights are back afterwards, bit for bit."""
    mask.apply(model, keep=True)
    try:
        return perplexity(model, windows)
    finally:
        mask.undo(model)


def _tell(progress: Callable[[str], None] | None, what: str) -> None:
    if progress is not None:
        progress(what)


def requested_sparsity(sparsity: float | None, pattern: str) -> float:
    """The share to prune: 0.5 unless told or, for N:M, implied; InputError where the two do not fit."""
    _, group = parse_pattern(pattern)
    return check_sparsity(0.5 if sparsity is None and not group else sparsity, pattern)


def check_model(
    model: PreTrainedModel,
    methods: Sequence[str],
    pattern: str,
    include: Sequence[str],
    exclude: Sequence[str],
) -> None:
    """InputError where ``prune`` and ``compare`` would refuse for the model's sake; to be called before long work."""
    for method in methods:
        check_settings(method)
    for name, weight in prunable(model, include, exclude).items():
        check_width(name, weight.canonical(weight.weight).shape[-1], pattern)


def check_used(settings: Iterable[str], methods: Sequence[str]) -> None:
    """InputError for a setting that none of the methods has: it would change nothing."""
    for name in settings:
        users = _USERS.get(name, ("lrp", "gradient"))
        if not {*users} & {*methods}:
            raise InputError(
                f"{name.replace('_', '-')} has no effect on {', '.join(methods)}: it is a setting of "
                f"{' and '.join(users)}"
            )


def _one_shot_scores(
    model: PreTrainedModel,
    samples: torch.Tensor | Sequence[Batch],
    method: str,
    pattern: str,
    include: Sequence[str],
    exclude: Sequence[str],
    progress: Callable[[int], None] | None,
    settings: dict[str, Any],
) -> Scores:
    chosen = {**default_settings(pattern), **settings}
    scores = attribute(model, samples, method, include=include, exclude=exclude, progress=progress, **chosen)
    scores.settings["schedule"] = "one-shot"
    return scores


def _prune_in_sweep(
    model: PreTrainedModel,
    samples: torch.Tensor | Sequence[Batch],
    method: str,
    sparsity: float,
    pattern: str,
    include: Sequence[str],
    exclude: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> Mask:
    """Wanda's or RIA's mask by the sequential schedule."""
    weights = prunable(model, include, exclude)

    def keep(name: str, scores: torch.Tensor) -> torch.Tensor:
        if not (scores.isfinite() | scores.isneginf()).all():
            raise InputError(f"the scores of {name} are not finite; run the model with --dtype float32")
        return Scores({name: scores}).select(sparsity, pattern).kept(name)

    kept = sequential_masks(model, as_batches(model, samples), method, weights, keep, progress)
    bits = {name: pack_bits(weights[name].canonical(kept[name]).contiguous()) for name in kept}
    return Mask(
        bits,
        {name: tuple(weights[name].weight.shape) for name in kept},
        fingerprint(model, {name: weight.weight for name, weight in weights.items()}),
        {
            "method": method,
            "schedule": "sequential",
            "sparsity": sparsity,
            "pattern": pattern,
            "by": "magnitude",
        },
    )
