"""LRP pruning beside the strongest peers, on real models: perplexity, time and memory in one table.

    python bench/peers.py                       # both real models, three calibration seeds, held-out text
    python bench/peers.py --model smollm2 --seed 0 --pattern 50%
    python bench/peers.py --text development    # what the defaults of allocation and repair were chosen on
    python bench/peers.py --apart time          # in results files of their own, peers-MODEL-time.json

Calibration windows come from lee_background.cor, the held-out windows are lee.cor; a window is BOS and 128 tokens.
Results go to bench/results/peers-MODEL.json, case by case, with every window's negative log-likelihood, and to a
Markdown table; cases that are there already are not run again. Each case is timed alone, with all that it needs
from the dense model on, and its peak memory is what the process has resident at most (the model is part of it;
up to 512 MiB are activations that attribution keeps, in the first cases half of what was free).
``--busy``: other work runs beside, so that times say nothing: they are left out, and cases share scores.
"""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attribution_cases import load_benchmark_model
from real_models import lee, lee_background
from rich.console import Console

from sparc3.allocate import relevance_budgets
from sparc3.compress import Pruner, default_settings, evaluate_pruned, repair
from sparc3.evaluate import Perplexity, paired_interval, perplexity
from sparc3.mask import Mask
from sparc3.output import peak_rss
from sparc3.report import versions
from sparc3.samples import read_documents, windows
from sparc3.scores import Scores, attribute

RESULTS = Path(__file__).parent / "results"
LENGTH, DEVELOPMENT_WINDOWS, HELD_OUT_WINDOWS = 128, 16, 48
# Activations that attribution keeps: more would make it no faster here and its peak higher.
KEPT_BYTES = 512 << 20
PATTERNS = ("50%", "60%", "70%", "2:4", "4:8")
ALLOCATED, REPAIRED = "LRP + allocation", "LRP + allocation + repair"
# N:M leaves nothing to allocate.
REPAIRED_NM = "LRP + repair"
console = Console(stderr=True, width=140)

# label -> (method, rule and reduction): scored once a seed, whatever the sparsity.
ONE_SHOT: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient x weight": ("gradient", {"target": "logprob", "reduce": "abs"}),
    "LRP (paper)": ("lrp", {"rule": "attnlrp", "target": "logit", "reduce": "signed"}),
    "LRP": ("lrp", default_settings("row")),
    "LRP for N:M": ("lrp", default_settings("2:4")),
    ALLOCATED: ("lrp", default_settings("layer")),
}
SWEEPS = {"Wanda": "wanda", "RIA": "ria", "GBLM": "gblm", "SparseGPT": "sparsegpt", "OWL + Wanda": "wanda"}
UPDATING = ("SparseGPT", REPAIRED, REPAIRED_NM)


def labels(pattern: str) -> list[str]:
    """The methods of one column, in the order in which they are run."""
    nm = ":" in pattern
    found = ["magnitude", "Wanda", "SparseGPT", "LRP", *(() if nm else (ALLOCATED, REPAIRED, "OWL + Wanda"))]
    return [*found, *((REPAIRED_NM,) if nm else ()), "RIA", "gradient x weight", "LRP (paper)", "GBLM"]


class Seed:
    """One draw of calibration windows, and the scores that all columns share."""

    def __init__(self, model: Any, samples: torch.Tensor, keep: bool) -> None:
        self.model, self.samples, self.keep = model, samples, keep
        self.scored: dict[str, tuple[Scores, float]] = {}

    def scores(self, label: str) -> tuple[Scores, float]:
        """(scores, seconds that they took); rows and N:M may have the same settings."""
        method, settings = ONE_SHOT[label]
        key = f"{method} {settings}"
        if key in self.scored:
            return self.scored[key]
        start = time.perf_counter()
        found = attribute(self.model, self.samples, method, memory=KEPT_BYTES, **settings)
        taken = found, time.perf_counter() - start
        if self.keep:
            self.scored[key] = taken
        return taken

    def mask(self, label: str, pattern: str) -> tuple[Mask, float]:
        """(mask, seconds): shared scores count for every method that uses them."""
        nm = ":" in pattern
        lrp = "LRP for N:M" if nm else "LRP"
        sparsity = None if nm else float(pattern.rstrip("%")) / 100
        start, before = time.perf_counter(), 0.0
        if label == "magnitude":
            mask = attribute(self.model, self.samples, "magnitude").select(sparsity, pattern if nm else "row")
        elif label in (REPAIRED, REPAIRED_NM):
            scores, before = self.scores(lrp if nm else ALLOCATED)
            start = time.perf_counter()
            # Rows that a whole layer loses cannot be repaired: the share of each tensor is taken from every row.
            budgets = None if sparsity is None else relevance_budgets(scores, sparsity)
            given = scores.select(sparsity, pattern if nm else "row", budgets=budgets)
            del scores
            mask = repair(self.model, self.samples, given)
        elif label in ONE_SHOT:
            scores, before = self.scores(lrp if label == "LRP" else label)
            start = time.perf_counter()
            if label == ALLOCATED:
                assert sparsity is not None
                mask = scores.select(sparsity, "layer", budgets=relevance_budgets(scores, sparsity))
            else:
                mask = scores.select(sparsity, pattern if nm else "row")
        else:
            # As published: SparseGPT picks among all rows, the others within each.
            inside = pattern if nm else "layer" if label == "SparseGPT" else "row"
            allocate = "owl" if label.startswith("OWL") else "uniform"
            pruner = Pruner(self.model, self.samples, inside, allocate=allocate)
            mask = pruner.mask(SWEEPS[label], sparsity)
        return mask, before + time.perf_counter() - start


