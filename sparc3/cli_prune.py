"""sparc3 prune: prune, compare, save."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import sparc3
from sparc3 import console
from sparc3.console import AsJson, Device, Dtype, Force, Length, Model, Text, Update
from sparc3.errors import InputError

if TYPE_CHECKING:
    import torch

    from sparc3.mask import Mask
    from sparc3.models import Loaded


def prune(
    model: Model = "tiny-llama",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the pruned model, its mask and report.json; it must not exist. Only --dry-run does "
            "without it."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="lrp | gradient | wanda | ria | gblm | sparsegpt | magnitude | random. sparsegpt changes the "
            "weights that it keeps."
        ),
    ] = "lrp",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the weights to prune, in [0, 1); 0.5, or what N:M implies.")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="What competes: row | layer | global, or N:M (N kept of every M), as 2:4.")
    ] = "row",
    allocate: Annotated[
        str,
        typer.Option(
            help="How the share is spread over the tensors: uniform | owl | relevance; row and layer only."
        ),
    ] = "uniform",
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Change the kept weights so that the outputs of --text stay what they were. For --pattern row and "
            "N:M; where whole rows go it can make a model worse (docs/limitations.md).",
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help="What lrp and gradient explain: logit | logit-mean | lead | logprob | max-logit. "
            "The pattern has a default, as for --reduce and --rule; report.json tells it."
        ),
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="Where it is explained: all | last. Default: all.")
    ] = None,
    reduce: Annotated[
        str | None, typer.Option(help="How samples are reduced: signed | abs | square | token-square.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="LRP rule: attnlrp, or one choice a part, joined by commas: norm=constant|gradient "
            "activation=identity|gradient gate=half|gradient attention=half|gradient."
        ),
    ] = None,
    skip_first: Annotated[
        bool | None, typer.Option("--skip-first/--keep-first", help="Leave the first token's relevance out.")
    ] = None,
    text: Text = None,
    eval_text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help=f"Held-out text to measure perplexity on ({console.EVALUATION_WINDOWS} windows), as --text. "
            "Without it nothing is measured, but bundled models have bundled:held_out.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of --text to score with, at most.")] = 128,
    length: Length = None,
    seed: Annotated[int, typer.Option(help="Which windows, and the order of --method random.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    include: Annotated[
        list[str] | None, typer.Option(help="Prune only tensors whose name matches, as '*mlp*'. Repeatable.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave these tensors whole. Repeatable.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Methods to measure beside --method; the table has them all."),
    ] = None,
    sparsities: Annotated[
        str | None,
        typer.Option(metavar="X,Y,Z", help="Sparsities to measure beside --sparsity; the plot has them all."),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Read the model block by block, so that this much memory of --device suffices, as 8GiB. "
            "This and the options below suit models larger than memory; masks are the same, bit by bit.",
        ),
    ] = None,
    max_host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The same for the memory beside a GPU's.")
    ] = None,
    offload_dir: Annotated[
        Path | None, typer.Option(help="Where what fits no memory is put meanwhile; beside --out without it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was broken off, block by block.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it takes, and stop; config.json is enough for it.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model and save it with its mask, a report, and how it compares.

    The model saved is that of --method and --sparsity, whatever else is compared. With more than one method or
    sparsity the folder has perplexity.png too.
    """
    from sparc3.allocate import check_allocation
    from sparc3.compress import check_model, check_used, default_settings, requested_sparsity
    from sparc3.evaluate import check_fits
    from sparc3.export import check_new, save_pretrained
    from sparc3.models import BUNDLED
    from sparc3.passes import SWEEP_ONLY, reads_samples
    from sparc3.report import describe
    from sparc3.samples import read_documents
    from sparc3.scores import check_settings

    if out is None and not dry_run:
        raise InputError("name the folder for the pruned model with --out")
    if out is not None:
        console.check_apart(model, out)
        if not (resume or dry_run):
            check_new(out, force)
    methods = list(dict.fromkeys([method, *console.words(compare)]))
    settings: dict[str, Any] = dict(
        target=target, positions=positions, reduce=reduce, rule=rule, skip_first=skip_first
    )
    settings = {name: value for name, value in settings.items() if value is not None}
    for name in methods:
        if name not in SWEEP_ONLY:
            check_settings(name, **{**default_settings(pattern), **settings})
    check_used(settings, methods)
    check_allocation(allocate, pattern)
    asked = [sparsity, *(_number(word) for word in console.words(sparsities))]
    shares = list(dict.fromkeys(requested_sparsity(share, pattern) for share in asked))
    text = text or ([console.BUNDLED_TEXT] if model in BUNDLED else [])
    if max_memory or max_host_memory or offload_dir or resume or dry_run or console.processes() > 1:
        if len(methods) * len(shares) > 1 or eval_text:
            raise InputError(
                "--compare, --sparsities and --eval-text need the model in memory; prune block by block first, then "
                "measure with sparc3 evaluate"
            )
        from sparc3.cli_stream import prune_by_block

        return prune_by_block(
            model,
            out,
            method=method,
            sparsity=shares[0],
            pattern=pattern,
            allocate=allocate,
            repair=repair,
            settings=settings | ({"seed": seed} if method == "random" else {}),
            text=text,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            dtype=dtype,
            include=include or [],
            exclude=exclude or [],
            max_memory=max_memory,
            max_host_memory=max_host_memory,
            offload_dir=offload_dir,
            resume=resume,
            dry_run=dry_run,
            force=force,
            as_json=as_json,
        )
    assert out is not None  # only dry runs do without it
    eval_text = eval_text or ([console.BUNDLED_HELD_OUT] if model in BUNDLED else [])
    if len(methods) * len(shares) > 1 and not eval_text:
        raise InputError("--compare and --sparsities measure perplexity: give held-out text with --eval-text")
    reads_text = any(reads_samples(name, allocate, repair) for name in methods)
    documents = console.documents_of(text, model) if reads_text else []
    held_out = read_documents(eval_text) if eval_text else []

    console.begin()
    with console.progress(f"loading {model}") as update:
        loaded = sparc3.load(model, dtype=dtype, device=device)
        check_model(loaded.model, methods, pattern, include or (), exclude or ())
        length = console.window_length(loaded.model.config, loaded.tokenizer, length)
        calibration = _windows(loaded, documents, length, samples, seed)
        evaluation = _windows(loaded, held_out, length, console.EVALUATION_WINDOWS, None)
        for windows in (calibration, evaluation):
            if windows is not None:
                check_fits(loaded.model, windows)
        settings |= {"include": include or (), "exclude": exclude or ()}
        settings |= {"seed": seed} if "random" in methods else {}
        settings |= {"allocate": allocate, "repair": repair}
        dense, rows, mask = _measure(
            loaded, calibration, evaluation, methods, shares, pattern, settings, update
        )
        mask.settings |= {
            "model": loaded.name,
            "origin": loaded.origin,
            "note": loaded.note,
            "text": text if reads_text else [],
            "samples": 0 if calibration is None else len(calibration),
            "length": length,
            "seed": seed,
            "include": include or [],
            "exclude": exclude or [],
        }
        report = describe(loaded, mask) | {"dense": dense, "results": rows}
        if dense is not None:
            dense["text"] = eval_text
        update(description=f"writing {out}")
        save_pretrained(
            loaded.model,
            mask,
            out,
            loaded.tokenizer,
            report,
            force,
            loaded.note,
            _plotter(loaded, dense, rows),
        )
    if as_json:
        console.show_json({"out": str(out), **report})
    else:
        _show_pruned(loaded, dense, rows, out)
        if mask.updates:
            console.show(f"Note: {mask.updates} changed the kept weights too; undoing it needs {model}")
        console.show("Next:", *_next_commands(out, mask.settings, eval_text, device, dtype))


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise InputError(f"{word!r} in --sparsities is not a number; give shares as 0.3,0.5") from None


