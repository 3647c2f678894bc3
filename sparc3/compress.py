"""Compression: a mask out of one method's scores, and several methods beside each other at equal sparsity.

lrp, gradient, magnitude and random score the dense model and then select (one-shot). wanda, ria, gblm and sparsegpt
select inside the forward sweep, each block seeing the pruned blocks before it (sequential), as they were published; a
threshold over the whole model needs every score first, so pattern "global" scores wanda and ria on the dense model in
one pass and refuses the other two. sparsegpt changes the weights that it keeps, and so does ``repair`` after any
method, in a sweep of its own where the mask is one-shot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from sparc3_kernels.select import pack_bits
from transformers import PreTrainedModel

from sparc3.allocate import check_allocation, owl_budgets, relevance_budgets
from sparc3.choose import choose
from sparc3.errors import InputError
from sparc3.evaluate import Perplexity, paired_interval, perplexity
from sparc3.families import family_of, prunable
from sparc3.inputs import Inputs
from sparc3.mask import Mask, fingerprint
from sparc3.passes import SWEEP_ONLY, VISIT, in_sweep, passes
from sparc3.samples import Batch
from sparc3.schedules import GBLM_SETTINGS, gblm_gradients_, sweep
from sparc3.scores import METHODS, Scores, as_batches, attribute
from sparc3.select import check_sparsity, check_width, parse_pattern

PRUNERS = (*METHODS[:4], *SWEEP_ONLY, *METHODS[4:])

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


class Pruner:
    """Prunes one model by any method, and shares what methods and sparsities have in common.

    Attributes: as the arguments of ``prune``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        samples: torch.Tensor | Sequence[Batch],
        pattern: str = "row",
        *,
        allocate: str = "uniform",
        repair: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        check_allocation(allocate, pattern)
        self.model, self.samples, self.pattern = model, samples, pattern
        self.allocate, self.repair = allocate, repair
        self.chosen: dict[str, Any] = {"include": include, "exclude": exclude}
        self.settings = settings
        self._scores: dict[str, Scores] = {}

    def mask(
        self, method: str, sparsity: float | None = None, progress: Callable[[int], None] | None = None
    ) -> Mask:
        """The mask of one method; see ``prune``."""
        sparsity = requested_sparsity(sparsity, self.pattern)
        check_model(self.model, [method], self.pattern, self.chosen["include"], self.chosen["exclude"])
        budgets = self._budgets(sparsity, progress)
        if in_sweep(method, self.pattern):
            mask = self.in_sweep(method, sparsity, budgets, None, progress)
        else:
            mask = self.scores(method, progress).select(sparsity, self.pattern, budgets=budgets)
            if self.repair:
                mask = self.in_sweep(method, sparsity, budgets, mask, progress)
        if budgets is not None:
            mask.settings["allocate"] = self.allocate
        return mask

    def passes(self, method: str) -> int:
        """How often ``mask`` goes through all samples, for whoever shows its progress."""
        kinds = passes(method, self.pattern, self.allocate, self.repair)
        shared = self.allocate == "relevance" and self._allocates_by_itself(method)
        return sum(kind != VISIT for kind in kinds) - shared

    def scores(self, method: str, progress: Callable[[int], None] | None = None) -> Scores:
        """The method's scores of the dense model, one-shot; kept until another method's are asked for."""
        if method not in self._scores:
            self._scores = {
                name: scores for name, scores in self._scores.items() if name in ("owl", "relevance")
            }
            if method == "lrp" and self._allocates_by_itself(method) and "relevance" in self._scores:
                return self._scores["relevance"]
            chosen = {**default_settings(self.pattern), **self.settings}
            self._scores[method] = self._attribute(method, chosen, progress)
        return self._scores[method]

    def _attribute(
        self, method: str, settings: dict[str, Any], progress: Callable[[int], None] | None
    ) -> Scores:
        scores = attribute(self.model, self.samples, method, progress=progress, **self.chosen, **settings)
        scores.settings["schedule"] = "one-shot"
        return scores

    def _allocates_by_itself(self, method: str) -> bool:
        """Whether the method's own scores are those that budgets come from."""
        own = {**default_settings(self.pattern), **self.settings}
        own.pop("seed", None)  # of method random
        return method == "lrp" and own == default_settings("global")

    def _budgets(self, sparsity: float, progress: Callable[[int], None] | None) -> dict[str, float] | None:
        if self.allocate == "uniform":
            return None
        if self.allocate not in self._scores:
            self._scores = {}
            owl = self.allocate == "owl"
            method, settings = ("wanda", {}) if owl else ("lrp", default_settings("global"))
            self._scores[self.allocate] = self._attribute(method, settings, progress)
        scores = self._scores[self.allocate]
        if self.allocate == "owl":
            return owl_budgets(scores.tensors, sparsity, family_of(self.model).blocks)
        return relevance_budgets(scores, sparsity)

    def in_sweep(
        self,
        method: str,
        sparsity: float,
        budgets: dict[str, float] | None,
        given: Mask | None,
        progress: Callable[[int], None] | None,
    ) -> Mask:
        """One mask, chosen block by block or ``given``, with new values of kept weights where they change."""
        weights = prunable(self.model, **self.chosen)
        batches = as_batches(self.model, self.samples)
        gradients = self._gradients(progress) if method == "gblm" else {}
        samples = sum(len(batch["input_ids"]) for batch in batches)
        updates = "least squares" if self.repair else "sparsegpt" if method == "sparsegpt" else None
        bits, values = {}, {}

        def visit(name: str, inputs: Inputs) -> torch.Tensor:
            weight = weights[name]
            kept, new = choose(
                weight,
                inputs,
                method,
                sparsity if budgets is None else budgets[name],
                self.pattern,
                given=None if given is None else weight.canonical(given.kept(name)).to(weight.weight.device),
                gradients=gradients.get(name),
                samples=samples,
                repair=self.repair,
            )
            bits[name] = pack_bits(weight.canonical(kept).contiguous())
            if updates:
                values[name] = weight.canonical(new).contiguous()
            return new

        sweep(self.model, batches, weights, visit, progress, gram=updates is not None)
        settings = {"method": method, "schedule": "sequential", "sparsity": sparsity, "pattern": self.pattern}
        settings |= {"by": "magnitude"} | ({} if budgets is None else {"budgets": budgets})
        settings = settings if given is None else dict(given.settings)
        return Mask(
            bits,
            {name: tuple(weights[name].weight.shape) for name in bits},
            fingerprint(self.model, {name: weight.weight for name, weight in weights.items()}),
            settings | ({"updates": updates} if updates else {}),
            values,
        )

    def _gradients(self, progress: Callable[[int], None] | None) -> dict[str, torch.Tensor]:
        """{name: |W| ||G||_2 [..., out, in]}, G the gradients of each sample's mean loss."""
        if "gblm" not in self._scores:
            self.samples = as_batches(self.model, self.samples)
            scores = self._attribute("gradient", GBLM_SETTINGS, progress)
            for tensor in scores.tensors.values():
                gblm_gradients_(tensor, self.samples)
            self._scores["gblm"] = scores
        return self._scores["gblm"].tensors