class Table:
    """One model's results file."""

    def __init__(self, model_name: str, text: str, samples: int, dtype: str, target: Path) -> None:
        self.name, self.samples, self.target = model_name, samples, target
        self.loaded = load_benchmark_model(model_name, dtype)
        tokenizer = self.loaded.tokenizer
        background = windows(tokenizer, read_documents([str(lee_background())]), LENGTH)
        order = torch.randperm(len(background), generator=torch.Generator().manual_seed(0))
        self.pool = background[order[DEVELOPMENT_WINDOWS:].sort().values]
        if text == "held-out":
            self.judged = windows(tokenizer, read_documents([str(lee())]), LENGTH, HELD_OUT_WINDOWS, seed=0)
        else:
            self.judged = background[order[:DEVELOPMENT_WINDOWS].sort().values]
        self.header = {
            "model": model_name,
            "note": self.loaded.note,
            "text": text,
            "calibration": {"windows": samples, "tokens": LENGTH},
            "judged": {"windows": len(self.judged), "tokens": LENGTH},
            **({} if dtype == "float32" else {"dtype": dtype}),
        }
        data = json.loads(target.read_text()) if target.exists() else {}
        same = all(data.get(key) == self.header.get(key) for key in (*self.header, "dtype"))
        self.rows: list[dict[str, Any]] = data["results"] if same else []
        self.dense = data["dense"] if same else perplexity(self.loaded.model, self.judged).value

    def calibration(self, seed: int) -> torch.Tensor:
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(1 + seed))
        return self.pool[order[: self.samples].sort().values]

    def run(self, seeds: list[int], patterns: list[str], only: list[str], busy: bool) -> None:
        for number in seeds:
            seed = Seed(self.loaded.model, self.calibration(number), keep=busy)
            for pattern in patterns:
                for label in labels(pattern):
                    if (only and label not in only) or (label == "magnitude" and number > 0):
                        continue
                    if not any(row["case"] == [label, pattern, number] for row in self.rows):
                        self._measure(seed, label, pattern, number, busy)

    def _measure(self, seed: Seed, label: str, pattern: str, number: int, busy: bool) -> None:
        if not busy:
            # What earlier cases left goes back to the system, and Linux starts counting the peak anew.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        mask, seconds = seed.mask(label, pattern)
        peak = peak_rss()
        found = evaluate_pruned(self.loaded.model, mask, self.judged)
        settings = {key: value for key, value in mask.settings.items() if key != "budgets"}
        self.rows.append(
            {
                "case": [label, pattern, number],
                "settings": settings,
                "sparsity": mask.sparsity,
                "perplexity": found.value,
                "seconds": None if busy else round(seconds, 1),
                "peak_mib": None if busy or peak is None else peak >> 20,
                "threads": torch.get_num_threads(),
                "nll": [round(value, 6) for value in found.nll.tolist()],
            }
        )
        console.print(f"  seed {number} {pattern:>4} {found.value:10.2f} {seconds:6.0f} s  {label}")
        self.write()

    def write(self) -> None:
        data = self.header | {
            "dense": self.dense,
            "date": time.strftime("%Y-%m-%d"),
            "versions": versions(),
            "results": self.rows,
        }
        partial = self.target.with_suffix(".partial")
        partial.write_text(json.dumps(data) + "\n")
        partial.replace(self.target)
        self.target.with_suffix(".md").write_text(markdown(data))


def loss(rows: list[dict[str, Any]], label: str, pattern: str, seeds: set[int]) -> Perplexity | None:
    """Each window's negative log-likelihood, averaged over the seeds so that windows are independent."""
    found = [row for row in rows if row["case"][:2] == [label, pattern]]
    # Magnitude knows no calibration: its one seed stands for all.
    chosen = found if label == "magnitude" else [row for row in found if row["case"][2] in seeds]
    if not chosen:
        return None
    nll = torch.tensor([row["nll"] for row in chosen], dtype=torch.float64).mean(0)
    return Perplexity(nll.mean().exp().item(), 0, LENGTH + 1, nll)