def _windows(
    loaded: Loaded, documents: list[str], length: int, count: int, seed: int | None
) -> torch.Tensor | None:
    return sparc3.windows(loaded.tokenizer, documents, length, count, seed) if documents else None


def _measure(
    loaded: Loaded,
    calibration: torch.Tensor | None,
    evaluation: torch.Tensor | None,
    methods: list[str],
    shares: list[float],
    pattern: str,
    settings: dict[str, Any],
    update: Update,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], Mask]:
    """(dense perplexity, a row for every method and sparsity, the mask of the first of each)."""
    from sparc3.compress import Pruner

    samples: Any = [] if calibration is None else calibration
    if evaluation is None:
        pruner = Pruner(loaded.model, samples, pattern, **settings)
        update(
            description=f"{methods[0]} {shares[0]:.0%}",
            total=len(samples) * pruner.passes(methods[0]) or None,
        )
        start = time.perf_counter()
        mask = pruner.mask(methods[0], shares[0], lambda done: update(advance=done))
        row = {"method": methods[0], "pattern": pattern, "sparsity": mask.sparsity}
        return None, [row | {"seconds": time.perf_counter() - start, "settings": dict(mask.settings)}], mask
    update(description="dense: evaluating", total=1 + 2 * len(methods) * len(shares))
    found = sparc3.perplexity(loaded.model, evaluation)
    rows, chosen = [], None

    def tell(words: str) -> None:
        update(description=words, advance=1)

    for row, mask in sparc3.compare(
        loaded.model, samples, evaluation, methods, shares, pattern, progress=tell, **settings
    ):
        rows.append(row | {"settings": dict(mask.settings)})
        if row["method"] == methods[0] and mask.settings["sparsity"] == shares[0]:
            chosen = mask
    assert chosen is not None  # compare yields every method at every sparsity
    dense = {"perplexity": found.value, "context": found.context, "tokens": found.tokens}
    return dense, rows, chosen


