"""Circuits: the few weights or components of a model that do a task, and how faithfully they do it.

    task = load_task("ioi", loaded.tokenizer, bundled=True)
    search = Search(loaded.model, loaded.tokenizer, task, "head")
    circuit = search.find("lrp")
    circuit.cpr, circuit.sparsest.fraction

What is kept is ranked on the task's ranking examples; everything else is measured on its judging examples, see
sparc3.faithfulness. The empty circuit has everything ablated that is ranked. Where no one rule of LRP is best for all
models (sparc3.circuit_settings), the one, or the mean of two, is taken whose circuit of the ranking examples is the
smallest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from sparc3_kernels.select import count_bits, pack_bits
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.ablation import ablated_differences, differences, masked_differences, replacement
from sparc3.circuit_settings import (
    AND,
    check_circuit_settings,
    default_rules,
    default_settings,
    parse_rules,
    rule_name,
)
from sparc3.engine import model_inputs
from sparc3.errors import InputError
from sparc3.faithfulness import FRACTIONS, GOAL, Point, areas, faithfulness, sparsest
from sparc3.families import blocks_of, family_of, find, prunable
from sparc3.mask import Mask
from sparc3.ranking import score_components, score_weights
from sparc3.rules import Rule
from sparc3.scores import Scores
from sparc3.select import pruned_count, select
from sparc3.targets import Batch
from sparc3.tasks import Task, task_batches
from sparc3.units import Components, ablated, components

# Ranking examples on which rules are compared, at most: measuring takes longer than scoring.
_COMPARED = 32
# Wanda ranks within the rows of a weight, as it was published; the others over the whole model.
_PATTERNS = {"wanda": "row"}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Circuit:
    """What one method found.

    Attributes:
        settings: unit, ablation, method, rule, ... as plain JSON values.
        scores: [n] of components, or of weights.
        curve: one point for each of ``FRACTIONS``.
        cpr, cmd: areas over the curve; NaN where faithfulness is undefined.
        sparsest: the smallest circuit measured from which on accuracy is at least 0.9 of the model's.
        seconds: for scoring, and for comparing rules.
    """

    settings: dict[str, Any]
    scores: torch.Tensor | Scores = field(repr=False)
    curve: tuple[Point, ...]
    cpr: float
    cmd: float
    sparsest: Point
    seconds: float

    def described(self) -> dict[str, Any]:
        """All but the scores, as plain JSON values."""
        return {
            "method": self.settings["method"],
            "settings": self.settings,
            "curve": [asdict(point) for point in self.curve],
            "cpr": self.cpr,
            "cmd": self.cmd,
            "sparsest": asdict(self.sparsest),
            "seconds": self.seconds,
        }


class Search:
    """A model, a task and a unit: what stays the same while methods are compared.

    Attributes:
        names: of the components; empty for weights.
        total: how many weights or components there are.
        full, empty: the whole model, and the model with all of them ablated.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        unit: str,
        ablation: str = "zero",
    ) -> None:
        """Measure the whole and the empty model.

        Raises:
            InputError: unknown unit or ablation, a prompt that is too long, a model that does not do the task, or one
                that does it as well with everything ablated.
        """
        check_circuit_settings(unit, "lrp", ablation)
        self.model, self.unit, self.ablation = model, unit, ablation
        self._tokenizer, self._task = tokenizer, task
        self._ranking = task_batches(model, tokenizer, task.ranking)
        self._judging = task_batches(model, tokenizer, task.judging)
        self._components = None if unit == "weight" else components(model, unit)
        if self._components is not None:
            self._replace = replacement(model, self._components, ablation, self._ranking)
        self.names: tuple[str, ...] = () if self._components is None else self._components.names
        self.total = len(self.names) or sum(weight.weight.numel() for weight in prunable(model).values())
        full = differences(model, self._judging)
        empty = self._measure([self._nothing()])[0]
        self._full, self._empty = full.double().mean().item(), empty.double().mean().item()
        if not self._full > 0:
            raise InputError(
                f"the model does not do task {task.name}: its right answers are not ahead of the wrong ones (mean "
                f"logit difference {self._full:.3g} on {len(full)} examples), so there is no circuit to find"
            )
        self.full = self._point(1.0, self.total, full)
        self.empty = self._point(0.0, 0, empty)
        # A larger mean alone does not do the task: the logits of what is left may be of any size.
        if not self._full > self._empty and self.empty.accuracy >= GOAL * self.full.accuracy:
            raise InputError(
                f"with every {unit} ablated the model does task {task.name} no worse (mean logit difference "
                f"{self._empty:.3g}, {self._full:.3g} whole; accuracy {self.empty.accuracy:.3f}, "
                f"{self.full.accuracy:.3f} whole), so no {unit} is needed for it"
            )

    def find(
        self,
        method: str = "lrp",
        *,
        by: str = "magnitude",
        rule: str | Rule | None = None,
        target: str = "difference",
        reduce: str | None = None,
        seed: int = 0,
        tell: Tell | None = None,
    ) -> Circuit:
        """Score, rank, and measure the circuits of all ``FRACTIONS`` and the sparsest one that does the task.

        Args:
            method: sparc3.ranking.COMPONENT_METHODS or, for weights, WEIGHT_METHODS.
            by: rank by "magnitude", or by signed "value" (what works against the task goes first).
            rule: for lrp, or several with "+" between them, whose scores are averaged, each divided by its sum; None:
                the best of ``default_rules`` on the ranking examples.
            target: what lrp and the gradients explain, of sparc3.tasks.TASK_TARGETS.
            reduce: how samples are reduced by lrp and the gradients: signed | abs | square (weights: token-square
                too, and integrated gradients always signed); None: ``default_settings``.
            seed: of random.
            tell: called with a few words when a step begins.

        Raises:
            InputError: the method does not fit the unit, or a setting is not known.
        """
        reduce = reduce or default_settings(self.unit, self.ablation)["reduce"]
        rules = [rule] if rule else list(default_rules(self.unit, self.ablation))
        check_circuit_settings(self.unit, method, self.ablation, by, rules[0], reduce, target)
        summed = ("lrp", "gradient", *(() if self.unit == "weight" else ("integrated-gradients",)))
        reduce = reduce if method in summed else "signed"
        settings: dict[str, Any] = {"unit": self.unit, "ablation": self.ablation, "method": method, "by": by}
        if method in summed:
            settings |= {"target": target, "reduce": reduce}
        if method == "random":
            settings |= {"seed": seed}
        tell = tell or (lambda words: None)
        start = time.perf_counter()
        compares = method == "lrp" and len(rules) > 1
        tell(f"{method}: scoring{f' by {len(rules)} rules' if compares else ''}")
        if compares:
            scores, settings = self._best_of(rules, settings)
        elif method == "lrp":
            scores = self._by_rules(rules[0], target, reduce)
            settings |= {"rule": rule_name(rules[0])}
        else:
            scores = self._scores(method, Rule(), target, reduce, seed)
        seconds = time.perf_counter() - start
        tell(f"{method}: measuring")
        curve = self.measure(scores, settings, FRACTIONS)
        tell(f"{method}: the sparsest circuit")
        smallest = self._smallest(scores, settings, curve)
        return Circuit(settings, scores, tuple(curve), *areas(curve), smallest, seconds)

    def measure(
        self, scores: torch.Tensor | Scores, settings: dict[str, Any], fractions: Sequence[float]
    ) -> list[Point]:
        """The circuits of the leading fractions, measured on the judging examples."""
        chosen = [self.kept(scores, settings, fraction) for fraction in fractions]
        counts = [
            round(keep.total * (1 - keep.sparsity)) if isinstance(keep, Mask) else int(keep.sum())
            for keep in chosen
        ]
        found = self._measure(chosen)
        return [
            self._point(fraction, count, values)
            for fraction, count, values in zip(fractions, counts, found, strict=True)
        ]

    def kept(
        self, scores: torch.Tensor | Scores, settings: dict[str, Any], fraction: float
    ) -> torch.Tensor | Mask:
        """The leading fraction: bool [n] of components, or a mask of weights."""
        if not 0 <= fraction <= 1:
            raise InputError(f"{fraction} is not a share of what there is to keep: it must be in [0, 1]")
        if isinstance(scores, Scores):
            if fraction == 0:
                return self._nothing()
            return select(scores, 1 - fraction, _PATTERNS.get(settings["method"], "global"), settings["by"])
        values = scores.abs() if settings["by"] == "magnitude" else scores
        order = torch.argsort(values, descending=True, stable=True)
        keep = torch.zeros(self.total, dtype=torch.bool)
        keep[order[: self.total - pruned_count(1 - fraction, self.total)]] = True
        return keep

    def mask(self, keep: torch.Tensor | Mask) -> Mask:
        """The weights of what is kept, as a mask; only where ablation is by zero."""
        if isinstance(keep, Mask) or self._components is None:
            assert isinstance(keep, Mask)
            return keep
        return self._components.mask(self.model, keep)

    @torch.no_grad()
    def logits(self, batch: Batch, keep: torch.Tensor | Mask | None = None) -> torch.Tensor:
        """Logits [B, V] after the prompts of a batch, on the CPU: of the whole model, or with the rest ablated."""
        with ExitStack() as stack:
            if isinstance(keep, Mask):
                keep.apply(self.model, keep=True)
                stack.callback(keep.undo, self.model)
            elif keep is not None and self._components is not None:
                stack.enter_context(ablated(self._components, keep, self._replace(batch)))
            inputs = model_inputs(batch)
            return self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()

    def node_relevance(self, target: str = "difference") -> tuple[Components, torch.Tensor]:
        """LRP of every head and MLP by its own default rule, whatever the unit, for the search's ablation.

        With fused experts: of heads alone.
        """
        fused = any(find(block, family_of(self.model).mlp_output) is None for block in blocks_of(self.model))
        found = components(self.model, "head" if fused else "node")
        settings: dict[str, Any] = {"target": target, "ablation": self.ablation}
        heads, mlps = (default_settings(unit, self.ablation)["rule"] for unit in ("head", "mlp"))
        scores = {
            rule: score_components(self.model, found, self._ranking, "lrp", rule=rule, **settings)
            for rule in {heads, mlps}
        }
        of_mlps = torch.tensor([name.startswith("m") for name in found.names])
        return found, torch.where(of_mlps, scores[mlps], scores[heads])

    def kept_and_ablated(self, nodes: Components, keep: torch.Tensor | Mask) -> tuple[set[str], set[str]]:
        """Names of heads and MLPs that are kept, be it in part, and of those that are ablated; of weights neither."""
        if self._components is None or isinstance(keep, Mask):
            return set(), set()
        kept, ablated = (nodes.sharing(self._components, chosen) for chosen in (keep, ~keep))
        return kept, ablated - kept

    def by_block(self, keep: torch.Tensor | Mask) -> list[dict[str, int]]:
        """[{block, kept, of}]: how many weights or components of each block are kept."""
        if isinstance(keep, Mask):
            prefix = f"{family_of(self.model).blocks}."
            pairs = [
                (int(name.removeprefix(prefix).split(".")[0]), count_bits(bits), math.prod(keep.shapes[name]))
                for name, bits in keep.bits.items()
            ]
        else:
            blocks = (int("".join(filter(str.isdigit, name.partition(".")[0]))) for name in self.names)
            pairs = [(block, int(on), 1) for block, on in zip(blocks, keep.tolist(), strict=True)]
        rows = {block: {"block": block, "kept": 0, "of": 0} for block, _, _ in sorted(pairs)}
        for block, kept, total in pairs:
            rows[block]["kept"] += kept
            rows[block]["of"] += total
        return list(rows.values())

    def _by_rules(self, rule: str | Rule, target: str, reduce: str) -> torch.Tensor | Scores:
        """LRP by one rule, or the mean of several."""
        return _mean([self._scores("lrp", one, target, reduce) for one in parse_rules(rule)])

    def _scores(
        self, method: str, rule: Rule, target: str, reduce: str, seed: int = 0
    ) -> torch.Tensor | Scores:
        """Of components [n], or of weights, on the ranking examples."""
        settings: dict[str, Any] = {"rule": rule, "target": target, "reduce": reduce, "seed": seed}
        if self._components is None:
            return score_weights(self.model, self._ranking, method, **settings)
        settings |= {"ablation": self.ablation}
        return score_components(self.model, self._components, self._ranking, method, **settings)

    def _best_of(
        self, rules: Sequence[str | Rule], settings: dict[str, Any]
    ) -> tuple[torch.Tensor | Scores, dict[str, Any]]:
        """(Scores, settings) by the rule whose circuit of some ranking examples is the smallest, the first of equals.

        Settings get "rule" and "compared": {rule: share kept by that circuit}, empty where the ranking examples tell
        nothing: the model does not do the task on them, or does it as well with everything ablated.
        """
        examples, target, reduce = self._task.ranking, settings["target"], settings["reduce"]
        # A file may have its groups one after another.
        known = Task(self._task.name, examples, examples[:: math.ceil(len(examples) / _COMPARED)])
        names = [rule_name(rule) for rule in rules]
        try:
            own = Search(self.model, self._tokenizer, known, self.unit, self.ablation)
        except InputError:
            first = self._by_rules(rules[0], target, reduce)
            return first, settings | {"rule": names[0], "compared": {}}
        by_rule = cache(partial(self._scores, "lrp", target=target, reduce=reduce))
        scored = [_mean([by_rule(one) for one in parse_rules(rule)]) for rule in rules]
        shares = [own._smallest(scores, settings).kept / self.total for scores in scored]
        best = shares.index(min(shares))
        compared = dict(zip(names, shares, strict=True))
        return scored[best], settings | {"rule": names[best], "compared": compared}

    def _smallest(
        self, scores: torch.Tensor | Scores, settings: dict[str, Any], curve: Sequence[Point] = ()
    ) -> Point:
        """The sparsest circuit that does the task; without a curve, no more of one is measured than that takes."""
        goal, points = GOAL * self.full.accuracy, list(curve)
        if not curve:
            points = [self.full]
            smaller = iter(sorted(FRACTIONS[:-1], reverse=True))
            while points[-1].accuracy >= goal and (fraction := next(smaller, None)):
                points += self.measure(scores, settings, [fraction])
        return sparsest(points, goal, lambda share: self.measure(scores, settings, [share])[0])

    def _nothing(self) -> torch.Tensor | Mask:
        if self._components is not None:
            return torch.zeros(self.total, dtype=torch.bool)
        shapes = {name: tuple(weight.weight.shape) for name, weight in prunable(self.model).items()}
        empty = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
        return Mask({name: pack_bits(kept) for name, kept in empty.items()}, shapes)

    def _measure(self, chosen: Sequence[torch.Tensor | Mask]) -> torch.Tensor:
        """Logit differences [len(chosen), N]."""
        if self._components is None:
            masks = [mask for mask in chosen if isinstance(mask, Mask)]
            return masked_differences(self.model, masks, self._judging)
        keeps = [keep for keep in chosen if isinstance(keep, torch.Tensor)]
        return ablated_differences(self.model, self._components, self._judging, keeps, self._replace)

    def _point(self, fraction: float, kept: int, values: torch.Tensor) -> Point:
        mean = values.double().mean().item()
        return Point(
            fraction,
            kept,
            mean,
            (values > 0).double().mean().item(),
            faithfulness(mean, self._full, self._empty),
        )


