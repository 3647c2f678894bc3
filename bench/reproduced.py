"""sparc3 reproduce at reduced scale on models and text that packages of the package index hold.

    python bench/reproduced.py [table1 samples concentration ioi] [--model smollm2 | gemma3]

As ``sparc3 reproduce NAME --scale reduced``, with SmolLM2-135M-Instruct and Gemma 3 270M dequantised from GGUF and
news of the Lee corpus (lee_background.cor to calibrate on, lee.cor to judge on) in place of the hub's models, C4 and
WikiText2. Results go to bench/results/reproduce-NAME; an interrupted run goes on there.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from real_models import gemma3, lee, lee_background, smollm2
from rich.console import Console

from sparc3.reproduce import Run

RESULTS = Path(__file__).resolve().parent / "results"
console = Console(stderr=True, width=120)


def main(
    experiments: Annotated[list[str] | None, typer.Argument()] = None,
    model: Annotated[list[str] | None, typer.Option(help="smollm2 | gemma3; both if none")] = None,
    seeds: Annotated[int | None, typer.Option(help="Draws of calibration text; the scale's if none")] = None,
) -> None:
    """Measure what is missing and write report.json, table.md and plot.png of each experiment."""
    with tempfile.TemporaryDirectory() as folder:
        # Reports name models and text as they are given: by file name, not by where a cache has them.
        os.chdir(folder)
        known = {"smollm2": smollm2, "gemma3": gemma3}
        models, texts = [known[name]() for name in model or known], [lee_background(), lee()]
        for path in models + texts:
            Path(path.name).symlink_to(path)
        for name in experiments or ["table1", "samples", "concentration", "ioi"]:
            judged = {"judged": texts[1].name} if name in ("table1", "samples") else {}
            text = {} if name == "ioi" else {"calibration": texts[0].name, **judged}
            given = [path.name for path in models]
            run = Run.open(name, "reduced", RESULTS / f"reproduce-{name}", models=given, seeds=seeds, **text)
            run.finish(lambda words: console.print(words))
        os.chdir(RESULTS)


if __name__ == "__main__":
    typer.run(main)
