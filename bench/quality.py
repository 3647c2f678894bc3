"""Which score prunes best, on real models: what is explained, how samples are reduced, and every part of the rule.

    python bench/quality.py tables                  # both tables, one calibration seed, development text
    python bench/quality.py defaults                # the defaults beside their peers, three seeds, held-out text
    python bench/quality.py tables --model smollm2  # one model

Calibration and development windows are disjoint parts of lee_background.cor, the held-out windows are lee.cor; a
window is BOS and 128 tokens. Defaults were chosen on the development text; the held-out text is for reporting.
Results go to bench/results/quality-*.json with every window's negative log-likelihood, and to a Markdown table, as
soon as each is measured; what the file already holds of the same study and settings is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from attribution_cases import load_benchmark_model
from real_models import lee, lee_background
from rich.console import Console

from sparc3.compress import default_settings, evaluate_pruned, prune
from sparc3.evaluate import Perplexity, paired_interval, perplexity
from sparc3.families import prunable
from sparc3.mask import Mask, fingerprint
from sparc3.report import versions
from sparc3.rules import Rule
from sparc3.samples import read_documents, windows
from sparc3.scores import Accumulators, Batch, Scores, accumulate, as_batches, attribute

RESULTS = Path(__file__).parent / "results"
PATTERNS = ("row", "2:4", "layer", "global")
LENGTH, DEVELOPMENT_WINDOWS, HELD_OUT_WINDOWS = 128, 16, 48
console = Console(stderr=True, width=140)


@dataclass(frozen=True)
class Case:
    """One score: a rule and what it explains, and how samples are reduced and ranked."""

    rule: str
    target: str = "logprob"
    reduce: str = "abs"
    skip_first: bool = False
    by: str = "magnitude"

    @property
    def backward(self) -> tuple[str, str]:
        """Cases that share it come out of one pass."""
        return self.rule, self.target

    def __str__(self) -> str:
        parts = [self.rule, self.target, self.reduce]
        parts += ["first token left out"] if self.skip_first else []
        parts += ["lowest first"] if self.by == "value" else []
        return ", ".join(parts)


SCORES = (
    Case("gradient"),
    Case("gradient", reduce="token-square"),
    Case("attnlrp"),
    Case("attnlrp", reduce="token-square"),
    Case("attnlrp", target="logit"),
    Case("attnlrp", target="logit", reduce="signed"),
    Case("attnlrp", target="logit", reduce="signed", by="value"),
    Case("attnlrp", reduce="token-square", skip_first=True),
    Case("attnlrp", target="logit-mean", skip_first=True),
)
MLP = "gradient,activation=identity,gate=half"
PARTS = {
    "attention (half rules)": "gradient,attention=half",
    "MLP (identity and half rule)": MLP,
    "attention and MLP": f"{MLP},attention=half",
    "norms (scale held constant)": "gradient,norm=constant",
    "q/k-norms only": "gradient,qknorm=constant",
    "all but the q/k-norms": "attnlrp,qknorm=gradient",
    "activation (identity)": "gradient,activation=identity",
}
PART_CASES = tuple(Case(rule, reduce=reduce) for rule in PARTS.values() for reduce in ("abs", "token-square"))
BASELINES = ("magnitude", "wanda", "ria")
# Wanda and RIA compare weights within a row; over layers and the model they are not meant to be used.
COMPARED = [
    *((pattern, peer) for pattern in ("row", "2:4") for peer in ("wanda", "ria", "gradient")),
    *((pattern, "gradient") for pattern in ("layer", "global")),
]


class Several:
    """Fills several accumulators from one backward."""

    def __init__(self, sinks: Sequence[Accumulators]) -> None:
        self.sinks = sinks

    def start(self, batch: Batch) -> None:
        for sink in self.sinks:
            sink.start(batch)

    def linear(self, name: str, g: torch.Tensor, x: torch.Tensor) -> None:
        for sink in self.sinks:
            sink.linear(name, g, x)


class Study:
    """One model, its calibration windows for a seed, the windows that it is judged on, and what is known of it.

    Every row found is written to ``target`` at once, and rows that it holds from an earlier run are kept.
    """

    def __init__(self, kind: str, model_name: str, samples: int, target: Path) -> None:
        self.target, self.samples = target, samples
        held_out = kind == "defaults"
        self.loaded = load_benchmark_model(model_name)
        self.model, tokenizer = self.loaded.model, self.loaded.tokenizer
        background = windows(tokenizer, read_documents([str(lee_background())]), LENGTH)
        order = torch.randperm(len(background), generator=torch.Generator().manual_seed(0))
        self.pool = background[order[DEVELOPMENT_WINDOWS:].sort().values]
        if held_out:
            self.judged = windows(tokenizer, read_documents([str(lee())]), LENGTH, HELD_OUT_WINDOWS, seed=0)
        else:
            self.judged = background[order[:DEVELOPMENT_WINDOWS].sort().values]
        self.measured: dict[str, Perplexity] = {}
        self.dense = self.perplexity()
        self.header = {
            "study": kind,
            "model": model_name,
            "note": self.loaded.note,
            "text": "held-out" if held_out else "development",
            "calibration": {"windows": samples, "tokens": LENGTH},
            "judged": {
                "windows": len(self.judged),
                "tokens": self.dense.tokens,
                "context": self.dense.context,
            },
        }
        self.results = self._earlier()

    def _earlier(self) -> list[dict]:
        """The rows of the results file, if it is of this study."""
        if not self.target.exists():
            return []
        data = json.loads(self.target.read_text())
        return data["results"] if all(data[name] == self.header[name] for name in self.header) else []

    def record(
        self,
        label: str,
        pattern: str,
        seed: int,
        settings: dict,
        measure: Callable[[], tuple[Perplexity, dict]],
    ) -> None:
        """One row, unless there is one whose settings hold ``settings``; measure: what is found, all settings."""
        of_case = [
            row
            for row in self.results
            if (row["label"], row["pattern"], row["seed"]) == (label, pattern, seed)
        ]
        if any(settings.items() <= row["settings"].items() for row in of_case):
            return
        start = time.perf_counter()
        found, settings = measure()
        seconds = time.perf_counter() - start
        console.print(f"  seed {seed} {pattern:>6} {found.value:12.2f}  {label} ({seconds:.0f} s)")
        self.results = [row for row in self.results if row not in of_case]
        self.results.append(
            {
                "label": label,
                "settings": settings,
                "pattern": pattern,
                "seed": seed,
                "perplexity": found.value,
                "nll": [round(value, 6) for value in found.nll.tolist()],
            }
        )
        data = self.header | {
            "dense": self.dense.value,
            "dense_nll": [round(value, 6) for value in self.dense.nll.tolist()],
            "date": time.strftime("%Y-%m-%d"),
            "versions": versions(),
            "results": self.results,
        }
        self.target.write_text(json.dumps(data) + "\n")
        self.target.with_suffix(".md").write_text(markdown(data))

    def perplexity(self) -> Perplexity:
        return perplexity(self.model, self.judged)

    def calibration(self, seed: int) -> torch.Tensor:
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(1 + seed))
        return self.pool[order[: self.samples].sort().values]

    def pruned(self, mask: Mask) -> Perplexity:
        """Each mask is judged once: some rules are the same on some models, and so are their masks."""
        digest = hashlib.sha256(b"".join(bits.numpy().tobytes() for bits in mask.bits.values())).hexdigest()
        if digest not in self.measured:
            self.measured[digest] = evaluate_pruned(self.model, mask, self.judged)
        return self.measured[digest]

    def scores(self, cases: Sequence[Case], samples: torch.Tensor) -> Iterator[tuple[Case, Scores]]:
        """One pass for all cases that share a backward."""
        weights = prunable(self.model)
        identity = fingerprint(self.model, {name: weight.weight for name, weight in weights.items()})
        sinks: dict[Case, Accumulators] = {}
        for case in cases:
            # Ranked differently, the same sums serve.
            twin = next((sink for other, sink in sinks.items() if _sums(other) == _sums(case)), None)
            sinks[case] = twin or Accumulators(weights, case.reduce, case.skip_first)
        rule, target = cases[0].backward
        distinct = list({id(sink): sink for sink in sinks.values()}.values())
        accumulate(
            self.model,
            as_batches(self.model, samples),
            Rule.parse(rule),
            target,
            "all",
            weights,
            Several(distinct),
        )
        tensors = {id(sink): sink.scores() for sink in distinct}
        for case, sink in sinks.items():
            yield case, Scores(tensors[id(sink)], frozenset(), identity, asdict(case))


def _sums(case: Case) -> tuple:
    return (*case.backward, case.reduce, case.skip_first)


def run_tables(study: Study, seeds: int) -> None:
    """Both tables of scores: one calibration seed, development text."""
    groups: dict[tuple, list[Case]] = {}
    for case in SCORES + PART_CASES:
        groups.setdefault(case.backward, []).append(case)
    for group in groups.values():
        run_cases(study, group, 0)
    for method in BASELINES:
        for pattern in ("row", "2:4") if method != "magnitude" else ("row", "2:4", "global"):
            run_method(study, method, pattern, 0)


def run_cases(study: Study, cases: Sequence[Case], seed: int) -> None:
    """Every case and pattern; the cases share a backward, which is run once and only if it is needed."""
    scores: dict[Case, Scores] = {}

    def measure(case: Case, pattern: str) -> tuple[Perplexity, dict]:
        if not scores:
            scores.update(study.scores(cases, study.calibration(seed)))
        return study.pruned(scores[case].select(_sparsity(pattern), pattern, by=case.by)), asdict(case)

    for case in cases:
        for pattern in PATTERNS:
            study.record(str(case), pattern, seed, asdict(case), partial(measure, case, pattern))


def run_defaults(study: Study, seeds: int) -> None:
    """The defaults, gradient with the same target and reduction, and the baselines; held-out text."""
    for seed in range(seeds):
        for method in ("gradient", "lrp"):
            run_default_scores(study, method, seed)
        for method in BASELINES:
            if method != "magnitude" or seed == 0:
                for pattern in PATTERNS[:2]:
                    run_method(study, method, pattern, seed)


def run_default_scores(study: Study, method: str, seed: int) -> None:
    """Every pattern with its default, scored once where patterns share it; gradient drops the rule alone."""
    last: dict[str, Scores] = {}

    def measure(settings: dict, pattern: str) -> tuple[Perplexity, dict]:
        key = json.dumps(settings)
        if key not in last:
            last.clear()
            last[key] = attribute(study.model, study.calibration(seed), method, **settings)
        return study.pruned(last[key].select(_sparsity(pattern), pattern)), last[key].settings

    for pattern in PATTERNS:
        settings = default_settings(pattern)
        rule = settings.pop("rule") if method == "gradient" else settings["rule"]
        asked = settings | {"rule": "gradient" if method == "gradient" else str(Rule.parse(rule))}
        study.record(method, pattern, seed, asked, partial(measure, settings, pattern))


def run_method(study: Study, method: str, pattern: str, seed: int) -> None:
    """A baseline by sparc3.prune."""

    def measure() -> tuple[Perplexity, dict]:
        mask = prune(study.model, study.calibration(seed), method, _sparsity(pattern), pattern)
        return study.pruned(mask), mask.settings

    study.record(method, pattern, seed, {"method": method}, measure)


def _sparsity(pattern: str) -> float | None:
    return None if ":" in pattern else 0.5


def markdown(data: dict) -> str:
    """Perplexity of every score and pattern, and where the default was measured how it stands to its peers.

    Over seeds the geometric mean; in brackets the 95 % interval against Wanda in nats a token, paired over windows.
    """
    results = data["results"]
    lines = [
        f"### {data['model']} ({data['note']}), {data['text']} text\n",
        f"Dense {data['dense']:.2f}; {data['calibration']['windows']} calibration windows, judged on "
        f"{data['judged']['windows']} windows of {LENGTH} tokens, "
        f"calibration seeds {sorted({row['seed'] for row in results})}.\n",
        "| score | " + " | ".join(PATTERNS) + " |\n|---|" + "---|" * len(PATTERNS),
    ]
    for label in dict.fromkeys(row["label"] for row in results):
        cells = [_cell(results, label, pattern) for pattern in PATTERNS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    if data["text"] == "held-out":
        lines.append("\n| pattern | lrp against | nats a token (95 %) | lrp is |\n|---|---|---|---|")
        lines += [_verdict(results, pattern, peer) for pattern, peer in COMPARED]
    return "\n".join(lines) + "\n"


def _verdict(results: list[dict], pattern: str, peer: str) -> str:
    mean, low, high = paired_interval(_nll(results, "lrp", pattern), _nll(results, peer, pattern))
    word = "ahead" if high < 0 else "behind" if low > 0 else "not told apart"
    return f"| {pattern} | {peer} | {mean:+.3f} ({low:+.3f}, {high:+.3f}) | {word} |"


def _cell(results: list[dict], label: str, pattern: str) -> str:
    mine = _nll(results, label, pattern)
    if mine is None:
        return ""
    text = f"{mine.nll.mean().exp().item():.1f}"
    peer = _nll(results, "wanda", pattern)
    if peer is None or label == "wanda" or mine.nll.shape != peer.nll.shape:
        return text
    _, low, high = paired_interval(mine, peer)
    return f"{text} ({low:+.3f}, {high:+.3f})"


def _nll(results: list[dict], label: str, pattern: str) -> Perplexity | None:
    """Each window's negative log-likelihood, averaged over the seeds so that windows are independent."""
    rows = [row["nll"] for row in results if row["label"] == label and row["pattern"] == pattern]
    if not rows:
        return None
    nll = torch.tensor(rows, dtype=torch.float64).mean(0)
    return Perplexity(nll.mean().exp().item(), 0, LENGTH + 1, nll)


def main(
    study: Annotated[str, typer.Argument(help="tables | defaults")],
    model: Annotated[
        list[str] | None, typer.Option(help="smollm2 | gemma3 | a folder; both real models if none")
    ] = None,
    samples: int = 32,
    seeds: int = 3,
) -> None:
    """Run a study and write its JSON and Markdown to bench/results."""
    run = {"tables": run_tables, "defaults": run_defaults}[study]
    for name in model or ["smollm2", "gemma3"]:
        console.print(f"{name}:")
        target = RESULTS / f"quality-{study}-{Path(name).name}.json"
        run(Study(study, name, samples, target), seeds)
        Console(width=140).print(target.with_suffix(".md").read_text(), markup=False)


if __name__ == "__main__":
    typer.run(main)
