"""The tables and plots of sparc3.reproduce: our figures beside the paper's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path
from typing import Any

from sparc3.report import METHOD_COLOURS, draw_line

Results = list[dict[str, Any]]


def markdown(experiment: str, config: dict[str, Any], results: Results) -> str:
    """The table of an experiment, with the choices that the paper leaves open."""
    body = {
        "table1": _table1,
        "samples": _samples,
        "concentration": _concentration,
        "ioi": _ioi,
        "toxicity": _correction,
        "repetition": _correction,
    }[experiment]
    told = [
        "calibration",
        "judged",
        "length",
        "samples",
        "seeds",
        "dtype",
        "pattern",
        "sparsity",
        "task",
        "prompts",
        "scorer",
        "threshold",
        "tokens",
        "examples",
    ]
    settings = ", ".join(f"{name} {config[name]}" for name in told if name in config)
    lines = [f"# {config['title']}\n", f"{config['source']}. Ours: {settings}.\n", *body(config, results)]
    lines += ["\nWhat the paper leaves open, and what is done here:\n"]
    lines += [f"- {' '.join(choice.split())}" for choice in config["open"]]
    return "\n".join(lines) + "\n"


def _short(model: str) -> str:
    return Path(model).name


def _methods(results: Results) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in results))


def _spread(values: Iterable[float | None], digits: int = 2) -> str:
    """Mean and, of several, the standard deviation; "-" where one is undefined, which report.json has as null."""
    found = _numbers(values)
    if not found:
        return ""
    if not all(map(math.isfinite, found)):
        return "-"
    mean = f"{statistics.mean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _mean(values: Iterable[float | None]) -> float:
    """NaN, which a plot leaves out, where one is undefined."""
    return statistics.mean(_numbers(values))


def _table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _of(results: Results, **wanted: Any) -> Results:
    return [row for row in results if all(row[name] == value for name, value in wanted.items())]


def _accuracy(row: dict[str, Any]) -> float:
    return 100 * statistics.mean(row["accuracy"].values())


def _table1(config: dict[str, Any], results: Results) -> list[str]:
    rows = []
    for model in config["models"]:
        for method in _methods(results):
            ours = _of(results, model=model, method=method)
            if not ours:
                continue
            perplexity, accuracy = config["paper"].get(_short(model), {}).get(method, ("", ""))
            scored = [_accuracy(row) for row in ours if row["accuracy"]]
            cells = [
                _spread(row["perplexity"] for row in ours),
                str(perplexity),
                _spread(scored),
                str(accuracy),
            ]
            rows.append([_short(model), method, *cells])
    header = ["model", "method", "perplexity", "paper", "accuracy %", "paper"]
    return _table(header, rows)


def _samples(config: dict[str, Any], results: Results) -> list[str]:
    rows = []
    for model in config["models"]:
        for method in _methods(results):
            for count in config["counts"]:
                ours = _of(results, model=model, method=method, count=count)
                paper = config["paper"].get(_short(model), {}).get(method, {}).get(count, "")
                if ours:
                    found = _spread(row["perplexity"] for row in ours)
                    rows.append([_short(model), method, str(count), found, str(paper)])
    return _table(["model", "method", "samples", "perplexity", "paper"], rows)


def _concentration(config: dict[str, Any], results: Results) -> list[str]:
    rows = []
    for row in results:
        for kind, shares in row["kinds"].items():
            cells = [f"{100 * share:.2f} %" for share in shares.values()]
            rows.append([_short(row["model"]), row["method"], str(row["seed"]), kind, *cells])
    header = ["model", "method", "seed", "kind", "holds 50 %", "holds 90 %", "holds 99 %"]
    return _table(header, rows)


def _ioi(config: dict[str, Any], results: Results) -> list[str]:
    rows = []
    for model, unit in product(config["models"], config["units"]):
        for method in _methods(_of(results, model=model, unit=unit)):
            ours = _of(results, model=model, unit=unit, method=method)
            kept = _spread(100 * row["sparsest"]["fraction"] for row in ours)
            cells = [f"{kept} %", _spread(row["cpr"] for row in ours), str(len(ours))]
            rows.append([_short(model), unit, method, *cells])
    return _table(["model", "unit", "method", "kept for 90 % of the accuracy", "CPR", "seeds"], rows)


def _correction(config: dict[str, Any], results: Results) -> list[str]:
    rows = []
    for model, unit in dict.fromkeys((row["model"], row["unit"]) for row in results):
        same = _of(results, model=model, unit=unit)
        paper = config["paper"].get(unit, {})
        # The whole model's figures are those of the same prompts under every method.
        whole = {row["seed"]: row["before"] for row in same}
        rows.append([_short(model), unit, "whole model", *_behaved(list(whole.values())), ""])
        for method in _methods(same):
            for count in config["counts"][unit]:
                points = _removed(_of(same, method=method), count)
                beside = paper.get(count, "") if method == "lrp (paper)" else ""
                rows.append([_short(model), unit, method, *_behaved(points), beside])
    header = ["model", "unit", "method", "removed", "shown", "score", "tokens", "distinct", "perplexity"]
    return _table([*header, "the paper finds"], rows)


def _removed(results: Results, count: int) -> list[dict[str, Any]]:
    """The measurement of a number removed, of each seed."""
    return [point for row in results for point in row["sweep"] if point["count"] == count]


def _behaved(points: list[dict[str, Any]]) -> list[str]:
    first = points[0]
    removed = f"{first['count']} ({first['fraction']:.2%})" if first["count"] else "0"
    shown = _spread((100 * point["shown"] for point in points), 1) + " %"
    names = ("score", "length", "distinct", "perplexity")
    return [removed, shown, *(_spread(point[name] for point in points) for name in names)]


# Plots -------------------------------------------------------------------------------------------------------------


def plot(experiment: str, config: dict[str, Any], results: Results, path: Path) -> None:
    """Our figures as lines or bars, the paper's as crosses of the same colour."""
    from matplotlib.figure import Figure

    draw, across = {
        "table1": (_draw_table1, []),
        "samples": (_draw_samples, []),
        "concentration": (_draw_kinds, _methods(results)),
        "ioi": (_draw_ioi, list(config.get("units", []))),
        "toxicity": (_draw_correction, _correction_panels(config)),
        "repetition": (_draw_correction, _correction_panels(config)),
    }[experiment]
    models = list(config["models"])
    # One row of panels for each model, or one row of models where a model takes one panel.
    panels = (
        [[(model, part) for part in across] for model in models] if across else [[(m, "") for m in models]]
    )
    size = (1.2 + 4.2 * len(panels[0]), 4.2 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), len(panels[0]), squeeze=False)
    for place, (model, part) in zip(axes.flat, chain(*panels), strict=True):
        draw(place, config, _of(results, model=model), model, part)
        place.set_title(f"{_short(model)} {part}")
        place.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def _colour(method: str) -> str:
    return METHOD_COLOURS.get(method, "#333333")