def _plotter(
    loaded: Loaded, dense: dict[str, Any] | None, rows: list[dict[str, Any]]
) -> Callable[[Path], None] | None:
    """Writes the plot into a folder, where there is more than one row and an axis that holds the dense model."""
    if dense is None or len(rows) < 2 or not math.isfinite(dense["perplexity"]):
        return None
    from sparc3.report import plot_perplexity

    title = f"{Path(loaded.name).name}, {rows[0]['pattern']}" + (f" ({loaded.note})" if loaded.note else "")
    return lambda folder: plot_perplexity(rows, folder / "perplexity.png", title, dense["perplexity"])


def _show_pruned(loaded: Loaded, dense: dict[str, Any] | None, rows: list[dict[str, Any]], out: Path) -> None:
    from sparc3.report import table

    parts: list[Any] = [table(rows, dense["perplexity"] if dense else None)]
    if dense is not None:
        parts.append(
            f"dense {dense['perplexity']:.5g}; {dense['tokens']} tokens predicted in windows of {dense['context']}, "
            f"of {', '.join(dense['text'])}"
        )
    console.show(
        *parts,
        *console.notes(loaded),
        console.saved(out),
    )


def _next_commands(
    out: Path, settings: dict[str, Any], eval_text: list[str], device: str, dtype: str
) -> list[str]:
    """Three commands to copy, with the paths and settings of this run."""
    run = [] if (device, dtype) == ("cpu", "float32") else ["--device", device, "--dtype", dtype]
    same = [word for source in settings["text"] for word in ("--text", source)]
    same += [word for source in eval_text for word in ("--eval-text", source)]
    judged = [word for source in eval_text or settings["text"] or ["bundled"] for word in ("--text", source)]
    length = ["--length", settings["length"], *run]
    other = "row" if ":" in settings["pattern"] else "2:4"
    beside = out.with_name(f"{out.name}-{other.replace(':', 'of')}")
    commands = [
        ["evaluate", out, *judged, *length],
        ["mask", "show", out / "mask.safetensors"],
        ["prune", settings["model"], "--pattern", other, *same, *length, "--out", beside],
    ]
    return [f"  {_program()} {shlex.join(map(str, command))}" for command in commands]


def _program() -> str:
    """How this program was called, so that its commands can be copied."""
    called = Path(sys.argv[0])
    if getattr(sys.modules["__main__"].__spec__, "name", None) == "sparc3.__main__":
        return f"{shlex.quote(sys.executable)} -m sparc3"
    return "sparc3" if shutil.which("sparc3") or called.name != "sparc3" else shlex.quote(str(called))
