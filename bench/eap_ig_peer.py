"""EAP-IG's own code beside us: heads under patching, ranked by its scores and by ours, judged the same way.

    git clone https://github.com/hannamw/EAP-IG ~/eap-ig
    python -m venv ~/eap-env && ~/eap-env/bin/pip install torch matplotlib "transformer-lens<4"
    python bench/eap_ig_peer.py ~/eap-ig ~/eap-env/bin/python smollm2      # a Llama: smollm2 | tiny-llama | a folder

It scores in a process and an environment of its own (bench/eap_ig_scores.py); none of its code is here. Indirect
objects, 5 steps of integrated gradients on both sides: its steps end at the clean prompt, ours are midpoints. Results
go to bench/results/eap-ig-MODEL.json and a Markdown table.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attribution_cases import load_benchmark_model
from rich.console import Console

from sparc3.agreement import agreement
from sparc3.circuit import Search
from sparc3.faithfulness import FRACTIONS, GOAL, areas, sparsest
from sparc3.models import BUNDLED, Loaded
from sparc3.report import as_json, decimals, versions
from sparc3.tasks import Task, load_task, task_batches

RESULTS = Path(__file__).parent / "results"
STEPS = 5
OURS = ("lrp", "gradient", "integrated-gradients")


def theirs(folder: Path, python: Path, loaded: Loaded, task: Task) -> dict[str, Any]:
    """{"scores": {head: score}, "versions"} of the ranking examples, one by one so that none is padded.

    Raises:
        subprocess.CalledProcessError: it did not run; what it says is shown.
    """
    examples = []
    for one in task.ranking:
        (batch,) = task_batches(loaded.model, loaded.tokenizer, [one])
        answers = {
            side: [token for token in batch[side][0].tolist() if token >= 0] for side in ("right", "wrong")
        }
        prompts = {"clean": batch["input_ids"], "corrupted": batch["corrupted_ids"]}
        examples.append({name: ids[0].tolist() for name, ids in prompts.items()} | {"answers": answers})
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        loaded.model.save_pretrained(work / "model")
        (work / "prompts.json").write_text(json.dumps({"examples": examples, "steps": STEPS}))
        subprocess.run(
            [str(python), str(Path(__file__).with_name("eap_ig_scores.py")), str(work)],
            check=True,
            env=os.environ | {"PYTHONPATH": str(folder / "src")},
        )
        return json.loads((work / "scores.json").read_text())


def measured(folder: Path, python: Path, loaded: Loaded, task: Task) -> dict[str, Any]:
    """{method: cpr, cmd, kept}, and how its scores agree with our integrated gradients."""
    search = Search(loaded.model, loaded.tokenizer, task, "head", "patch")
    found = theirs(folder, python, loaded, task)
    scores = torch.tensor([found["scores"][name] for name in search.names])
    by = {"by": "magnitude"}
    curve = search.measure(scores, by, FRACTIONS)
    smallest = sparsest(
        curve, GOAL * search.full.accuracy, lambda share: search.measure(scores, by, [share])[0]
    )
    cpr, cmd = areas(curve)
    rows = {"EAP-IG": {"cpr": cpr, "cmd": cmd, "kept": smallest.kept}}
    circuits = {method: search.find(method) for method in OURS}
    for method, one in circuits.items():
        rows[method] = {
            "cpr": one.cpr,
            "cmd": one.cmd,
            "kept": one.sparsest.kept,
        }
    ours = circuits["integrated-gradients"].scores
    assert isinstance(ours, torch.Tensor)
    return {
        "heads": search.total,
        "methods": rows,
        "agreement": agreement(scores, ours.float()),
        "versions": found["versions"],
    }


def markdown(data: dict[str, Any]) -> str:
    """One table, seed by seed."""
    rows = data["rows"]
    note = f" ({data['note']})" if data["note"] else ""
    lines = [
        f"### EAP-IG beside us, {data['model']}{note}\n",
        f"Indirect objects, heads under patching, {data['examples']} examples to rank on and as many to judge on, "
        f"seeds {[row['seed'] for row in rows]}, of {rows[0]['heads']} heads: kept with 0.9 of the accuracy / CPR / "
        "CMD.\n",
        "| method | " + " | ".join(f"seed {row['seed']}" for row in rows) + " |\n|---|" + "---|" * len(rows),
    ]
    for method in rows[0]["methods"]:
        each = [row["methods"][method] for row in rows]
        cells = [f"{one['kept']} / {decimals(one['cpr'])} / {decimals(one['cmd'])}" for one in each]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    same = [row["agreement"] for row in rows]
    lines.append(
        "\nIts scores against our integrated gradients, Pearson / Spearman: "
        + ", ".join(f"{one['pearson']:.4f} / {one['spearman']:.4f}" for one in same)
        + "."
    )
    return "\n".join(lines) + "\n"


def main(
    folder: Annotated[Path, typer.Argument(help="A clone of EAP-IG.")],
    python: Annotated[Path, typer.Argument(help="Of an environment with transformer-lens 3 and matplotlib.")],
    model: Annotated[str, typer.Argument(help="smollm2 | tiny-llama | a folder, of a Llama")],
    examples: Annotated[int, typer.Option(help="On each side.")] = 32,
    seeds: int = 3,
) -> None:
    """Measure, and write the rows and the table to bench/results."""
    loaded = load_benchmark_model(model)
    rows = []
    for seed in range(seeds):
        task = load_task("ioi", loaded.tokenizer, examples, seed, model in BUNDLED)
        rows.append({"seed": seed} | measured(folder.expanduser(), python.expanduser(), loaded, task))
    data = {"model": model, "note": loaded.note, "task": "ioi", "examples": examples, "steps": STEPS}
    data |= {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "rows": rows}
    path = RESULTS / f"eap-ig-{Path(model).name}.json"
    path.write_text(json.dumps(json.loads(as_json(data))) + "\n")
    path.with_suffix(".md").write_text(markdown(data))
    Console(width=120).print(markdown(data), markup=False)


if __name__ == "__main__":
    typer.run(main)
