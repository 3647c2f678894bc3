"""What sparc3 correct writes beside the model: report.json, a plot, and one HTML page without a network."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc3 import page
from sparc3.correct import Correction, Found
from sparc3.mask import Mask
from sparc3.models import Loaded
from sparc3.report import METHOD_COLOURS, versions
from sparc3.sweep import Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Perplexity may become a hundred times worse as well as 0.1 %: then the axis is logarithmic from the second on.
_WIDE, _LINEAR_TO = 0.1, 0.01
# Room of a number beside its point, in points of 1/72 inch: six digits of a font of 8.
_LABEL = (36, 10)
# On the page; report.json has all.
_SAMPLES = 24


def correction_report(
    loaded: Loaded,
    correction: Correction,
    found: Sequence[Found],
    combined: Mapping[str, Measured],
    budget: float | None,
) -> dict[str, Any]:
    """All that is saved and printed, as plain JSON values; the first of ``found`` is the one that is applied."""
    first = found[0]
    assert first.chosen is not None
    names = correction.names(first.scores, first.chosen.count)
    return {
        "model": {"name": loaded.name, "origin": loaded.origin, "note": loaded.note},
        "behaviour": {"name": correction.behaviour.name, "shown_from": correction.behaviour.threshold},
        "prompts": {
            "run": correction.run,
            "explained": len(correction.ranking),
            "judged": len(correction.judging),
            "tokens": correction.tokens,
        },
        "unit": correction.unit,
        "total": correction.total,
        "budget": budget,
        "settings": first.mask.settings,
        "before": correction.before.described(),
        "after": first.chosen.described(),
        "removed": {"by_layer": removed_by_layer(first.mask, names), "components": names},
        "combined": {name: one.described() for name, one in combined.items()},
        "results": [one.described() for one in found],
        "samples": [
            {"prompt": before.prompt, "before": before.text, "after": after.text}
            for before, after in zip(correction.before.said, first.chosen.said, strict=True)
        ],
        **versions(),
    }


def removed_by_layer(mask: Mask, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{layer: {"weights", "tensors": {name: weights}, "components"}} of the layers that lost something."""
    layers: dict[str, dict[str, Any]] = {}
    for name in mask.shapes:
        lost = int((~mask.kept(name)).sum())
        if lost:
            layer = layers.setdefault(_layer(name), {"weights": 0, "tensors": {}, "components": []})
            layer["weights"] += lost
            layer["tensors"][name] = lost
    for name in names:
        layers.setdefault(_layer(name), {"weights": 0, "tensors": {}, "components": []})["components"].append(
            name
        )
    return layers


def _layer(name: str) -> str:
    """The first number of a state-dict name or of a component's name."""
    found = re.search(r"\d+", name)
    return found[0] if found else ""


def method_label(settings: Mapping[str, Any]) -> str:
    """A method in a table or a plot."""
    contrast = settings.get("contrast")
    return settings["method"] + (f":{contrast}" if contrast in ("set-difference", "absolute") else "")


def combined_rows(report: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Label and measurement of what was combined, which counts weights whatever the unit is."""
    unit = "" if report["unit"] == "weight" else ", in weights"
    return [(name + unit, point) for name, point in report["combined"].items()]


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Write correction.png and page.html into a folder."""
    figure = correction_figure(report)
    figure.savefig(folder / "correction.png", dpi=150)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    (folder / "page.html").write_text(correction_page(report, drawn.getvalue()), encoding="utf-8")


def _title(report: Mapping[str, Any]) -> str:
    model = report["model"]
    title = f"{Path(model['name']).name}: {report['behaviour']['name']}, {report['unit']}s removed"
    return title + (f" ({model['note']})" if model["note"] else "")


def label_axes(axes: Any, increases: Sequence[float], behaviour: str) -> None:
    """Perplexity across, logarithmic where an increase is large, and the share that shows the behaviour upwards."""
    scale = ""
    if any(_WIDE < increase < math.inf for increase in increases):
        axes.set_xscale("symlog", linthresh=_LINEAR_TO)
        # Left alone, the axis reaches as many decades below zero as above, and writes every decade.
        largest = max(increase for increase in increases if math.isfinite(increase))
        axes.set_xlim(min(0.0, *increases) - _LINEAR_TO, 3 * largest)
        axes.xaxis.get_major_locator().set_params(numticks=8)
        scale = " (logarithmic beyond 1 %)"
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:+g}%")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_ylim(-0.04, 1.08)
    axes.set_xlabel("change of perplexity of general text" + scale)
    axes.set_ylabel(f"continuations that show {behaviour}")
    axes.grid(alpha=0.25)


