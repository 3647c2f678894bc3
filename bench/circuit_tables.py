"""The rows of bench/circuits.py as Markdown: means over seeds with Student's t-intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparc3.circuit_settings import AND
from sparc3.evaluate import mean_interval
from sparc3.report import decimals, plot_faithfulness


def markdown(data: dict[str, Any]) -> str:
    """A heading, what was measured, and the tables of the study."""
    note = f" ({data['note']})" if data["note"] else ""
    lines = [f"### {data['study']}, {data['model']}{note}\n"]
    tables = {"agreement": _agreement, "rules": _rules, "weights": _weights, "tables": _circuits}[
        data["study"]
    ]
    return "\n".join([*lines, *tables(data)]) + "\n"


def _groups(rows: Iterable[dict[str, Any]], *names: str) -> dict[tuple, list[dict[str, Any]]]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return found


def _agreement(data: dict[str, Any]) -> list[str]:
    rows = [row for row in data["rows"] if row["method"] != "exact"]
    lines = [
        "Scores of single heads and MLPs against exact ablation: Pearson / Spearman / Pearson without the two "
        "largest, mean over seeds. Rules are chosen on ranking examples.\n"
    ]
    for (side, ablation, examples), part in _groups(rows, "side", "ablation", "examples").items():
        seeds = sorted({row["seed"] for row in part})
        lines += [
            f"{side} examples, {ablation} ablation, {examples} examples a seed, seeds {seeds}:\n",
            "| score | heads | MLPs | least |\n|---|---|---|---|",
        ]
        table = []
        for (method, rule), same in _groups(part, "method", "rule").items():
            means = [
                [_mean(row[kind][name] for row in same) for name in _NAMES] for kind in ("heads", "mlps")
            ]
            cells = [" / ".join(map(decimals, each)) for each in means]
            label = f"lrp ({short_rule(rule)})" if rule else method
            table.append((min(map(min, means)), f"| {label} | {cells[0]} | {cells[1]} |"))
        lines += [f"{line} {decimals(least)} |" for least, line in sorted(table, key=lambda pair: -pair[0])]
        lines.append("")
    return lines


_NAMES = ("pearson", "spearman", "pearson_without_two")


def _rules(data: dict[str, Any]) -> list[str]:
    lines = []
    for (ranked, examples), part in _groups(data["rows"], "ranked", "examples").items():
        units, seeds = (list(dict.fromkeys(row[name] for row in part)) for name in ("unit", "seed"))
        lines += [
            f"Development examples ({ranked} to rank on and {examples} to judge on, of the ranking side's "
            f"templates), zero ablation, seeds {seeds}: share that keeps 0.9 of the accuracy (geometric mean), "
            "and CPR (of the seeds that define it).\n",
            "| rule | target | reduction | " + " | ".join(units) + " |\n|---|---|---|" + "---|" * len(units),
        ]
        table = []
        for (rule, target, reduce), same in _groups(part, "rule", "target", "reduce").items():
            of_unit = [[row for row in same if row["unit"] == unit] for unit in units]
            cells = [
                f"{_share(rows):.2%}, {decimals(_mean(row['cpr'] for row in _defined(rows)))}" if rows else ""
                for rows in of_unit
            ]
            order = sum(math.log(_share(rows)) for rows in of_unit if rows)
            table.append((order, f"| {short_rule(rule)} | {target} | {reduce} | " + " | ".join(cells) + " |"))
        lines += [line for _, line in sorted(table, key=lambda pair: pair[0])]
        lines.append("")
    return lines


_WEIGHTS = ("method", "rule", "reduce", "within", "ranked")


def _weights(data: dict[str, Any]) -> list[str]:
    lines = [
        "Development examples, zero ablation: accuracy / mean logit difference of circuits "
        "of weights, each over the whole model's, mean over seeds.\n"
    ]
    for (examples,), part in _groups(data["rows"], "examples").items():
        seeds, shares = sorted({row["seed"] for row in part}), part[0]["shares"]
        lines += [
            f"{examples} examples to judge on, seeds {seeds}; share of the weights kept:\n",
            "| method | rule | reduction | ranked within | on | "
            + " | ".join(f"{share:.0%}" for share in shares)
            + " |",
            "|---|---|---|---|---|" + "---|" * len(shares),
        ]
        for (method, rule, *names), same in _groups(part, *_WEIGHTS).items():
            cells = [
                " / ".join(
                    f"{_mean(row[name][index] for row in same):.2f}" for name in ("accuracy", "difference")
                )
                for index in range(len(shares))
            ]
            lines.append(
                "| " + " | ".join([method, rule and short_rule(rule), *map(str, names), *cells]) + " |"
            )
        lines.append("")
    return lines


# A table has the rows of one of these.
_TABLE = ("unit", "ablation", "ranked", "examples")


def _circuits(data: dict[str, Any]) -> list[str]:
    lines = []
    for (unit, ablation, ranked, examples), part in _groups(data["rows"], *_TABLE).items():
        seeds = sorted({row["seed"] for row in part})
        lines += [
            f"{unit}s, {ablation} ablation, {ranked} ranking and {examples} judging examples a seed, seeds "
            f"{seeds}. Share: the smallest circuit with 0.9 of the accuracy, geometric mean over seeds; against: "
            "LRP's share (by its default) over this one's, with the 95 % interval over seeds.\n",
            "| method | share | LRP's share over it | CPR | CMD |\n|---|---|---|---|---|",
        ]
        of = _groups(part, "method", "rule")
        for (method, rule), same in sorted(of.items(), key=lambda item: _share(item[1])):
            cpr, cmd = (_mean(row[name] for row in _defined(same)) for name in ("cpr", "cmd"))
            ours = of.get(("lrp", ""), [])
            ratio = "" if same is ours else _ratio(ours, same)
            name = f"{method}: {short_rule(rule)}" if rule else method
            lines.append(f"| {name} | {_share(same):.2%} | {ratio} | {decimals(cpr)} | {decimals(cmd)} |")
        undefined = sorted(set(seeds) - {row["seed"] for row in _defined(part)})
        if undefined:
            lines.append(
                f"\nCPR and CMD are of the other seeds than {undefined}: there the mean logit difference with every "
                f"{unit} ablated is not below the whole model's, and faithfulness is undefined."
            )
        lines.append("")
    return lines


def _defined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which faithfulness is defined: it depends on the seed, not on the method."""
    return [row for row in rows if not math.isnan(_mean([row["cpr"]]))]


