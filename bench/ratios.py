"""Print, for every group of a pytest-benchmark JSON file, each implementation's median against ours.

    python bench/ratios.py bench/results/FILE.json

ratio = peer's median time / ours: above 1, ours is faster. GB/s and GFLOP/s come from the bytes and flops that each
benchmark states in its extra_info.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

OURS = ("sparc3", "sparc3-cpu")


def main() -> None:
    """Read the file named on the command line and print one table."""
    data = json.loads(Path(sys.argv[1]).read_text())
    groups: dict[str, list[dict]] = defaultdict(list)
    for run in data["benchmarks"]:
        groups[run["group"] or run["name"]].append(run)
    table = Table(
        title=f"{Path(sys.argv[1]).name}: {data['machine_info'].get('cpu', {}).get('brand_raw', '')}"
    )
    for column in ("group", "implementation", "median ms", "peer / ours", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="left" if column in ("group", "implementation") else "right")
    for group, runs in groups.items():
        ours = [run["stats"]["median"] for run in runs if run["extra_info"].get("impl") in OURS]
        for run in sorted(runs, key=lambda run: run["stats"]["median"]):
            median, info = run["stats"]["median"], run["extra_info"]
            table.add_row(
                group,
                str(info.get("impl", run["name"])),
                f"{median * 1e3:.2f}",
                f"{median / min(ours):.2f}" if ours else "",
                f"{info['bytes'] / median / 1e9:.1f}" if "bytes" in info else "",
                f"{info['flops'] / median / 1e9:.0f}" if "flops" in info else "",
            )
        table.add_section()
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
