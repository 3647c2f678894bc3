"""The figures of sparc3 bench decode as tables, a plot and text, of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sparc3.errors import InputError

# Ours stand out, dense is the line at 1, the peers recede.
_COLOURS = {"sparc3 bitmap": "#d1495b", "sparc3 csr": "#edae49", "sparc3 nm": "#8d6a9f"}
_GREYS = ("#7a7a7a", "#30638e", "#00798c", "#b8b8b8", "#6a994e")


# What runs must share for their figures to stand in one table.
_SHARED = ("shape", "dtype", "device", "threads", "machine", "kernels")


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """An earlier run and a later one as one; of a sparsity that both measured the later figures stay.

    Raises:
        InputError: they are of another shape, dtype, device, number of threads, machine or instruction set.
    """
    for name in _SHARED:
        if earlier.get(name) != later[name]:
            raise InputError(
                f"the earlier run has another {name} ({earlier.get(name)}, now {later[name]}); give another --out"
            )
    measured = {line["sparsity"] for line in later["lines"]}
    kept = [line for line in earlier["lines"] if line["sparsity"] not in measured]
    reads = {line["sparsity"] for line in kept}
    return {
        **later,
        "bytes_per_second": {
            sparsity: speed for sparsity, speed in earlier["bytes_per_second"].items() if sparsity in reads
        }
        | later["bytes_per_second"],
        "lines": sorted(
            [*kept, *later["lines"]],
            key=lambda line: (
                line["batch"],
                line["matrix"] == "block",
                ":" in line["sparsity"],
                line["sparsity"],
            ),
        ),
    }


def tables(lines: Sequence[dict[str, Any]]) -> list[Table | str]:
    """One table a batch: speed of a block against the best dense, and its milliseconds, an implementation a row."""
    blocks = [line for line in lines if line["matrix"] == "block"]
    sparsities = list(dict.fromkeys(line["sparsity"] for line in blocks))
    made: list[Table | str] = []
    for batch in dict.fromkeys(line["batch"] for line in blocks):
        table = Table("implementation")
        for sparsity in sparsities:
            table.add_column(share(sparsity), justify="right")
        of_batch = [line for line in blocks if line["batch"] == batch]
        for name in dict.fromkeys(line["implementation"] for line in of_batch):
            found = {line["sparsity"]: line for line in of_batch if line["implementation"] == name}
            table.add_row(name, *(_cell(found.get(sparsity)) for sparsity in sparsities))
        made += [f"Batch {batch}: speed of a decoder block against the best dense (and its ms)", table]
    return made


def share(sparsity: str) -> str:
    """A sparsity as it is written in a table: 50 %, or 2:4."""
    return sparsity if ":" in sparsity else f"{100 * float(sparsity):g} %"


def _cell(line: dict[str, Any] | None) -> str:
    if line is None or line["seconds"] is None:
        return "-"
    ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}x "
    return f"{ratio}({1e3 * line['seconds']:.3g})"


def remarks(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must not overlook: where ours is slower than dense, and what did not run or was wrong."""
    found = []
    for line in lines:
        where = f"{line['matrix']} at {share(line['sparsity'])}, batch {line['batch']}"
        if line["failure"]:
            found.append(f"Not timed: {line['implementation']}, {where}: {line['failure']}")
        elif line["kind"] in ("sparc3", "own") and line["ratio"] is not None and line["ratio"] < 1:
            found.append(f"Slower than dense: {line['implementation']}, {where}: {line['ratio']:.2f}x")
    return found


def crossovers(lines: Sequence[dict[str, Any]]) -> list[str]:
    """For ours at each sparsity, up to which of the batches measured a block is no slower than the best dense."""
    ratios: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:
        if line["matrix"] == "block" and line["kind"] in ("sparc3", "own") and line["ratio"] is not None:
            ratios.setdefault((line["implementation"], line["sparsity"]), {})[line["batch"]] = line["ratio"]
    found = []
    for (name, sparsity), of_batch in ratios.items():
        batches = sorted(of_batch)
        slower = [batch for batch in batches if of_batch[batch] < 1]
        if len(batches) < 2:
            continue
        if not slower:
            text = f"no slower than dense at any batch measured, {batches[0]} to {batches[-1]}"
        elif slower == batches:
            text = f"slower than dense at every batch measured, {batches[0]} to {batches[-1]}"
        elif slower == batches[-len(slower) :]:
            text = f"no slower than dense up to batch {batches[-len(slower) - 1]}, slower from {slower[0]} on"
        else:
            text = (
                f"slower than dense at batch {', '.join(map(str, slower))} of {', '.join(map(str, batches))}"
            )
        found.append(f"Crossover: {name} at {share(sparsity)} is {text}")
    return found