def correction_figure(report: Mapping[str, Any]) -> Figure:
    """The share that shows the behaviour against perplexity, one line a method, one point a number removed.

    Where points lie too close for all their numbers, those of the saved one and of the larger ones are written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    before = report["before"]
    for result in sorted(report["results"], key=lambda result: result is report["results"][0]):
        leading = result is report["results"][0]
        points = [before, *result["sweep"]]
        x, y = [point["increase"] for point in points], [point["shown"] for point in points]
        name = method_label(result["settings"])
        axes.plot(
            x,
            y,
            marker="o",
            markersize=5 if leading else 3.5,
            linewidth=2.4 if leading else 1.3,
            linestyle="--" if ":" in name else "-",
            color=METHOD_COLOURS.get(result["settings"]["method"]),
            label=name,
        )
    chosen = report["after"]
    axes.plot(
        chosen["increase"],
        chosen["shown"],
        "o",
        markersize=12,
        fillstyle="none",
        color="black",
        label="saved",
    )
    if report["budget"] is not None:
        axes.axvline(report["budget"], color="black", linewidth=1, linestyle=":", label="budget")
    increases = [point["increase"] for result in report["results"] for point in result["sweep"]]
    label_axes(axes, increases, report["behaviour"]["name"])
    axes.set_title(_title(report), fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    # Where a point is on the page is known from the layout alone.
    figure.draw_without_rendering()
    placed: list[tuple[float, float]] = []
    for point in (chosen, *reversed(report["results"][0]["sweep"])):
        place = (point["increase"], point["shown"])
        x, y = axes.transData.transform(place) * 72 / figure.dpi
        if all(abs(x - across) > _LABEL[0] or abs(y - up) > _LABEL[1] for across, up in placed):
            placed.append((x, y))
            axes.annotate(f"{point['count']:,}", place, xytext=(5, 5), textcoords="offset points", fontsize=8)
    return figure


def correction_page(report: Mapping[str, Any], plot: str) -> str:
    """One HTML page: what changed, by how much, what was removed, and samples before and after side by side.

    Args:
        plot: SVG of ``correction_figure``.
    """
    behaviour, prompts, after = report["behaviour"], report["prompts"], report["after"]
    columns = ("", "removed", "shown", "score", "tokens", "distinct", "perplexity", "change")
    rows = [("whole model", report["before"]), ("corrected", after), *combined_rows(report)]
    layers = report["removed"]["by_layer"]
    what = "weights" if report["unit"] == "weight" else f"{report['unit']}s"
    sections: list[tuple[str, list[str]]] = [
        (
            "What changed",
            [
                page.paragraph(
                    f"{after['count']:,} of {report['total']:,} {what} ({after['fraction']:.3%}) are removed. "
                    f"Prompts run: {prompts['run']}; {prompts['explained']} that show {behaviour['name']} were "
                    f"explained, {prompts['judged']} others that show it judge, by greedy continuations of at most "
                    f"{prompts['tokens']} tokens."
                ),
                page.table(columns, [(name, *cells(point)) for name, point in rows]),
                page.paragraph(
                    "tokens: mean length of a continuation; distinct: different tokens over all tokens. A fall "
                    "of the behaviour by empty or degenerate text would show there.",
                    "note",
                ),
            ],
        ),
        ("Behaviour against perplexity", [page.drawing(plot)]),
        (
            f"Before and after: the first {min(_SAMPLES, len(report['samples']))} of {len(report['samples'])}",
            [
                page.columns(
                    ("prompt", "before", "after"),
                    [(one["prompt"], one["before"], one["after"]) for one in report["samples"][:_SAMPLES]],
                )
            ],
        ),
        (
            "All that was measured",
            [
                page.table(
                    ("method", *columns[1:]),
                    [
                        (method_label(result["settings"]), *cells(point))
                        for result in report["results"]
                        for point in result["sweep"]
                    ],
                )
            ],
        ),
        (
            "Removed, by layer",
            [
                page.table(
                    ("layer", "weights", what if report["unit"] != "weight" else "tensors"),
                    [
                        (
                            layer,
                            f"{lost['weights']:,}",
                            ", ".join(lost["components"]) or _tensors(lost["tensors"]),
                        )
                        for layer, lost in sorted(layers.items(), key=lambda item: int(item[0]))
                    ],
                )
            ],
        ),
    ]
    return page.page(_title(report), sections)


def _tensors(lost: Mapping[str, int]) -> str:
    return ", ".join(f"{name.split('.', 3)[-1]}: {count:,}" for name, count in lost.items())


def cells(point: Mapping[str, Any]) -> tuple[str, ...]:
    """A measurement in a table: removed, shown, score, tokens, distinct, perplexity, change."""
    return (
        f"{point['count']:,}",
        f"{point['shown']:.1%}",
        f"{point['score']:.3f}",
        f"{point['length']:.1f}",
        f"{point['distinct']:.3f}",
        f"{point['perplexity']:.4g}",
        f"{point['increase']:+.2%}",
    )