def _mean(each: Sequence[torch.Tensor | Scores]) -> torch.Tensor | Scores:
    """Scores of several rules, each divided by the sum of its |scores|, averaged; of one rule as they are."""
    first = each[0]
    if len(each) == 1:
        return first
    if isinstance(first, torch.Tensor):
        tensors = [one for one in each if isinstance(one, torch.Tensor)]
        return _mean_of(tensors, [_size([one]) for one in tensors])
    found = [one for one in each if isinstance(one, Scores)]
    sizes = [_size(one.tensors.values()) for one in found]
    averaged = {name: _mean_of([one.tensors[name] for one in found], sizes) for name in first.tensors}
    rule = f" {AND} ".join(str(one.settings["rule"]) for one in found)
    return replace(first, tensors=averaged, settings=first.settings | {"rule": rule})


def _mean_of(each: Sequence[torch.Tensor], sizes: Sequence[float]) -> torch.Tensor:
    return torch.stack([one / size for one, size in zip(each, sizes, strict=True)]).mean(0)


def _size(tensors: Iterable[torch.Tensor]) -> float:
    # -inf marks weights that are zero; where all scores are, they stay so.
    sums = (one.masked_fill(one.isinf(), 0.0).abs().sum(dtype=torch.float64).item() for one in tensors)
    return sum(sums) or 1.0
