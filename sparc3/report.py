"""What a run was, and what came out: report.json, a table, a plot."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparc3_kernels
from rich import box
from rich.table import Table
from sparc3_kernels.select import count_bits

if TYPE_CHECKING:
    from sparc3.mask import Mask
    from sparc3.models import Loaded

# One colour a method, the same in every plot; LRP stands out, the others recede.
METHOD_COLOURS = {
    "lrp": "#d1495b",
    "lrp (paper)": "#8f2d56",
    "gradient": "#edae49",
    "ria": "#00798c",
    "wanda": "#30638e",
    "gblm": "#c08552",
    "sparsegpt": "#4f772d",
    "magnitude": "#7a7a7a",
    "random": "#b8b8b8",
    "integrated-gradients": "#8d6a9f",
    "activation": "#6a994e",
    "exact": "#000000",
}


def versions() -> dict[str, Any]:
    """Versions and machine, plain JSON values."""
    packages = ("sparc3", "torch", "transformers", "safetensors", "numpy")
    return {
        "packages": {name: _version(name) for name in packages},
        "kernels": sparc3_kernels.info(),
        "python": platform.python_version(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe(loaded: Loaded, mask: Mask) -> dict[str, Any]:
    """What was pruned and how far: the model, the mask's settings, sparsity by tensor, versions and machine."""
    return {
        "model": {"name": loaded.name, "origin": loaded.origin, "note": loaded.note},
        "settings": mask.settings,
        "sparsity": {"requested": mask.settings.get("sparsity"), "achieved": mask.sparsity},
        "tensors": tensor_sparsity(mask),
        **versions(),
    }


def tensor_sparsity(mask: Mask) -> dict[str, dict[str, Any]]:
    """{name: {"shape", "requested", "achieved"}}; requested is None where the pattern leaves it open (global)."""
    each = None if mask.settings.get("pattern") == "global" else mask.settings.get("sparsity")
    budgets = mask.settings.get("budgets", {})
    return {
        name: {
            "shape": list(shape),
            "requested": budgets.get(name, each),
            "achieved": 1 - count_bits(mask.bits[name]) / math.prod(shape),
        }
        for name, shape in mask.shapes.items()
    }


def write_report(folder: str | Path, report: dict[str, Any]) -> Path:
    """Write report.json into a folder and return its path."""
    path = Path(folder) / "report.json"
    path.write_text(as_json(report) + "\n", encoding="utf-8")
    return path


