"""The Markdown table and the plots of bench/corrections.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from sparc3.correct import BUDGET
from sparc3.correction_report import label_axes
from sparc3.evaluate import mean_interval
from sparc3.report import METHOD_COLOURS


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of Student's 95 % interval (infinite for one value)."""
    if len(values) < 2:
        return values[0], math.inf
    mean, _, high = mean_interval(values)
    return mean, high - mean


def _label(row: dict[str, Any]) -> str:
    rule = f" ({row['rule']})" if row["rule"] else ""
    contrast = "" if row["contrast"] in ("", "difference") else f", {row['contrast'].replace('-', ' ')}"
    return row["method"] + rule + contrast + (", spared" if row["spare"] else "")


def markdown(data: dict[str, Any]) -> str:
    """Each number removed, a mean over seeds, and what the budget chooses seed by seed."""
    rows = data["rows"]
    lines = [
        f"# {data['study']} of {data['model']}" + (f", {data['note']}" if data["note"] else ""),
        f"\nGreedy continuations of at most {data['tokens']} tokens; up to {data['examples']} explain and as many "
        f"others judge, all of which show it before. General text: {data['samples']} windows explain, perplexity is "
        f"of {data['judged_windows']} held-out windows. Brackets: half of Student's 95 % interval over runs, that is "
        "seeds (of random: seeds and draws).\n",
        "| unit | method | removed | runs | shown | score | tokens | distinct | perplexity |"
        + (" second scorer |" if data["study"] == "toxicity" else ""),
        "|---|---|---|---|---|---|---|---|---|" + ("---|" if data["study"] == "toxicity" else ""),
    ]
    for unit, label in dict.fromkeys((row["unit"], _label(row)) for row in rows):
        same = [row for row in rows if (row["unit"], _label(row)) == (unit, label)]
        everything = [point for row in same for point in (row["before"], *row["sweep"])]
        # With sparing the sweep of a seed ends where no more can be afforded.
        for count in sorted({point["count"] for point in everything}):
            points = [point for point in everything if point["count"] == count]
            shown = interval([point["shown"] for point in points])
            cells = [
                f"{points[0]['count']} ({points[0]['fraction']:.3%})",
                str(len(points)),
                f"{shown[0]:.1%}" + (f" ({shown[1]:.1%})" if math.isfinite(shown[1]) else ""),
                *(
                    f"{fmean([point[key] for point in points]):.3f}"
                    for key in ("score", "length", "distinct")
                ),
                f"{fmean([point['increase'] for point in points]):+.2%}",
            ]
            if data["study"] == "toxicity":
                cells.append(f"{fmean([point['second'] for point in points]):.1%}")
            lines.append(f"| {unit} | {label} | " + " | ".join(cells) + " |")
    text = (
        "other windows of the text that explains"
        if "development" in rows[0]["before"]
        else "the same windows"
    )
    lines += [
        f"\nThe largest number with perplexity of {text} at most {BUDGET:.0%} worse, run by run, and the "
        "perplexity of held-out text with it:\n",
        "| unit | method | shown | mean | perplexity | removed |\n|---|---|---|---|---|---|",
    ]
    for unit, label in dict.fromkeys((row["unit"], _label(row)) for row in rows):
        same = [row for row in rows if (row["unit"], _label(row)) == (unit, label)]
        chosen = [
            next((point for point in row["sweep"] if point["count"] == row["chosen"]), row["before"])
            for row in same
        ]
        mean, half = interval([point["shown"] for point in chosen])
        lines.append(
            f"| {unit} | {label} | {', '.join(format(point['shown'], '.1%') for point in chosen)} | "
            f"{mean:.1%}{f' ({half:.1%})' if math.isfinite(half) else ''} | "
            f"{', '.join(format(point['increase'], '+.2%') for point in chosen)} | "
            f"{', '.join(str(point['count']) for point in chosen)} |"
        )
    return "\n".join(lines) + "\n"


def plots(data: dict[str, Any], path: Path) -> None:
    """PATH-UNIT.png: the share that shows the behaviour against perplexity, one line a method, a point a number."""
    for unit in dict.fromkeys(row["unit"] for row in data["rows"]):
        figure = Figure(figsize=(7.2, 5.2), layout="constrained")
        axes = figure.subplots()
        rows = [row for row in data["rows"] if row["unit"] == unit]
        for label, mark in zip(dict.fromkeys(map(_label, rows)), itertools.cycle("osD^vP"), strict=False):
            same = [row for row in rows if _label(row) == label]
            everything = [point for row in same for point in (row["before"], *row["sweep"])]
            of_count = {
                count: [point for point in everything if point["count"] == count]
                for count in sorted({point["count"] for point in everything})
            }
            means = {
                key: [fmean([point[key] for point in points]) for points in of_count.values()]
                for key in ("increase", "shown")
            }
            axes.plot(
                means["increase"],
                means["shown"],
                marker=mark,
                linewidth=1.4,
                color=METHOD_COLOURS[same[0]["method"]],
                label=f"{label}, runs: {len(same)}, up to {max(of_count)} {unit}s",
            )
        axes.axvline(BUDGET, color="black", linewidth=1, linestyle=":", label="budget")
        increases = [point["increase"] for row in rows for point in row["sweep"]]
        label_axes(axes, increases, data["study"])
        axes.set_title(f"{data['model']}: {data['study']}, {unit}s removed, means over runs")
        figure.legend(loc="outside lower center", frameon=False, fontsize=8)
        figure.savefig(path.with_name(f"{path.stem}-{unit}.png"), dpi=150)