def seeds_of(rows: list[dict[str, Any]], label: str, pattern: str) -> set[int]:
    return {row["case"][2] for row in rows if row["case"][:2] == [label, pattern]}


def markdown(data: dict[str, Any]) -> str:
    """The table, how our two best stand to every other method, and what each took."""
    rows = data["results"]
    dtype = f", in {data['dtype']}" if "dtype" in data else ""
    patterns = [pattern for pattern in PATTERNS if any(row["case"][1] == pattern for row in rows)]
    names = dict.fromkeys(label for pattern in PATTERNS for label in labels(pattern))
    lines = [
        f"### {data['model']} ({data['note']}{dtype}), {data['text']} text\n",
        f"Perplexity, dense {data['dense']:.2f}; {data['calibration']['windows']} calibration windows, judged on "
        f"{data['judged']['windows']} windows of {LENGTH} tokens; geometric mean over calibration seeds, their "
        "number in brackets. Methods below the line change the weights that they keep.\n",
        "| method | "
        + " | ".join(patterns)
        + " | seconds | peak MiB |\n|---|"
        + "---|" * (len(patterns) + 2),
    ]
    for label in sorted(names, key=lambda name: name in UPDATING):
        cells = []
        for pattern in patterns:
            seeds = seeds_of(rows, label, pattern)
            mine = loss(rows, label, pattern, seeds)
            cells.append("" if mine is None else f"{mine.value:.1f} ({len(seeds)})")
        # Of earlier runs it is not known how many threads they had.
        timed = [
            row for row in rows if row["case"][0] == label and row["seconds"] and row.get("threads", 1) > 1
        ]
        measures = [[row[name] for row in timed if row[name]] for name in ("seconds", "peak_mib")]
        took = [_range(values) for values in measures]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} | {' | '.join(took)} |")
    lines += [
        "\nIn nats a token with a 95 % interval paired over windows, over the seeds that both have; negative is "
        "ahead.\n",
        "| | against | " + " | ".join(patterns) + " |\n|---|---|" + "---|" * len(patterns),
    ]
    for ours, others in ((ALLOCATED, [*names]), (REPAIRED, ["SparseGPT", "OWL + Wanda", "Wanda"])):
        for other in others:
            if other in (ours, REPAIRED, REPAIRED_NM) or (ours == ALLOCATED and other in UPDATING):
                continue
            cells = [_verdict(rows, ours, other, pattern) for pattern in patterns]
            if any(cells):
                lines.append(f"| {ours} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(values: list[float]) -> str:
    """Lowest to highest, as what a case takes depends on its pattern."""
    if not values:
        return "not measured"
    low, high = (f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _verdict(rows: list[dict[str, Any]], ours: str, other: str, pattern: str) -> str:
    if ":" in pattern:
        ours = {ALLOCATED: "LRP", REPAIRED: REPAIRED_NM}[ours]
    both = seeds_of(rows, ours, pattern)
    both &= both if other == "magnitude" else seeds_of(rows, other, pattern)
    mine, theirs = loss(rows, ours, pattern, both), loss(rows, other, pattern, both)
    if ours == other or mine is None or theirs is None:
        return ""
    mean, low, high = paired_interval(mine, theirs)
    word = "ahead" if high < 0 else "behind" if low > 0 else "not told apart"
    return f"{mean:+.3f} ({low:+.3f}, {high:+.3f}) {word}"


def main(
    model: Annotated[list[str] | None, typer.Option(help="smollm2 | gemma3 | a folder; both if none")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="50% | 60% | 70% | 2:4 | 4:8")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run these rows alone.")] = None,
    text: str = "held-out",
    samples: int = 32,
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16, of the model for all methods.")] = "float32",
    seed: Annotated[
        list[int] | None, typer.Option(help="Draws of calibration windows; 0, 1 and 2 if none")
    ] = None,
    busy: bool = False,
    apart: Annotated[
        str, typer.Option(metavar="NAME", help="A results file of its own, peers-MODEL-NAME.")
    ] = "",
) -> None:
    """Run the comparison and write its JSON and Markdown to bench/results."""
    for name in model or ["smollm2", "gemma3"]:
        words = text if text != "held-out" else "", dtype if dtype != "float32" else "", apart
        suffix = "".join(f"-{word}" for word in words if word)
        table = Table(name, text, samples, dtype, RESULTS / f"peers-{Path(name).name}{suffix}.json")
        table.run(seed or [0, 1, 2], pattern or list(PATTERNS), only or [], busy)
        Console(width=160).print(markdown(json.loads(table.target.read_text())), markup=False)


if __name__ == "__main__":
    typer.run(main)
