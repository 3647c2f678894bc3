"""The command line: evaluate and info here, every other command in a file of its own (sparc3.cli_*).

Everything heavy is imported inside the commands, so that --help and --version answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

import sparc3
from sparc3 import (
    cli_bench,
    cli_circuit,
    cli_correct,
    cli_explain,
    cli_export,
    cli_generate,
    cli_mask,
    cli_prune,
    cli_reproduce,
    console,
)
from sparc3.console import AsJson, Device, Dtype, Length, Model, Text

app = typer.Typer(cls=console.Commands, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(cli_prune.prune)
app.command()(cli_circuit.circuit)
app.command()(cli_correct.correct)
app.command()(cli_explain.explain)
app.command()(cli_export.export)
app.command()(cli_generate.generate)
app.command()(cli_reproduce.reproduce)


def main() -> None:
    """The entry point of ``sparc3`` and ``python -m sparc3``."""
    app(prog_name="sparc3")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sparc3 {sparc3.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Attribute a language model with Layer-wise Relevance Propagation, and prune it with the result."""


@app.command()
def evaluate(
    model: Model,
    text: Text = None,
    length: Length = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Windows to measure, the first ones.")
    ] = console.EVALUATION_WINDOWS,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure a model's perplexity on text."""
    from sparc3.evaluate import perplexity
    from sparc3.models import BUNDLED

    text = text or ([console.BUNDLED_HELD_OUT] if model in BUNDLED else [])
    documents = console.documents_of(text, model)
    console.begin()
    with console.progress(f"loading {model}") as update:
        loaded = sparc3.load(model, dtype=dtype, device=device)
        length = console.window_length(loaded.model.config, loaded.tokenizer, length)
        windows = sparc3.windows(loaded.tokenizer, documents, length, samples)
        update(description="perplexity", total=len(windows))
        found = perplexity(loaded.model, windows, progress=lambda done, _: update(completed=done))
    result = {
        "model": loaded.name,
        "origin": loaded.origin,
        "note": loaded.note,
        "dtype": dtype,
        "text": text,
        "perplexity": found.value,
        "context": found.context,
        "windows": len(windows),
        "tokens": found.tokens,
    }
    if as_json:
        console.show_json(result)
        return
    console.show(
        f"perplexity {found.value:.5g}: {found.tokens} tokens predicted in {len(windows)} windows of "
        f"{found.context} tokens, of {', '.join(text)}",
        *console.notes(loaded),
    )


app.add_typer(cli_mask.app, name="mask")
app.add_typer(cli_bench.app, name="bench")


@app.command()
def info(as_json: AsJson = False) -> None:
    """Versions, backends, instruction sets and GPUs."""
    from sparc3.report import versions

    found = versions()
    if as_json:
        console.show_json(found)
        return
    kernels, machine = found["kernels"], found["machine"]
    table = Table("what", "found")
    for name, version in {"python": found["python"], **found["packages"]}.items():
        table.add_row(name, version or "not installed")
    table.add_row("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['system']}")
    native = kernels["native"]["cpu"]
    # A string says why the library cannot be used.
    features = [] if isinstance(native, str) else native["features"]
    table.add_row("instruction sets", ", ".join(features) or "-")
    table.add_row("GPUs", ", ".join(kernels["cuda_devices"]) or "none that torch sees")
    table.add_row("CUDA library", _cuda_library(kernels["native"]["cuda"]))
    for name, state in kernels["backends"].items():
        table.add_row(f"backend {name}", state)
    for where, how in _packed_weights(kernels["backends"]).items():
        table.add_row(f"packed on {where}", how)
    console.show(table, _runs_on(kernels))


def _cuda_library(native: dict[str, Any] | str) -> str:
    """What the CUDA library needs to run; a string says why it cannot be used."""
    if isinstance(native, str):
        return native
    if not native["built_with"]:
        return "its build noted no CUDA version, so the driver that it needs is not known"
    driver = native["least_driver"] or f"of CUDA {native['built_with']}"
    return f"built with CUDA {native['built_with']}, needs NVIDIA driver {driver} or later"


def _packed_weights(backends: dict[str, str]) -> dict[str, str]:
    """How products with packed weights run on each kind of device."""
    unpacked = "unpacked to dense for every call"
    fused = "bitmap and 2:4 in bf16 and fp16 decoded in the product up to 64 vectors; others "
    return {
        "CPUs": "bitmap, nm and csr decoded in the product" if backends["cpu"] == "available" else unpacked,
        "GPUs": fused + unpacked if backends["cuda"] == "available" else unpacked,
    }


def _runs_on(kernels: dict[str, Any]) -> str:
    """Which backends the ops take here, in a sentence."""
    if kernels["forced"]:
        return f"SPARC3_BACKEND forces the {kernels['forced']} backend."
    others = {name: state for name, state in kernels["backends"].items() if name != "reference"}
    usable = [name for name, state in others.items() if state == "available"]
    if usable:
        return f"Each op runs on its best backend of {', '.join(usable)}; the reference (plain torch) fills gaps."
    reasons = "; ".join(f"{name}: {state}" for name, state in others.items())
    return f"Everything runs on the reference backend (plain torch, slower). Why: {reasons}."
