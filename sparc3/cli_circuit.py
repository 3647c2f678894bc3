"""sparc3 circuit: the few weights, neurons, heads or layers that do a task, and how faithfully."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

import sparc3
from sparc3 import console
from sparc3.console import AsJson, Device, Dtype, Force, Model
from sparc3.errors import InputError

if TYPE_CHECKING:
    from sparc3.circuit import Circuit, Search
    from sparc3.models import Loaded
    from sparc3.tasks import Task


def _schema(wanted: bool) -> None:
    if wanted:
        from sparc3.tasks import SCHEMA

        console.show_json(SCHEMA)
        raise typer.Exit


def circuit(
    out: Annotated[
        Path, typer.Option(help="Folder for report.json, the plot and the mask; it must not exist.")
    ],
    model: Model = "tiny-llama",
    task: Annotated[
        str,
        typer.Option(
            help="ioi | greater-than | ioi:bundled (in the words of the bundled models, for which ioi is this) | "
            "FILE.jsonl (see --schema)."
        ),
    ] = "ioi",
    unit: Annotated[
        str,
        typer.Option(
            help="What is kept: weight | neuron | head | kv-head | mlp | node (head or MLP) | layer."
        ),
    ] = "head",
    method: Annotated[
        str,
        typer.Option(
            help="lrp | gradient | integrated-gradients | wanda | magnitude | random, and for all units but weight "
            "activation | exact (ablates one by one; not for neurons)."
        ),
    ] = "lrp",
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,C", help="Methods to measure beside --method; table and plot have them all."
        ),
    ] = None,
    ablation: Annotated[
        str,
        typer.Option(
            help="What replaces the rest: zero, mean (over the ranking prompts), or patch (its values on the "
            "corrupted prompt)."
        ),
    ] = "zero",
    by: Annotated[
        str, typer.Option(help="Rank by magnitude, or by value: what works against the task goes first.")
    ] = "magnitude",
    rule: Annotated[
        str | None,
        typer.Option(
            help="LRP rule: attnlrp | cp | gradient, or choices such as gradient,norm=constant; with + between "
            "several, the mean of their scores. Default: what was best for the unit; for weights and for neurons "
            "ablated by zero, the best of some on the ranking examples."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="What lrp and the gradients explain: difference (of right and wrong answers' logits) | logit | "
            "logprob (of the right answers)."
        ),
    ] = "difference",
    reduce: Annotated[
        str | None,
        typer.Option(
            help="How lrp and the gradients reduce samples: signed | abs | square (weight: token-square too, others: "
            "token-abs). Default: square for weights, abs for neurons ablated by zero, else signed."
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share to keep in the circuit that is saved. Default: the smallest that still has 0.9 of the "
            "model's accuracy."
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Examples to rank on, and other ones to judge on, at most.")
    ] = 128,
    seed: Annotated[int, typer.Option(help="Which examples, and the order of --method random.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    schema: Annotated[
        bool,
        typer.Option("--schema", is_eager=True, callback=_schema, help="Print the format of a task file."),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find the circuit of a task: rank on some examples, ablate the rest, and judge on others.

    The circuit saved is that of --method, whatever else is compared. circuit.html shows all of it; LRP of every head
    and MLP is saved under TransformerLens' names (components.safetensors) and for MIB (mib.json). With zero ablation
    the folder has the circuit's weights too, as mask.safetensors for sparc3 mask.
    """
    from sparc3.circuit import Search
    from sparc3.circuit_page import sample_rows, write_circuit
    from sparc3.circuit_settings import check_circuit_settings, default_settings, parse_rules
    from sparc3.export import check_new, new_folder
    from sparc3.models import BUNDLED
    from sparc3.tasks import load_task

    console.check_apart(model, out)
    check_new(out, force)
    methods = list(dict.fromkeys([method, *console.words(compare)]))
    defaults = default_settings(unit, ablation)
    # Defaults were chosen for components; tokens are coloured as sparc3 explain does it.
    token_rule = rule if rule and len(parse_rules(rule)) == 1 else "attnlrp"
    reduce = reduce or defaults["reduce"]
    for name in methods:
        check_circuit_settings(unit, name, ablation, by, rule or defaults["rule"], reduce, target)
    if keep is not None and not 0 <= keep <= 1:
        raise InputError(f"--keep {keep} is not a share: it must be in [0, 1]")

    console.begin()
    with console.progress(f"loading {model}") as update:
        loaded = sparc3.load(model, dtype=dtype, device=device)
        found_task = load_task(task, loaded.tokenizer, examples, seed, model in BUNDLED)
        update(description="the whole model", total=1 + 3 * len(methods))
        search = Search(loaded.model, loaded.tokenizer, found_task, unit, ablation)
        update(advance=1)
        circuits = [
            search.find(
                name,
                by=by,
                rule=rule,
                target=target,
                reduce=reduce,
                seed=seed,
                tell=lambda words: update(description=words, advance=1),
            )
            for name in methods
        ]
        first = circuits[0]
        share = first.sparsest.fraction if keep is None else keep
        chosen = search.kept(first.scores, first.settings, share)
        update(description="where it lies")
        nodes, relevance = search.node_relevance(target)
        report = _report(loaded, found_task, search, circuits, share, seed)
        report["nodes"] = dict(zip(nodes.names, relevance.tolist(), strict=True))
        samples = sample_rows(search, loaded.tokenizer, found_task, chosen, token_rule, target)
        report["task"] |= {"token_rule": token_rule, "samples": samples}
        update(description=f"writing {out}")
        with new_folder(out, force) as folder:
            write_circuit(folder, loaded, search, first, chosen, nodes, relevance, report)
    if as_json:
        console.show_json({"out": str(out), **report})
        return
    _show(loaded, report, out)


