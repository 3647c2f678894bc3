"""Targeted correction: remove the few weights, neurons or heads behind a behaviour, and measure what else changes.

    correction = sparc3.Correction(model, tokenizer, repetition(), prompts, windows, unit="neuron")
    found = correction.find("lrp")
    found.mask.apply(model, keep=True)

The prompts are run first. Of those whose continuation shows the behaviour one half explains it, and the other half
judges the correction; general text likewise. Components are scored by contrast (sparc3.contrast), the lowest are
removed but for those that are spared (sparc3.spare), and N is the largest of a sweep at which general text is
predicted as well as the budget asks. The sweep goes on while the budget holds and the behaviour is still shown,
and then narrows down where the budget ends.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from sparc3_kernels.select import pack_bits
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.behaviours import Behaviour
from sparc3.continuations import Continuation, continuations
from sparc3.contrast import (
    DEFAULT_TARGETS,
    Values,
    check_contrast,
    contrasted,
    default_rule,
    mean_relevance,
    random_scores,
)
from sparc3.errors import InputError
from sparc3.evaluate import check_fits, perplexity
from sparc3.families import prunable
from sparc3.mask import Mask, fingerprint
from sparc3.rules import Rule
from sparc3.scores import Scores, as_batches
from sparc3.select import select
from sparc3.spare import DEPTH, affordable, zeroed
from sparc3.sweep import POINTS, SHARES, Measured, halvings, swept, within_budget
from sparc3.undesired import explained_batches, find_shown
from sparc3.units import Components, ablated, components

BUDGET = 0.01
# What sparing measures on: the first windows that explain, and tokens of each.
_PROBES, _PROBE_LENGTH = 4, 64

# (what is done, how much of it is done already, of how much)
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Found:
    """What one method found.

    Attributes:
        settings: unit, method, contrast, ... as plain JSON values.
        scores: the lowest go first; of a sweep that is spared anew on its way, those of ``chosen``.
        sweep: one measurement for each N.
        chosen: the one that the budget or the caller chose; None where no N keeps to the budget.
        mask: of ``chosen``, over all prunable weights; of nothing removed where there is none.
    """

    settings: dict[str, Any]
    scores: Values = field(repr=False)
    sweep: tuple[Measured, ...]
    chosen: Measured | None
    mask: Mask

    def described(self) -> dict[str, Any]:
        """All but the scores and the mask, as plain JSON values."""
        return {
            "settings": self.settings,
            "sweep": [point.described() for point in self.sweep],
            "chosen": self.chosen and self.chosen.described(),
        }


class Correction:
    """A model, a behaviour and a unit: what stays the same while methods are compared.

    Attributes:
        ranking, judging: continuations that show the behaviour, to explain and to judge on; no prompt is in both.
        run: how many prompts were run to find them.
        before: the whole model.
        total: how many weights or components there are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        behaviour: Behaviour,
        texts: Sequence[str],
        general: torch.Tensor,
        judged: torch.Tensor | None = None,
        *,
        unit: str = "neuron",
        tokens: int = 50,
        examples: int = 64,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Run the prompts and measure the whole model.

        Args:
            texts: prompts that may provoke the behaviour.
            general: windows [N, T] int64 of text in general (sparc3.windows).
            judged: other windows, to measure perplexity on; None: every second one of ``general``.
            unit: weight | neuron | head.
            tokens: of a continuation, at most.
            examples: continuations to explain, and other ones to judge on, at most.
            include, exclude: shell patterns on the names of weights; for unit weight alone.
            seed: which prompts explain and which judge.
            progress: called with the number of prompts run since the last call.

        Raises:
            InputError: the behaviour is not shown, or an input does not fit the model.
        """
        check_contrast(unit, "lrp", "difference", "attnlrp", "logit")
        if unit != "weight" and (include or exclude):
            raise InputError(f"include and exclude name weights; they do not fit unit {unit}")
        if judged is None:
            if len(general) < 2:
                raise InputError("general text needs at least 2 windows: one to explain and one to judge on")
            general, judged = general[::2], general[1::2]
        check_fits(model, general)
        check_fits(model, judged)
        self.model, self.tokenizer, self.behaviour, self.unit = model, tokenizer, behaviour, unit
        self.tokens, self.seed = tokens, seed
        self._include, self._exclude = tuple(include), tuple(exclude)
        self._weights = prunable(model)
        self._fingerprint = fingerprint(
            model, {name: weight.weight for name, weight in self._weights.items()}
        )
        self._components: Components | None = None if unit == "weight" else components(model, unit)
        self.total = sum(shape.numel() for shape in self._shapes().values())
        texts = list(texts)
        random.Random(seed).shuffle(texts)
        found, self.run = find_shown(model, tokenizer, behaviour, texts, tokens, 2 * examples, progress)
        self.ranking, self.judging = found[::2][:examples], found[1::2][:examples]
        self._general, self._judged = as_batches(model, general), judged
        self._dense = perplexity(model, judged).value
        self.before = self._measured(0, self.judging)

    def find(
        self,
        method: str = "lrp",
        *,
        contrast: str = "difference",
        rule: str | Rule | None = None,
        target: str | None = None,
        counts: Sequence[int] | None = None,
        points: int = POINTS,
        budget: float | None = BUDGET,
        spare: float | None = None,
        seed: int = 0,
        tell: Tell | None = None,
    ) -> Found:
        """Score, remove each N of a sweep, measure, and choose.

        Args:
            method: sparc3.contrast.METHODS of the unit.
            contrast: difference | set-difference | absolute.
            rule, target: of lrp; None: sparc3.contrast.default_rule, DEFAULT_TARGETS. The target is gradient's too.
            counts: the sweep; None: numbers up to the unit's share of ``SHARES``, each half the next, and, while the
                budget holds and the behaviour is still shown, others as sparc3.sweep.swept says.
            points: how many numbers, where ``counts`` is None and before any beyond.
            budget: the largest increase of perplexity, as 0.01; None: the last of ``counts`` is chosen as it is.
            spare: leave out what costs more than its share of such an increase, measured on a few of the windows that
                explain; the sweep ends where nothing more can be afforded. None: nothing is spared.
            seed: of random.
            tell: called with a few words on the step, how much of it is done, and of how much: samples that are
                scored, weights or components that may go after sparing, numbers that are measured.

        Raises:
            InputError: a setting is not known or does not fit, or a count is not of what there is.
        """
        searched = counts is None
        if counts is None:
            counts = halvings(max(1, round(SHARES[self.unit] * self.total)), points)
        for count in sorted(counts, reverse=True) or [0]:
            if not 1 <= count < self.total:
                raise InputError(
                    f"{count} {self.unit}s cannot be removed: at least 1, and fewer than all {self.total}"
                )
        tell = tell or (lambda words, done, of: None)
        scores = self.score(
            method,
            contrast=contrast,
            rule=rule,
            target=target,
            seed=seed,
            tell=lambda done, of: tell(f"{method}: scoring", done, of),
        )
        places = itertools.count()

        def spared(count: int) -> tuple[Values, int]:
            if spare is None:
                return scores, count
            return self._spared(scores, count, spare, lambda done: tell(f"{method}: sparing", done, count))

        def measure(ranked: Values, count: int) -> Measured:
            place = next(places)
            tell(f"{method}: {count} removed", place, max(place + 1, len(counts)))
            return self.measure(self.mask(ranked, count), count)

        sweep, ranked = swept(counts, self.total if searched else None, budget, spared, measure)
        chosen = within_budget(sweep, budget) if budget is not None else sweep[-1] if sweep else None
        settings: dict[str, Any] = {"unit": self.unit, "method": method, "behaviour": self.behaviour.name}
        settings |= {"seed": seed} if method == "random" else {"contrast": contrast}
        if method in ("lrp", "gradient"):
            settings |= {"target": target or DEFAULT_TARGETS[contrast]}
        if method == "lrp":
            settings |= {"rule": str(Rule.parse(rule or default_rule(self.unit, contrast)))}
        settings |= {} if spare is None else {"spare": spare}
        count = chosen.count if chosen else 0
        mask = self.mask(ranked, count)
        mask.settings = {**settings, "count": count}
        return Found(settings, ranked, tuple(sweep), chosen, mask)

    def score(
        self,
        method: str,
        *,
        contrast: str = "difference",
        rule: str | Rule | None = None,
        target: str | None = None,
        seed: int = 0,
        tell: Callable[[int, int], None] | None = None,
    ) -> Values:
        """Contrastive scores of all weights or components, see sparc3.contrast; the lowest are to be removed.

        Args:
            tell: called with the number of samples that are scored, and of how many.
        """
        rule = default_rule(self.unit, contrast) if rule is None else rule
        target = DEFAULT_TARGETS.get(contrast, "logit") if target is None else target
        check_contrast(self.unit, method, contrast, rule, target)
        if method == "random":
            zeros = {name: weight.canonical(weight.weight) == 0 for name, weight in self._chosen().items()}
            found = random_scores(self._shapes(), seed)
            return {
                name: scores.masked_fill_(zeros[name].cpu(), torch.inf) if name in zeros else scores
                for name, scores in found.items()
            }
        undesired = explained_batches(self.model, self.tokenizer, self.behaviour, self.ranking)
        of, done = sum(len(batch["input_ids"]) for batch in (*self._general, *undesired)), 0

        def progress(samples: int) -> None:
            nonlocal done
            done += samples
            if tell is not None:
                tell(done, of)

        progress(0)
        absolute = contrast == "absolute"
        general, bad = (
            mean_relevance(
                self.model,
                batches,
                self.unit,
                method,
                rule=rule,
                target=explained,
                include=self._include,
                exclude=self._exclude,
                absolute=absolute and batches is self._general,
                skip_first=absolute,
                progress=progress,
            )
            for batches, explained in (
                (self._general, "logprob" if absolute else target),
                (undesired, target),
            )
        )
        return contrasted(general, bad, contrast)

    def _spared(
        self, scores: Values, count: int, budget: float, progress: Callable[[int], None] | None = None
    ) -> tuple[Values, int]:
        """(Scores of at most ``count`` that can be afforded, +inf for all others; how many they are)."""
        flat = torch.cat([tensor.flatten() for tensor in scores.values()])
        order = flat.topk(min(DEPTH * count, len(flat)), largest=False).indices
        order = order[flat[order].isfinite()]
        probe = torch.cat([batch["input_ids"] for batch in self._general])[:_PROBES, :_PROBE_LENGTH]
        whole = perplexity(self.model, probe).nll.mean().item()

        def cost(removed: torch.Tensor) -> float:
            with self._without(removed):
                return perplexity(self.model, probe).nll.mean().item() - whole

        accepted = affordable(order, count, cost, math.log1p(budget), progress)
        found = torch.full_like(flat, torch.inf)
        found[accepted] = flat[accepted]
        parts = found.split([tensor.numel() for tensor in scores.values()])
        spared = {
            name: part.view_as(tensor) for part, (name, tensor) in zip(parts, scores.items(), strict=True)
        }
        return spared, len(accepted)

    def _without(self, removed: torch.Tensor) -> AbstractContextManager[None]:
        """The model without the weights or components of these indices into all scores; they come back after."""
        if self._components is None:
            return zeroed(list(self._chosen().values()), removed)
        keep = torch.ones(self.total, dtype=torch.bool)
        keep[removed] = False
        return ablated(self._components, keep)

    def mask(self, scores: Values, count: int) -> Mask:
        """The mask that removes the ``count`` lowest, over all prunable weights."""
        if self._components is None:
            weights = self._chosen()
            transposed = frozenset(name for name, weight in weights.items() if weight.transposed)
            part = (
                select(Scores(scores, transposed), count / self.total, "global", "value")
                if count
                else Mask({}, {})
            )
        else:
            keep = torch.ones(self.total, dtype=torch.bool)
            keep[torch.argsort(scores[self.unit], stable=True)[:count]] = False
            part = self._components.mask(self.model, keep)
        # Over all prunable weights, so that it combines with any mask of ``prune``.
        shapes = {name: tuple(weight.weight.shape) for name, weight in self._weights.items()}
        bits = {
            name: part.bits[name]
            if name in part.bits
            else pack_bits(torch.ones(shape, dtype=torch.bool, device=self.model.device))
            for name, shape in shapes.items()
        }
        return Mask(bits, shapes, self._fingerprint, {"unit": self.unit})

    def names(self, scores: Values, count: int) -> list[str]:
        """Names of the components that are removed; none for weights."""
        if self._components is None:
            return []
        order = torch.argsort(scores[self.unit], stable=True)[:count]
        return [self._components.names[index] for index in sorted(order.tolist())]

    def measure(self, mask: Mask, count: int = 0, judging: Sequence[Continuation] | None = None) -> Measured:
        """The model under a mask, on the judging prompts; the weights are back afterwards, bit for bit."""
        mask.apply(self.model, keep=True)
        try:
            prompts = [one.prompt for one in (self.judging if judging is None else judging)]
            said = continuations(self.model, self.tokenizer, prompts, self.tokens)
            return self._measured(count, said)
        finally:
            mask.undo(self.model)

    def _measured(self, count: int, said: Sequence[Continuation]) -> Measured:
        scores = self.behaviour.scores(said)
        found = perplexity(self.model, self._judged).value if count else self._dense
        return Measured(
            count,
            count / self.total,
            _mean(score >= self.behaviour.threshold for score in scores),
            _mean(scores),
            _mean(len(one.ids) for one in said),
            _mean(one.distinct for one in said),
            found,
            found / self._dense - 1,
            tuple(said),
        )

    def _chosen(self) -> dict[str, Any]:
        """The weights that may be removed, for unit weight."""
        if self._components is not None:
            return {}
        return prunable(self.model, self._include, self._exclude)

    def _shapes(self) -> dict[str, torch.Size]:
        if self._components is not None:
            return {self.unit: torch.Size([len(self._components.names)])}
        return {name: weight.canonical(weight.weight).shape for name, weight in self._chosen().items()}


def _mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)
