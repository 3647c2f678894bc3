"""sparc3 reproduce: the paper's experiments, from one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparc3 import console
from sparc3.console import AsJson


def reproduce(
    experiment: Annotated[
        str, typer.Argument(help="table1 | samples | concentration | ioi | toxicity | repetition.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for report.json, table.md and plot.png; an interrupted run goes on in it, and one of fewer "
            "models or seeds is added to."
        ),
    ],
    scale: Annotated[
        str,
        typer.Option(
            help="paper: its models and texts from the hub | reduced: small models, a share of the text | "
            "smoke: minutes, on a bundled model."
        ),
    ] = "paper",
    model: Annotated[
        list[str] | None, typer.Option(help="Models in place of the scale's. Repeatable.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Text to score with: c4, a .json.gz, or as --text of prune."),
    ] = None,
    judged: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Text to judge on: wikitext2, a .parquet, or as --text of prune."
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a window.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Reference samples or examples.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many draws of them.")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows to judge on, at most; all if not told.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Zero-shot tasks of lm-eval in place of the scale's, or 'none'. Repeatable."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Of toxicity and repetition: real-toxicity-prompts, a copy of its prompts.jsonl, loops (our own), "
            "bundled, or a file as --undesired of correct.",
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="Of toxicity, as in correct; perspective takes your key from PERSPECTIVE_API_KEY."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="A torch device, as cpu or cuda:0.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 | bfloat16 | float16 | auto.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment of the paper and print our figures beside its own.

    Every figure is written when it is measured; the same command goes on where an interrupted one stopped.
    """
    from sparc3.report import as_json as document
    from sparc3.reproduce import Run

    run = Run.open(
        experiment,
        scale,
        out,
        models=model or None,
        calibration=calibration,
        judged=judged,
        length=length,
        samples=samples,
        seeds=seeds,
        windows=windows,
        tasks=None if task is None else [name for name in task if name != "none"],
        prompts=prompts,
        scorer=scorer,
        device=device,
        dtype=dtype,
    )
    console.begin()
    with console.progress(experiment) as update:
        run.finish(lambda words: update(description=words))
    if as_json:
        print(document({"out": str(out), "results": run.results}))
        return
    console.show(
        (out / "table.md").read_text(encoding="utf-8"), f"Saved {out}: report.json, table.md, plot.png"
    )