def plots(data: dict[str, Any], path: Path) -> None:
    """Faithfulness against the share kept, mean over seeds: a picture beside the file for each unit and ablation.

    Of several tables of one unit and ablation the one with the most rows is drawn, seeds and methods together.
    """
    largest: dict[tuple, list[dict[str, Any]]] = {}
    for (unit, ablation, *_), part in _groups(data["rows"], *_TABLE).items():
        largest[unit, ablation] = max(largest.get((unit, ablation), part), part, key=len)
    for (unit, ablation), rows in largest.items():
        part = _defined(rows) or rows
        curves: dict[str, list[dict[str, Any]]] = {}
        for (method, rule), same in _groups(part, "method", "rule").items():
            points = zip(*(row["curve"] for row in same), strict=True)
            curves[f"{method}: {short_rule(rule)}" if rule else method] = [
                {
                    name: _mean(point[name] for point in each)
                    for name in ("fraction", "faithfulness", "accuracy")
                }
                for each in points
            ]
        seeds, ranked, examples = len({row["seed"] for row in part}), part[0]["ranked"], part[0]["examples"]
        drawn = f"{seeds} seed{'s' if seeds > 1 else ''}, ranked on {ranked}, judged on {examples}"
        title = f"{data['model']}, indirect objects, {ablation} ablation\n{drawn}"
        plot_faithfulness(curves, path.with_name(f"{path.stem}-{unit}-{ablation}.png"), title, f"{unit}s")


def _ratio(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> str:
    by_seed = {row["seed"]: row for row in ours}
    logs = [_log_share(by_seed[row["seed"]]) - _log_share(row) for row in theirs if row["seed"] in by_seed]
    if not logs:
        return ""
    if len(logs) < 2:
        return f"{math.exp(logs[0]):.2f}"
    mean, low, high = (math.exp(value) for value in mean_interval(logs))
    return f"{mean:.2f} ({low:.2f}, {high:.2f})"


def _log_share(row: dict[str, Any]) -> float:
    # The share that is kept, not the one that was asked for: of few heads these differ. At least one is counted.
    return math.log(max(row["sparsest"]["kept"], 1) / row["curve"][-1]["kept"])


def _share(rows: Sequence[dict[str, Any]]) -> float:
    return math.exp(_mean(map(_log_share, rows)))


def _mean(values: Iterable[float | None]) -> float:
    """NaN, which JSON has as null, where a value is, or there is none."""
    known = [math.nan if value is None else value for value in values]
    return sum(known) / len(known) if known else math.nan


def short_rule(rule: str | None) -> str:
    """A rule, or several that are averaged, by the choices that are not the gradient's."""
    each = [one.strip().split(",") for one in rule.split(AND)] if rule else []
    chosen = ([word for word in words if not word.endswith("=gradient")] for words in each)
    return " + ".join(", ".join(words) or "gradient" for words in chosen)
