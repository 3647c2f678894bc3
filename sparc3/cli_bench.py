"""sparc3 bench: how fast the sparse kernels are here, beside everything else at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sparc3 import console
from sparc3.console import AsJson, Device, Force
from sparc3.errors import InputError

app = typer.Typer(
    cls=console.Commands,
    no_args_is_help=True,
    help="Measure the sparse kernels beside dense and other libraries.",
)


@app.command("decode")
def decode(
    shape: Annotated[
        str,
        typer.Option(
            help="llama-2-7b | llama-3-8b | llama-3-70b | llama-3.2-1b, or a model (folder, hub id)."
        ),
    ] = "llama-2-7b",
    sparsity: Annotated[
        str, typer.Option(metavar="X,Y,N:M", help="Shares of zeros, and N:M patterns.")
    ] = ".5,.6,.7,.8,.9,2:4",
    batch: Annotated[str, typer.Option(metavar="A,B,C", help="Numbers of vectors.")] = "1,4,16",
    impl: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Your own kernel into the table: a function that takes weight [rows, columns] and returns a "
            "function from x [batch, columns] to y [batch, rows], whose attribute `bytes` says what it reads.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="A,B", help="Measure only what has one of these words in its name.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16 | float16 | float32 of weights and vectors.")
    ] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as torch has it.")] = None,
    device: Device = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder for decode.json, decode.md and decode.png; it must not exist.")
    ] = None,
    add: Annotated[
        bool,
        typer.Option(
            "--add",
            help="--out has an earlier run with the same shape, dtype, device and threads: keep its sparsities "
            "and add these.",
        ),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Time the matrices of a decoder block with few vectors, as in decoding, dense and pruned.

    Random weights with zeros at random places. Every result is checked before it is timed, and weights come from
    memory rather than from the cache. Where a sparse kernel is slower than dense, the output says so.
    """
    import torch

    from sparc3.decode_bench import matrices_of, measure
    from sparc3.decode_peers import implementations
    from sparc3.decode_report import crossovers, joined, remarks, tables
    from sparc3.export import check_new
    from sparc3.models import usable_device
    from sparc3.report import versions
    from sparc3.runtime import DTYPES

    known = {str(kind).removeprefix("torch."): kind for kind in DTYPES}
    if dtype not in known:
        raise InputError(f"dtype {dtype!r} is not known; use {' | '.join(known)}")
    shares, batches = _sparsities(sparsity), _batches(batch)
    earlier = _earlier(out) if add else None
    if out is not None:
        check_new(out, force or add)
    where = usable_device(device)
    console.begin()
    chosen = [
        one
        for one in implementations(where, impl)
        if only is None or one.kind in ("dense", "own") or any(word in one.name for word in only.split(","))
    ]
    matrices = matrices_of(shape)
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with console.progress("measuring") as update, torch.no_grad():
            update(total=len(shares) * len(matrices))
            timings, bandwidth = measure(
                matrices,
                shares,
                batches,
                chosen,
                known[dtype],
                where,
                lambda what: update(description=what, advance=1),
            )
        result = {
            "shape": shape,
            "dtype": dtype,
            "device": str(where),
            "threads": torch.get_num_threads(),
            "bytes_per_second": dict.fromkeys(shares, bandwidth),
            "lines": [timing.line() for timing in timings],
            **versions(),
        }
    finally:
        torch.set_num_threads(before)
    if earlier is not None:
        result = joined(earlier, result)
    if out is not None:
        _save(result, out, force or add)
    if as_json:
        console.show_json(result)
        return
    saved = [f"Saved {out}: decode.json, decode.md (every matrix), decode.png"] if out is not None else []
    lines = result["lines"]
    console.show(*tables(lines), *crossovers(lines), *remarks(lines), *saved)


def _earlier(out: Path | None) -> dict[str, Any]:
    if out is None:
        raise InputError("--add needs --out, the folder of the earlier run")
    try:
        found = json.loads((out / "decode.json").read_text(encoding="utf-8"))
        found["lines"], found["bytes_per_second"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--add: {out} holds no run of sparc3 bench decode ({error})") from error
    return dict(found)


def _sparsities(words: str) -> list[str]:
    from sparc3.select import check_sparsity, parse_pattern

    found = []
    for word in words.split(","):
        if ":" in word:
            parse_pattern(word)
            found.append(word)
            continue
        try:
            share = float(word)
        except ValueError as error:
            raise InputError(f"{word!r} in --sparsity is neither a number nor N:M") from error
        found.append(f"{check_sparsity(share, 'row'):g}")
    return list(dict.fromkeys(found))


def _batches(words: str) -> list[int]:
    try:
        found = [int(word) for word in words.split(",")]
    except ValueError as error:
        raise InputError(f"--batch {words} is not a list of whole numbers") from error
    if min(found) < 1:
        raise InputError(f"--batch {words}: a batch has at least one vector")
    return list(dict.fromkeys(found))


def _save(result: dict[str, Any], out: Path, force: bool) -> None:
    from sparc3.decode_report import markdown, plot
    from sparc3.export import new_folder
    from sparc3.report import as_json

    with new_folder(out, force) as folder:
        (folder / "decode.json").write_text(as_json(result) + "\n", encoding="utf-8")
        (folder / "decode.md").write_text(markdown(result), encoding="utf-8")
        plot(result, folder / "decode.png")