def _report(
    loaded: Loaded, task: Task, search: Search, circuits: list[Circuit], share: float, seed: int
) -> dict[str, Any]:
    """All that is saved and printed, as plain JSON values."""
    from dataclasses import asdict

    import torch

    from sparc3.agreement import agreement
    from sparc3.report import versions

    results = [one.described() for one in circuits]
    exact = next((one.scores for one in circuits if one.settings["method"] == "exact"), None)
    for result, one in zip(results, circuits, strict=True):
        if not isinstance(one.scores, torch.Tensor) or search.unit == "neuron":
            continue
        result["scores"] = dict(zip(search.names, one.scores.tolist(), strict=True))
        if isinstance(exact, torch.Tensor) and exact is not one.scores:
            result["agreement"] = agreement(one.scores, exact)
    first = circuits[0]
    point = first.sparsest
    if share != point.fraction:
        (point,) = search.measure(first.scores, first.settings, [share])
    chosen: dict[str, Any] = {"method": first.settings["method"], **asdict(point)}
    kept = search.kept(first.scores, first.settings, share)
    chosen["blocks"] = search.by_block(kept)
    if isinstance(kept, torch.Tensor):
        chosen["components"] = [name for name, on in zip(search.names, kept.tolist(), strict=True) if on]
    return {
        "model": {"name": loaded.name, "origin": loaded.origin, "note": loaded.note},
        "task": {
            "name": task.name,
            "seed": seed,
            "ranking": {"examples": len(task.ranking), "groups": sorted({one.group for one in task.ranking})},
            "judging": {"examples": len(task.judging), "groups": sorted({one.group for one in task.judging})},
        },
        "unit": search.unit,
        "ablation": search.ablation,
        "total": search.total,
        "full": asdict(search.full),
        "empty": asdict(search.empty),
        "circuit": chosen,
        "results": results,
        **versions(),
    }


def _show(loaded: Loaded, report: dict[str, Any], out: Path) -> None:
    from sparc3.circuit_page import caveat
    from sparc3.report import decimals

    warning = caveat(report)
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("method")
    # Beside exact ablation alone.
    correlations = {"Pearson": "pearson", "Spearman": "spearman"}
    if not any("agreement" in row for row in report["results"]):
        correlations = {}
    for column in ("kept at 0.9", "share", "accuracy", "CPR", "CMD", *correlations, "seconds"):
        table.add_column(column, justify="right")
    for row in sorted(report["results"], key=lambda row: row["sparsest"]["kept"]):
        point, agreement = row["sparsest"], row.get("agreement")
        table.add_row(
            row["method"],
            str(point["kept"]),
            f"{point['kept'] / report['total']:.2%}",
            f"{point['accuracy']:.3f}",
            decimals(row["cpr"]),
            decimals(row["cmd"]),
            *(f"{agreement[name]:.3f}" if agreement else "" for name in correlations.values()),
            f"{row['seconds']:.1f}",
        )
    full, empty, chosen, task = (report[name] for name in ("full", "empty", "circuit", "task"))
    console.show(
        table,
        f"task {task['name']}: ranked on {task['ranking']['examples']} examples, judged on "
        f"{task['judging']['examples']} others",
        f"whole model: accuracy {full['accuracy']:.3f}, logit difference {full['logit_difference']:.3g}; "
        f"every {report['unit']} ablated ({report['ablation']}): {empty['accuracy']:.3f}, "
        f"{empty['logit_difference']:.3g}",
        f"circuit of {chosen['method']}: {chosen['kept']} of {report['total']} {report['unit']}s, accuracy "
        f"{chosen['accuracy']:.3f}, faithfulness {decimals(chosen['faithfulness'])}",
        *_rules(report["results"]),
        *_named(chosen.get("components", [])),
        *([f"Note: {warning}"] if warning else []),
        *console.notes(loaded),
        console.saved(out),
    )


def _rules(results: list[dict[str, Any]]) -> list[str]:
    """What rules needed where they were compared."""
    from sparc3.circuit_settings import compared

    return [
        f"smallest circuit of the ranking examples by rule: {compared(row['settings'])}"
        for row in results
        if "compared" in row["settings"]
    ]


def _named(names: list[str]) -> list[str]:
    """The components' names where a few lines hold them."""
    return [", ".join(names)] if 0 < len(names) <= 40 else []