def markdown(result: dict[str, Any]) -> str:
    """Every figure as Markdown tables."""
    head = (
        f"# Decoding: {result['shape']}, {result['dtype']}, {result['machine']['processor']}, "
        f"{result['threads']} threads\n\n"
        f"Memory is read at {_speeds(result)} GB/s. ratio: time of the fastest dense "
        "implementation of the same run / time; below 1 is slower. Results are checked against fp64 before they are "
        "timed; weights come from memory, not from the cache; implementations take turns; medians.\n"
    )
    parts = [head]
    for batch in dict.fromkeys(line["batch"] for line in result["lines"]):
        parts.append(
            f"\n## batch {batch}\n\n| matrix | sparsity | implementation | ms | MB | of memory bandwidth | ratio |\n"
            "|---|---|---|---|---|---|---|\n"
        )
        for line in (line for line in result["lines"] if line["batch"] == batch):
            shape = "" if line["matrix"] == "block" else f" {line['rows']} x {line['columns']}"
            cells = (
                f"{line['matrix']}{shape}",
                share(line["sparsity"]),
                line["implementation"],
                line["failure"] or f"{1e3 * line['seconds']:.3f}",
                "" if line["bytes"] is None else f"{line['bytes'] / 1e6:.2f}",
                "" if line["bandwidth"] is None else f"{line['bandwidth']:.0%}",
                ""
                if line["ratio"] is None
                else f"{line['ratio']:.2f}" + (" (slower)" if line["ratio"] < 1 else ""),
            )
            parts.append(f"| {' | '.join(cells)} |\n")
    if found := crossovers(result["lines"]):
        parts.append("\n## Where dense takes over\n\n" + "".join(f"- {line}\n" for line in found))
    return "".join(parts)


def _speeds(result: dict[str, Any]) -> str:
    """Least to highest of the runs, GB/s."""
    speeds = [speed / 1e9 for speed in result["bytes_per_second"].values()]
    least, most = f"{min(speeds):.1f}", f"{max(speeds):.1f}"
    return least if least == most else f"{least} to {most}"


def plot(result: dict[str, Any], path: str | Path) -> None:
    """Ratio of the block to the best dense against sparsity, one panel a batch; N:M as a star at its sparsity."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    blocks = [line for line in result["lines"] if line["matrix"] == "block" and line["ratio"] is not None]
    batches = list(dict.fromkeys(line["batch"] for line in blocks))
    figure = Figure(figsize=(4.0 * max(1, len(batches)) + 1.8, 4.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(batches)), sharey=True, squeeze=False)[0]
    names = [name for name in dict.fromkeys(line["implementation"] for line in blocks)]
    kinds = {line["implementation"]: line["kind"] for line in blocks}
    greys = iter(_GREYS * len(names))
    colours = {name: _COLOURS.get(name) or next(greys) for name in names if kinds[name] != "dense"}
    for axes, batch in zip(panels, batches, strict=False):
        for name, colour in colours.items():
            lines = [line for line in blocks if (line["batch"], line["implementation"]) == (batch, name)]
            points = sorted(
                (float(one["sparsity"]), one["ratio"]) for one in lines if ":" not in one["sparsity"]
            )
            ours = kinds[name] != "peer"
            style = {"color": colour, "linewidth": 2.4 if ours else 1.3, "marker": "o", "markersize": 4}
            if points:
                axes.plot(*zip(*points, strict=True), label=name, zorder=3 if ours else 2, **style)
            for one in (one for one in lines if ":" in one["sparsity"]):
                n, m = map(int, one["sparsity"].split(":"))
                label = f"{name} {one['sparsity']}" if ours else None
                axes.plot(
                    1 - n / m,
                    one["ratio"],
                    "*",
                    color=colour,
                    markersize=13 if ours else 7,
                    label=label,
                    zorder=4,
                )
        axes.axhline(1.0, color="black", linewidth=1, linestyle="--", label="best dense")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (0.2, 0.5, 2, 5) else "")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("weights pruned")
        axes.set_title(f"batch {batch}")
        axes.grid(alpha=0.25, which="both")
    panels[0].set_ylabel("speed of a decoder block / best dense (log scale)")
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{result['shape']}, {result['dtype']}, {result['machine']['processor']}")
    figure.savefig(path, dpi=150)