def prune(
    model: PreTrainedModel,
    samples: torch.Tensor | Sequence[Batch],
    method: str = "lrp",
    sparsity: float | None = None,
    pattern: str = "row",
    *,
    allocate: str = "uniform",
    repair: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> Mask:
    """The mask of one method; ``model`` is unchanged (mask.apply prunes it).

    Args:
        model: a causal language model of a declared family.
        samples: windows [N, T] int64, or batches, as in ``sparc3.attribute``.
        method: lrp | gradient | wanda | ria | gblm | sparsegpt | magnitude | random. sparsegpt changes kept weights.
        sparsity: share to prune, in [0, 1); None is 0.5, or for N:M the one that it implies.
        pattern: row | layer | global | N:M, see sparc3.select.select.
        allocate: uniform | owl | relevance: how the share is spread over tensors, see sparc3.allocate.
        repair: change the kept weights so that outputs stay as they were, see sparc3.reconstruct.least_squares.
        include, exclude: shell patterns on state-dict names.
        progress: called with the number of samples done since the last call, ``Pruner.passes`` times all of them.
        settings: of ``sparc3.attribute``, over the pattern's default for lrp and gradient.

    Raises:
        InputError: as ``sparc3.attribute`` and ``Scores.select``; a setting that the method does
            not have; an allocation that the pattern leaves no room for.
    """
    pruner = Pruner(
        model,
        samples,
        pattern,
        allocate=allocate,
        repair=repair,
        include=include,
        exclude=exclude,
        **settings,
    )
    check_used(settings, [method])
    return pruner.mask(method, sparsity, progress)


def repair(
    model: PreTrainedModel,
    samples: torch.Tensor | Sequence[Batch],
    mask: Mask,
    progress: Callable[[int], None] | None = None,
) -> Mask:
    """Any mask with new values for the weights that it keeps, by least squares block after block.

    Args:
        model: the dense model that the mask was made for; unchanged.
        samples: as in ``prune``.
        mask: what is pruned; new values that it may have are not used.

    Raises:
        InputError: the mask is for another model.
    """
    mask.check(model)
    pruner = Pruner(model, samples, repair=True, include=list(mask.bits))
    return pruner.in_sweep(str(mask.settings.get("method")), 0.0, None, mask, progress)


def compare(
    model: PreTrainedModel,
    samples: torch.Tensor | Sequence[Batch],
    windows: torch.Tensor,
    methods: Sequence[str] = METHODS,
    sparsities: Sequence[float | None] = (None,),
    pattern: str = "row",
    *,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Prune by each method at each sparsity, and measure the perplexity of what is left.

    Args:
        windows: [N, T] int64, the text that is judged on; hold it out from ``samples``.
        progress: called with a few words when a step begins, twice for every method and sparsity.
        settings: as in ``prune``, for all methods alike.

    Yields:
        ({"method", "pattern", "sparsity" (achieved), "perplexity", "seconds" (scoring and selecting), "interval"},
        mask). interval is sparc3.evaluate.paired_interval against Wanda at the same sparsity, as [mean, low, high] in
        nats a token; it is missing for Wanda itself, or where Wanda is not compared. Wanda comes first for that.
        The model is unchanged whenever the iterator rests.
    """
    wanted = [requested_sparsity(sparsity, pattern) for sparsity in sparsities]
    pruner = Pruner(model, samples, pattern, **settings)
    check_model(model, methods, pattern, pruner.chosen["include"], pruner.chosen["exclude"])
    check_used(pruner.settings, methods)
    peers: dict[float, Perplexity] = {}
    for method in sorted(dict.fromkeys(methods), key=lambda name: name != "wanda"):
        for sparsity in dict.fromkeys(wanted):
            _tell(progress, f"{method} {sparsity:.0%}: scoring")
            start = time.perf_counter()
            mask = pruner.mask(method, sparsity)
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
        if method not in PRUNERS:
            raise InputError(f"method {method!r} is not known; use {' | '.join(PRUNERS)}")
        if method in SWEEP_ONLY and pattern == "global":
            raise InputError(
                f"{method} selects inside the forward sweep, so it cannot rank the whole model; use --pattern row or "
                "layer, which --allocate relevance spreads over the model"
            )
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