def as_json(value: Any) -> str:
    """A JSON document of plain values; numbers that JSON has no word for, as an infinite perplexity, are null."""
    return json.dumps(_finite(value), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decimals(value: float | None, digits: int = 3) -> str:
    """A number for a table; "-" where it is undefined: NaN, or the null that report.json has for it."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def table(results: Sequence[dict[str, Any]], dense: float | None = None) -> Table:
    """A rich table of results, the best perplexity first.

    Args:
        results: dicts with method, pattern, sparsity, and optionally perplexity, interval (mean, low, high: nats per
            token against Wanda, negative is better) and seconds.
        dense: the dense model's perplexity, for the ratio.
    """
    # 80 columns hold it: the header of the interval breaks, its numbers do not.
    out = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    columns = (
        "method",
        "pattern",
        "sparsity",
        "perplexity",
        "x dense",
        "against Wanda, nats (95 %)",
        "seconds",
    )
    for column in columns:
        out.add_column(
            column,
            justify="left" if column in ("method", "pattern") else "right",
            min_width=23 if column.startswith("against") else None,
        )
    for row in sorted(results, key=lambda row: row.get("perplexity", 0)):
        interval = row.get("interval")
        out.add_row(
            row["method"],
            row["pattern"],
            f"{row['sparsity']:.1%}",
            f"{row['perplexity']:.4g}" if "perplexity" in row else "",
            f"{row['perplexity'] / dense:.2f}" if dense and "perplexity" in row else "",
            f"{interval[0]:+.3f} ({interval[1]:+.3f}, {interval[2]:+.3f})" if interval else "",
            f"{row['seconds']:.1f}" if row.get("seconds") is not None else "",
        )
    return out


def plot_perplexity(results: Sequence[dict[str, Any]], path: str | Path, title: str, dense: float) -> None:
    """Perplexity against sparsity, one line a method, the dense model dashed; format by the path's ending."""
    # Not pyplot, which would change the backend of the process (a notebook's) and keep the figure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    methods = dict.fromkeys(row["method"] for row in results)
    for method in methods:
        points = sorted((row["sparsity"], row["perplexity"]) for row in results if row["method"] == method)
        draw_line(axes, method, [(0.0, dense), *points])
    axes.axhline(dense, color="black", linewidth=1, linestyle="--", label=f"dense ({dense:.3g})")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("weights pruned")
    axes.set_ylabel("perplexity on held-out text (log scale)")
    axes.set_title(title)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_line(axes: Any, method: str, points: Sequence[tuple[float, float]], style: str = "-") -> None:
    """A method's line; LRP's is thick and below the others, so that where two coincide both are seen."""
    width, size, order = (4.0, 7.0, 1.9) if method == "lrp" else (1.4, 3.5, 2.0)
    axes.plot(
        *zip(*points, strict=True),
        style,
        marker="o",
        markersize=size,
        linewidth=width,
        zorder=order,
        color=METHOD_COLOURS.get(method),
        label=method,
    )


def plot_faithfulness(
    curves: dict[str, Sequence[dict[str, Any]]], path: str | Path, title: str, kept: str
) -> None:
    """Faithfulness against the share kept, one line a method, 0 and 1 dashed; format by the path's ending.

    Where faithfulness is undefined it is accuracy, the whole model's dashed.

    Args:
        curves: {method: points of fraction, faithfulness and accuracy}, the whole model last.
        kept: what is kept, for the axis, as "weights".
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    undefined = any(decimals(point["faithfulness"]) == "-" for points in curves.values() for point in points)
    measure = "accuracy" if undefined else "faithfulness"
    for method, points in curves.items():
        draw_line(axes, method, sorted((point["fraction"], point[measure]) for point in points))
    whole = max(points[-1]["accuracy"] for points in curves.values())
    levels = {"whole model": whole} if undefined else {"whole model": 1.0, "all ablated": 0.0}
    for name, level in levels.items():
        axes.axhline(level, color="black", linewidth=1, linestyle="--" if level else ":", label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.set_xlabel(f"{kept} kept (log scale)")
    axes.set_ylabel(f"{measure} on held-out examples")
    axes.set_title(title)
    axes.grid(alpha=0.25, which="both")
    # Beside the axes: within them it would hide lines wherever there are many methods.
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def plot_relevance(
    heads: Sequence[Sequence[float]],
    mlps: Sequence[float],
    path: str | Path,
    title: str,
    kept: Collection[str] = (),
) -> None:
    """Relevance of every head and MLP, block 0 at the bottom; red speaks for the answer, blue against it.

    Args:
        heads: [blocks][heads].
        mlps: [blocks]; empty where the model has none that can be told apart.
        kept: names, as a3.h2 or m3, of what is in the circuit: it is framed.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    blocks, width = len(heads), len(heads[0])
    figure = Figure(figsize=(min(3 + 0.4 * width, 12), min(1.6 + 0.28 * blocks, 14)), layout="constrained")
    parts = [("head", heads), *([("MLP", [[value] for value in mlps])] if mlps else [])]
    panels = figure.subplots(
        1, len(parts), sharey=True, squeeze=False, width_ratios=[width, max(1, width / 8)][: len(parts)]
    )[0]
    colours = LinearSegmentedColormap.from_list("relevance", ["#6298d0", "#ffffff", "#e26a78"])
    for axes, (kind, rows) in zip(panels, parts, strict=True):
        scale = max(abs(value) for row in rows for value in row) or 1.0
        drawn = axes.imshow(rows, origin="lower", aspect="auto", cmap=colours, norm=Normalize(-scale, scale))
        figure.colorbar(
            drawn, ax=axes, location="bottom", shrink=0.9, ticks=[-scale, 0, scale], format="%.2g"
        )
        axes.set_xlabel(kind)
        axes.set_xticks(range(width) if kind == "head" and width <= 16 else [])
        for block, row in enumerate(rows):
            for index in range(len(row)):
                if (f"a{block}.h{index}" if kind == "head" else f"m{block}") in kept:
                    corner = (index - 0.46, block - 0.46)
                    axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="black", linewidth=1))
    panels[0].set_ylabel("block")
    panels[0].yaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
