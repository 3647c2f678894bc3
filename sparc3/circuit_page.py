"""The folder of a circuit, and its page: how sparse it is, where it lies, what it answers beside the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import sparc3
from sparc3.circuit import Circuit, Search
from sparc3.circuit_export import write_hook_scores, write_mib
from sparc3.circuit_settings import compared
from sparc3.explain import relevance
from sparc3.export import write_text
from sparc3.faithfulness import GOAL
from sparc3.mask import Mask
from sparc3.models import Loaded
from sparc3.page import coloured_html, full_scale, image, page, paragraph, spell, table
from sparc3.report import decimals, plot_faithfulness, plot_relevance, write_report
from sparc3.tasks import TASK_TARGETS, Task, task_batches
from sparc3.units import Components, components

_SAMPLES, _PREDICTIONS = 5, 3


def sample_rows(
    search: Search,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    keep: torch.Tensor | Mask,
    rule: str,
    target: str,
) -> list[dict[str, Any]]:
    """The first judging examples: token relevance, and what the whole model and the circuit answer.

    Returns:
        dicts of plain JSON values: prompt, corrupted, answer, wrong, group; tokens, a list of {token, relevance,
        special}; whole and circuit, each {logit_difference, predictions: [{token, probability}, ...]}.
    """
    examples = task.judging[:_SAMPLES]
    (batch,) = task_batches(search.model, tokenizer, examples)
    with relevance(search.model, rule, TASK_TARGETS[target], weights=False) as found:
        found.backward(batch)
    whole, pruned = search.logits(batch), search.logits(batch, keep)
    special = set(tokenizer.all_special_ids)
    rows = []
    for number, example in enumerate(examples):
        real = batch["attention_mask"][number].bool()
        ids = batch["input_ids"][number][real].tolist()
        values = found.tokens[number][real].tolist()
        rows.append(
            {
                "prompt": example.prompt,
                "corrupted": example.corrupted,
                "answer": list(example.answer),
                "wrong": list(example.wrong),
                "group": example.group,
                "tokens": [
                    {"token": word, "relevance": value, "special": token in special}
                    for word, value, token in zip(spell(tokenizer, ids), values, ids, strict=True)
                ],
                "whole": _answers(tokenizer, whole[number], example.right_ids, example.wrong_ids),
                "circuit": _answers(tokenizer, pruned[number], example.right_ids, example.wrong_ids),
            }
        )
    return rows


def _answers(
    tokenizer: PreTrainedTokenizerBase, logits: torch.Tensor, right: tuple[int, ...], wrong: tuple[int, ...]
) -> dict[str, Any]:
    chances, tokens = logits.softmax(0).topk(_PREDICTIONS)
    difference = logits[list(right)].logsumexp(0) - logits[list(wrong)].logsumexp(0)
    words = spell(tokenizer, tokens.tolist())
    return {
        "logit_difference": difference.item(),
        "predictions": [
            {"token": word, "probability": chance}
            for word, chance in zip(words, chances.tolist(), strict=True)
        ],
    }


def write_circuit(
    folder: Path,
    loaded: Loaded,
    search: Search,
    first: Circuit,
    keep: torch.Tensor | Mask,
    nodes: Components,
    relevance_of_nodes: torch.Tensor,
    report: dict[str, Any],
) -> None:
    """Write the report, the page, both plots, the scores for other tools and, with zero ablation, the mask."""
    task = report["task"]["name"]
    title = f"{Path(loaded.name).name}, {task}, {search.unit}, {search.ablation} ablation"
    title += f" ({loaded.note})" if loaded.note else ""
    if search.ablation == "zero":
        mask = search.mask(keep)
        mask.settings |= {
            **first.settings,
            "task": task,
            "kept": report["circuit"]["fraction"],
            "model": loaded.name,
            "origin": loaded.origin,
            "note": loaded.note,
        }
        mask.save(folder / "mask.safetensors")
    faithfulness, heat = folder / "faithfulness.png", folder / "relevance.png"
    curves = {row["method"]: row["curve"] for row in report["results"]}
    plot_faithfulness(curves, faithfulness, title, f"{search.unit}s")
    kept, ablated = search.kept_and_ablated(nodes, keep)
    scores = dict(zip(nodes.names, relevance_of_nodes.tolist(), strict=True))
    blocks = search.model.config.num_hidden_layers
    heads = [[scores[name] for name in scores if name.startswith(f"a{block}.")] for block in range(blocks)]
    mlps = [scores[f"m{block}"] for block in range(blocks)] if "m0" in scores else []
    # Of an MLP that is kept in part no frame could say how much of it is.
    framed = set() if search.unit == "neuron" else kept
    plot_relevance(
        heads, mlps, heat, f"Relevance of heads and MLPs, {title.partition(', ')[0]}, {task}", framed
    )
    ranked = [(nodes, relevance_of_nodes)]
    if search.unit == "neuron" and isinstance(first.scores, torch.Tensor):
        ranked.append((components(search.model, "neuron"), first.scores))
    write_hook_scores(folder / "components.safetensors", *ranked)
    write_mib(folder / "mib.json", search.model, nodes, relevance_of_nodes, ablated)
    write_report(folder, report)
    write_text(folder / "circuit.html", circuit_page(report, faithfulness, heat))


def circuit_page(report: dict[str, Any], faithfulness: Path, heat: Path) -> str:
    """The page, from the report and the two plots."""
    name, task = Path(report["model"]["name"]).name, report["task"]
    chosen, unit = report["circuit"], report["unit"]
    share, warning = chosen["kept"] / report["total"], caveat(report)
    note = report["model"]["note"]
    sections = [
        (
            "The circuit",
            [
                paragraph(
                    f"{chosen['kept']} of {report['total']} {unit}s ({share:.2%}), ranked by "
                    f"{chosen['method']}, with the rest ablated ({report['ablation']}): accuracy "
                    f"{chosen['accuracy']:.3f}, faithfulness {decimals(chosen['faithfulness'])}. The whole model: "
                    f"accuracy {report['full']['accuracy']:.3f}. With every {unit} ablated: "
                    f"{report['empty']['accuracy']:.3f}."
                ),
                *([paragraph(f"Note: {warning}.", "note")] if warning else []),
                *([paragraph(f"Note: the model is {note}.", "note")] if note else []),
                table(*_methods(report)),
                image(
                    faithfulness,
                    "Faithfulness (accuracy where undefined) against the share kept, one line a method",
                ),
            ],
        ),
        (
            "Where it lies",
            [
                image(heat, "Relevance of each head and MLP, by block"),
                table([f"{unit}s of block", "kept", "of", "share"], _by_block(report)),
                *_named(chosen.get("components", [])),
            ],
        ),
        ("Examples it was judged on", _samples(report)),
        ("How it was made", [table(["setting", "value"], _settings(report))]),
    ]
    return page(f"The circuit of {task['name']} in {name}", sections)


def caveat(report: dict[str, Any]) -> str:
    """What to say where accuracy or faithfulness cannot tell a circuit from nothing; empty where both can."""
    full, empty, unit = report["full"], report["empty"], report["unit"]
    if empty["accuracy"] >= GOAL * full["accuracy"]:
        return (
            f"with every {unit} ablated the accuracy is still {empty['accuracy']:.3f} of {full['accuracy']:.3f}, so "
            "that it does not show how sparse a circuit may be; go by the faithfulness"
        )
    if not full["logit_difference"] > empty["logit_difference"]:
        return (
            f"with every {unit} ablated the mean logit difference, {empty['logit_difference']:.3g}, is not below the "
            f"whole model's, {full['logit_difference']:.3g}, so that faithfulness, CPR and CMD are undefined; go by "
            f"the accuracy, which falls from {full['accuracy']:.3f} to {empty['accuracy']:.3f}"
        )
    return ""


def _methods(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in sorted(report["results"], key=lambda row: row["sparsest"]["kept"]):
        point = row["sparsest"]
        numbers = [decimals(point["accuracy"]), decimals(row["cpr"]), decimals(row["cmd"])]
        rows.append([row["method"], str(point["kept"]), f"{point['kept'] / report['total']:.2%}", *numbers])
    return ["method", "kept at 0.9 of the accuracy", "share", "accuracy", "CPR", "CMD"], rows


def _by_block(report: dict[str, Any]) -> list[list[str]]:
    return [
        [str(row["block"]), str(row["kept"]), str(row["of"]), f"{row['kept'] / row['of']:.1%}"]
        for row in reversed(report["circuit"]["blocks"])
    ]


def _named(names: list[str]) -> list[str]:
    return [paragraph("Kept: " + ", ".join(names))] if 0 < len(names) <= 200 else []


def _samples(report: dict[str, Any]) -> list[str]:
    parts = [
        paragraph(
            "Red tokens speak for the right answer, blue ones against it (rule "
            f"{report['task']['token_rule']}). Point at a token for its number.",
            "note",
        )
    ]
    for row in report["task"]["samples"]:
        words, values, special = (
            [one[key] for one in row["tokens"]] for key in ("token", "relevance", "special")
        )
        parts.append(coloured_html(words, values, full_scale(values, special)))
        answers = [
            [
                who,
                f"{row[key]['logit_difference']:+.2f}",
                *(f"{one['token']} {one['probability']:.0%}" for one in row[key]["predictions"]),
            ]
            for who, key in (("whole model", "whole"), ("circuit alone", "circuit"))
        ]
        columns = [
            f"{_some(row['answer'])} or {_some(row['wrong'])}?",
            "logit difference",
            "1st",
            "2nd",
            "3rd",
        ]
        parts.append(table(columns, answers))
    return parts


def _some(answers: list[str]) -> str:
    return answers[0].strip() + (" ..." if len(answers) > 1 else "")


def _settings(report: dict[str, Any]) -> list[list[str]]:
    first = next(row for row in report["results"] if row["method"] == report["circuit"]["method"])
    task = report["task"]
    return [
        ["model", report["model"]["name"]],
        ["task", f"{task['name']}, seed {task['seed']}"],
        ["ranked on", f"{task['ranking']['examples']} examples"],
        ["judged on", f"{task['judging']['examples']} others"],
        *[
            [key, compared(first["settings"]) if key == "compared" else str(value)]
            for key, value in first["settings"].items()
        ],
        ["sparc3", sparc3.__version__],
    ]
