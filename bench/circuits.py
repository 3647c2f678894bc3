"""Circuits of tasks, seed by seed: how scores agree with exact ablation, which rule is best, and how sparse they are.

    python bench/circuits.py agreement              # relevance against exact ablation, head by head and MLP by MLP
    python bench/circuits.py rules                  # every rule, reduction and target, on development examples
    python bench/circuits.py weights --ranked 64    # weights ranked globally, in layers and in rows, same examples
    python bench/circuits.py tables                 # the defaults beside their peers, on judging examples
    python bench/circuits.py tables --model gemma3  # one model
    python bench/circuits.py tables --ranked 64     # rank on more examples, which is cheap
    python bench/circuits.py tables --method lrp --method gradient --rule attnlrp --unit head --ablation patch

Models: smollm2 and gemma3 (dequantised, see real_models) and the two bundled ones; the task is indirect objects. A
task's ranking examples are drawn from other templates and names than its judging examples. Rules are chosen on
ranking examples alone ("rules", "weights", and "agreement" marked ranking); judging examples are for reporting.

Results are kept row by row in bench/results/circuits-STUDY-MODEL.json, beside a Markdown table; what is in the file
is not measured again, so an interrupted study goes on where it was, and options add rows to it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import circuit_tables
import torch
import typer
from attribution_cases import load_benchmark_model
from rich.console import Console
from transformers import PreTrainedModel

from sparc3.ablation import differences, masked_differences
from sparc3.agreement import agreement
from sparc3.circuit import Search
from sparc3.circuit_settings import DEFAULT_RULE
from sparc3.ranking import score_components, score_weights
from sparc3.report import as_json, versions
from sparc3.scores import Scores
from sparc3.select import select
from sparc3.targets import Batch
from sparc3.tasks import Task, load_task, task_batches
from sparc3.units import components

RESULTS = Path(__file__).parent / "results"
MODELS = ("tiny-llama", "tiny-opt", "smollm2", "gemma3")
console = Console(stderr=True, width=140)

# Every choice of a part's rule; products of gated MLPs follow their activation (see sparc3.rules).
_MLPS = (
    "activation=gradient,gate=gradient",
    "activation=identity,gate=gradient",
    "activation=identity,gate=half",
)
RULES = tuple(
    f"norm={norm},{mlp},attention={attention}"
    for norm, mlp, attention in product(("gradient", "constant"), _MLPS, ("gradient", "half", "value"))
)
# Gradient, the rule that agrees best with exact patching, AttnLRP, activations' identity rule alone, and both.
LEADING = (
    RULES[0],
    "norm=constant,activation=gradient,gate=gradient,attention=gradient",
    "norm=constant,activation=identity,gate=half,attention=half",
    "norm=gradient,activation=identity,gate=gradient,attention=gradient",
    "norm=constant,activation=identity,gate=gradient,attention=gradient",
)
# What is reported of judging examples: these, and attention's half rule alone.
REPORTED = (*LEADING, "norm=gradient,activation=gradient,gate=gradient,attention=half")
REDUCTIONS = ("signed", "abs", "square")
TARGETS = ("difference", "logit", "logprob")


class Rows:
    """The rows of a study and a model: those in the file, and those that are added to it."""

    def __init__(self, study: str, model: str, about: dict[str, Any]) -> None:
        self.path = RESULTS / f"circuits-{study}-{Path(model).name}.json"
        self.data: dict[str, Any] = {"study": study, "model": model, **about, "rows": []}
        if self.path.exists():
            self.data["rows"] = json.loads(self.path.read_text())["rows"]

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The row of a key, where it is there."""
        rows = self.data["rows"]
        return next((row for row in rows if all(row.get(name) == key[name] for name in key)), None)

    def measure(self, key: dict[str, Any], function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key, measured unless it is there; the file is written whole."""
        if (known := self.find(key)) is not None:
            return known
        start = time.perf_counter()
        row = key | function()
        console.print(f"  {time.perf_counter() - start:6.0f} s  {key}")
        self.data["rows"].append(row)
        self.data |= {"date": time.strftime("%Y-%m-%d"), **versions()}
        unfinished = self.path.with_suffix(".partial")
        unfinished.write_text(json.dumps(json.loads(as_json(self.data))) + "\n")
        unfinished.replace(self.path)
        self.path.with_suffix(".md").write_text(circuit_tables.markdown(self.data))
        return row


@dataclass(frozen=True)
class Choice:
    """What of a study to measure; empty: all of it.

    Attributes:
        seeds: how many.
        rules: of LRP; "" is the default, which compares rules on ranking examples for some units.
        reductions: of samples, for the rules that are tried.
    """

    seeds: int
    units: list[str]
    ablations: list[str]
    methods: list[str]
    rules: list[str]
    sides: list[str]
    reductions: list[str]
    within: list[str]


class Study:
    """A model and its task, drawn anew for every seed: ``examples`` to judge on and ``ranked`` to rank on."""

    def __init__(self, study: str, model: str, examples: int, ranked: int) -> None:
        self.loaded = load_benchmark_model(model)
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self.bundled, self.examples, self.ranked = model.startswith("tiny-"), examples, ranked
        self.rows = Rows(study, model, {"note": self.loaded.note, "task": "ioi"})

    def sizes(self) -> dict[str, int]:
        return {"ranked": self.ranked, "examples": self.examples}

    def task(self, seed: int) -> Task:
        drawn = load_task("ioi", self.tokenizer, max(self.sizes().values()), seed, self.bundled)
        return Task(drawn.name, drawn.ranking[: self.ranked], drawn.judging[: self.examples])

    def development(self, seed: int) -> Task:
        """Ranking examples alone: ranked on some templates and judged on the others."""
        task = load_task("ioi", self.tokenizer, 2 * max(self.sizes().values()), seed, self.bundled)
        groups = sorted({one.group for one in task.ranking})
        sides: tuple[list, list] = ([], [])
        for one in task.ranking:
            sides[groups.index(one.group) % 2].append(one)
        ranking, judging = sides
        return Task(task.name, tuple(ranking[: self.ranked]), tuple(judging[: self.examples]))


def run_agreement(study: Study, choice: Choice) -> None:
    """Scores of every head and MLP against exact ablation: ranking examples of one seed, judging ones of all."""
    sides = [("ranking", 0), *(("judging", seed) for seed in range(choice.seeds))]
    for (side, seed), ablation in product(sides, choice.ablations or ("zero", "patch")):
        if side in (choice.sides or ("ranking", "judging")):
            _agreement(study, side, seed, ablation, choice)


def _agreement(study: Study, side: str, seed: int, ablation: str, choice: Choice) -> None:
    model, found = study.model, components(study.model, "node")
    batches = task_batches(model, study.tokenizer, getattr(study.task(seed), side))

    def scores(method: str, rule: str) -> list[float]:
        values = score_components(model, found, batches, method, ablation=ablation, rule=rule)
        return [float(f"{value:.6g}") for value in values.tolist()]

    def against_exact(method: str, rule: str) -> dict[str, Any]:
        values = scores(method, rule)
        row: dict[str, Any] = {"scores": values}
        for kind, letter in (("heads", "a"), ("mlps", "m")):
            chosen = [index for index, name in enumerate(found.names) if name.startswith(letter)]
            row[kind] = agreement(torch.tensor(values)[chosen], torch.tensor(exact)[chosen])
        return row

    key = {"side": side, "seed": seed, "ablation": ablation, "examples": study.examples}
    exact = study.rows.measure(key | {"method": "exact"}, lambda: {"scores": scores("exact", "gradient")})[
        "scores"
    ]
    rules = choice.rules or (RULES if side == "ranking" else REPORTED)
    cases = [("integrated-gradients", None), *(("lrp", rule) for rule in rules)]
    if any(site.norm is not None for site in found.sites):
        # Elsewhere attribution patching is LRP by the rule "gradient" (sparc3.ranking).
        cases.insert(0, ("gradient", None))
    for method, rule in cases:
        if method in (choice.methods or (method,)):
            study.rows.measure(
                key | {"method": method, "rule": rule}, partial(against_exact, method, rule or "gradient")
            )


def run_rules(study: Study, choice: Choice) -> None:
    """Every rule, and the leading or asked ones with every reduction and, on bundled models, every target.

    Development examples.
    """
    leading = choice.rules or LEADING
    for seed, unit in product(range(choice.seeds), choice.units or UNITS):
        search = Search(study.model, study.tokenizer, study.development(seed), unit)
        reductions = REDUCTIONS if unit == "weight" else (*REDUCTIONS, "token-abs")
        cases = list(product(("difference",), reductions, leading))
        cases += [("difference", "signed", rule) for rule in _rules(unit)]
        cases += list(product(TARGETS, reductions, leading)) if study.bundled else []
        for target, reduce, rule in cases:
            if rule not in (choice.rules or (rule,)) or reduce not in (choice.reductions or (reduce,)):
                continue
            key = {"seed": seed, "unit": unit, "rule": rule, "target": target, "reduce": reduce}
            key |= study.sizes()
            study.rows.measure(key, partial(_find, search, "lrp", rule=rule, target=target, reduce=reduce))


def _rules(unit: str) -> Iterator[str]:
    for rule in RULES:
        if unit == "weight" and "attention=value" in rule:
            continue  # gives queries and keys no relevance
        yield rule


SHARES = (0.24, 0.32, 0.4, 0.5)


def run_weights(study: Study, choice: Choice) -> None:
    """Circuits of weights that are ranked within different parts, on development examples."""
    cases = [
        ("lrp", rule, reduce)
        for rule in choice.rules or (DEFAULT_RULE,)
        for reduce in choice.reductions or REDUCTIONS
    ]
    cases += [("gradient", "", reduce) for reduce in choice.reductions or REDUCTIONS]
    cases += [("wanda", "", "")]
    for seed in range(choice.seeds):
        task = study.development(seed)
        ranking, judging = (
            task_batches(study.model, study.tokenizer, side) for side in (task.ranking, task.judging)
        )
        for method, rule, reduce in cases:
            if method not in (choice.methods or (method,)):
                continue
            settings: dict[str, Any] = {"rule": rule or "gradient", "reduce": reduce or "signed"}
            scored = cache(partial(score_weights, study.model, ranking, method, **settings))
            for within in choice.within or ("global", "layer", "row"):
                key = {"seed": seed, "method": method, "rule": rule, "reduce": reduce, "within": within}
                study.rows.measure(
                    key | study.sizes(), partial(_weights, study.model, scored, within, judging)
                )


def _weights(
    model: PreTrainedModel, scored: Callable[[], Scores], within: str, judging: Sequence[Batch]
) -> dict[str, Any]:
    """Accuracy and mean logit difference at each of ``SHARES``, both as shares of the whole model's."""
    masks = [select(scored(), 1 - share, within) for share in SHARES]
    found, whole = masked_differences(model, masks, judging).double(), differences(model, judging).double()
    accuracy = (found > 0).double().mean(1) / (whole > 0).double().mean()
    return {
        "shares": SHARES,
        "accuracy": accuracy.tolist(),
        "difference": (found.mean(1) / whole.mean()).tolist(),
    }


# Random and magnitude are the same whatever is explained; Wanda's weights are ranked within rows, as published.
_PEERS = ("gradient", "integrated-gradients", "wanda", "magnitude", "random")


def run_tables(study: Study, choice: Choice) -> None:
    """The default beside its peers: how much of the model still does the task, on judging examples."""
    for seed, unit in product(range(choice.seeds), choice.units or UNITS):
        for ablation in choice.ablations or (("zero",) if unit != "head" else ("zero", "patch")):
            key = {"seed": seed, "unit": unit, "ablation": ablation} | study.sizes()
            peers = (*_PEERS, *(() if unit == "weight" else ("activation",)))
            cases = [(name, "") for name in choice.methods or ("lrp", *peers) if name != "lrp"]
            if "lrp" in (choice.methods or ("lrp",)):
                cases = [*(("lrp", rule) for rule in choice.rules or ("",)), *cases]
            missing = [
                case for case in cases if study.rows.find(key | {"method": case[0], "rule": case[1]}) is None
            ]
            if not missing:
                continue
            search = Search(study.model, study.tokenizer, study.task(seed), unit, ablation)
            for method, rule in missing:
                study.rows.measure(
                    key | {"method": method, "rule": rule},
                    partial(_find, search, method, seed=seed, rule=rule or None),
                )
    circuit_tables.plots(study.rows.data, study.rows.path)


def _find(search: Search, method: str, **settings: Any) -> dict[str, Any]:
    found = search.find(method, **settings).described()
    return {name: found[name] for name in ("settings", "curve", "cpr", "cmd", "sparsest", "seconds")}


UNITS = ("weight", "neuron")
STUDIES = {"agreement": run_agreement, "rules": run_rules, "weights": run_weights, "tables": run_tables}


def main(
    study: Annotated[str, typer.Argument(help=" | ".join(STUDIES))],
    model: Annotated[
        list[str] | None, typer.Option(help=f"{' | '.join(MODELS)} | a folder; all if none")
    ] = None,
    unit: Annotated[
        list[str] | None, typer.Option(help="weight | neuron | head ...; the first two if none")
    ] = None,
    ablation: Annotated[list[str] | None, typer.Option(help="zero | patch | mean; not for rules")] = None,
    method: Annotated[list[str] | None, typer.Option(help="lrp | gradient ...; all if none")] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="Of lrp; the reported, all or the default if none; for rules and tables + averages several"
        ),
    ] = None,
    side: Annotated[list[str] | None, typer.Option(help="ranking | judging, for agreement")] = None,
    reduce: Annotated[
        list[str] | None,
        typer.Option(help="signed | abs | square | token-abs, for rules"),
    ] = None,
    within: Annotated[list[str] | None, typer.Option(help="global | layer | row, for weights")] = None,
    examples: Annotated[int, typer.Option(help="On each side.")] = 32,
    ranked: Annotated[
        int | None,
        typer.Option(help="Of the ranking side, but for agreement; as many as --examples if none"),
    ] = None,
    seeds: int = 3,
) -> None:
    """Run a study, and write its rows and its tables to bench/results."""
    lists = (unit, ablation, method, rule, side, reduce, within)
    choice = Choice(seeds, *(chosen or [] for chosen in lists))
    for name in model or MODELS:
        console.print(f"{study}, {name}:")
        STUDIES[study](Study(study, name, examples, ranked or examples), choice)


if __name__ == "__main__":
    typer.run(main)