def _draw_table1(axes: Any, config: dict[str, Any], results: Results, model: str, part: str) -> None:
    methods = _methods(results)
    paper = config["paper"].get(_short(model), {})
    for place, method in enumerate(methods):
        values = [row["perplexity"] for row in _of(results, method=method)]
        axes.bar(place, _mean(values), color=_colour(method), width=0.6)
        if method in paper:
            axes.plot(
                place, paper[method][0], "x", color="black", label="the paper's" if place == 0 else None
            )
    axes.set_xticks(range(len(methods)), methods, rotation=20)
    axes.set_yscale("log")
    axes.set_ylabel("perplexity (log scale)")
    if paper:
        axes.legend(frameon=False)


def _draw_samples(axes: Any, config: dict[str, Any], results: Results, model: str, part: str) -> None:
    paper = config["paper"].get(_short(model), {})
    for method in _methods(results):
        points = []
        for count in config["counts"]:
            ours = _of(results, method=method, count=count)
            if ours:
                points.append((count, _mean(row["perplexity"] for row in ours)))
        if points:
            draw_line(axes, method, points)
        for count, value in paper.get(method, {}).items():
            axes.plot(count, value, "x", color=_colour(method), markersize=9)
    axes.set_xscale("log")
    axes.set_xticks(config["counts"], [str(count) for count in config["counts"]])
    axes.minorticks_off()
    axes.set_xlabel("reference samples (log scale)")
    axes.set_yscale("log")
    axes.set_ylabel("perplexity (log scale)")
    axes.legend(frameon=False)


def _draw_kinds(axes: Any, config: dict[str, Any], results: Results, model: str, method: str) -> None:
    for row in _of(results, method=method)[:1]:
        for shade, share in zip(
            ("#d1495b", "#edae49", "#b8b8b8"), reversed(["0.5", "0.9", "0.99"]), strict=True
        ):
            values = [100 * shares[share] for shares in row["kinds"].values()]
            axes.barh(list(row["kinds"]), values, color=shade, label=f"hold {float(share):.0%}")
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the weights, largest first")
    # Bars may reach anywhere, so it stands below them.
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _draw_ioi(axes: Any, config: dict[str, Any], results: Results, model: str, unit: str) -> None:
    from matplotlib.ticker import PercentFormatter

    for method in _methods(_of(results, unit=unit)):
        ours = _of(results, unit=unit, method=method)
        shares = [point["fraction"] for point in ours[0]["curve"]]
        means = [
            statistics.mean(row["curve"][place]["accuracy"] for row in ours) for place in range(len(shares))
        ]
        draw_line(axes, method, list(zip(shares, means, strict=True)))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")  # 0.1% beside 100%
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(f"{unit}s kept (log scale)")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)


def _correction_panels(config: dict[str, Any]) -> list[str]:
    """A panel for what is shown and one for perplexity, of each unit."""
    return [f"{unit} {what}" for unit in config.get("counts", {}) for what in ("shown", "perplexity")]


def _draw_correction(axes: Any, config: dict[str, Any], results: Results, model: str, part: str) -> None:
    from matplotlib.ticker import PercentFormatter

    unit, what = part.split()
    for method in _methods(_of(results, unit=unit)):
        ours = _of(results, unit=unit, method=method)
        means = [_mean(row["before"][what] for row in ours)]
        means += [_mean(point[what] for point in _removed(ours, count)) for count in config["counts"][unit]]
        style = "--" if method == "lrp (paper)" else "-"
        counts = [0, *config["counts"][unit]]
        draw_line(axes, method, list(zip(counts, means, strict=True)), style)
    if what == "shown":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(-0.04, 1.08)
    axes.set_xlabel(f"{unit}s removed")
    axes.set_ylabel("share of continuations that show it" if what == "shown" else what)
    axes.legend(frameon=False)
