"""sparc3 mask: look at masks, apply and undo them, combine and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparc3 import console
from sparc3.console import AsJson, Device, Force
from sparc3.errors import InputError

if TYPE_CHECKING:
    from sparc3.mask import Mask
    from sparc3.models import Loaded

app = typer.Typer(
    cls=console.Commands, no_args_is_help=True, help="Look at masks, apply, undo, combine and compare them."
)

MaskFile = Annotated[
    Path, typer.Argument(metavar="MASK", help="A mask, as mask.safetensors in prune's folder.")
]
OtherFile = Annotated[Path, typer.Argument(metavar="OTHER", help="Another mask of the same model.")]
OutFolder = Annotated[Path, typer.Option(help="Folder to write; it must not exist.")]


@app.command("show")
def show(mask: MaskFile, as_json: AsJson = False) -> None:
    """What a mask prunes, tensor by tensor, and how it was made."""
    from sparc3.mask import Mask

    found = Mask.load(mask)
    if as_json:
        console.show_json(_described(found))
        return
    tensors = Table("tensor", "shape")
    tensors.add_column("pruned", justify="right")
    for name, shape in found.shapes.items():
        tensors.add_row(
            name, " x ".join(map(str, shape)), f"{1 - found.kept(name).float().mean().item():.2%}"
        )
    settings = Table("setting", "value")
    settings.add_row("made for", found.fingerprint.get("model", "?"))
    for key, value in found.settings.items():
        if key != "budgets":  # the tensors' own column
            settings.add_row(key, console.short(value))
    console.show(tensors, settings, _summary(found))


@app.command("apply")
def apply(
    model: Annotated[str, typer.Argument(help="The dense model that the mask was made for.")],
    mask: MaskFile,
    out: OutFolder,
    device: Device = "cpu",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the pruned model: the dense one with the mask's zeros."""
    from sparc3.mask import Mask

    found = Mask.load(mask)
    _check_out(model, out, force)
    loaded = _load(model, found, device)
    found.check(loaded.model)
    _save(loaded, found, out, force)
    _report_saved(found, out, as_json)


@app.command("undo")
def undo(
    model: Annotated[str, typer.Argument(help="The pruned model.")],
    mask: MaskFile,
    base: Annotated[str, typer.Option(help="The dense model that the mask was made from.")],
    out: OutFolder,
    device: Device = "cpu",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the model with its pruned weights put back, bit for bit."""
    from sparc3.mask import Mask

    found = Mask.load(mask)
    _check_out(model, out, force)
    _check_out(base, out, force)
    loaded = _load(model, found, device)
    with console.progress(f"loading {base}"):
        found.undo(loaded.model, base)
    try:
        found.check(loaded.model)
    except InputError as error:
        raise InputError(
            f"{model} is not {base} pruned by this mask: what it keeps differs too ({error})"
        ) from error
    _save(loaded, None, out, force)
    restored = found.total if found.updates else round(found.sparsity * found.total)
    if as_json:
        console.show_json({"out": str(out), "restored": restored})
    else:
        console.show(f"Saved {out} ({restored} weights put back)")


@app.command("combine")
def combine(
    mask: MaskFile,
    other: OtherFile,
    how: Annotated[str, typer.Option(help="and: keep what both keep | or: keep what either keeps.")],
    out: Annotated[Path, typer.Option(help="Mask file to write; it must not exist.")],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Combine two masks of one model."""
    from sparc3.mask import Mask

    console.check_new_file(out, force)
    combined = Mask.load(mask).combine(Mask.load(other), how)
    combined.save(out)
    _report_saved(combined, out, as_json)


@app.command("diff")
def diff(mask: MaskFile, other: OtherFile, as_json: AsJson = False) -> None:
    """Count the weights that two masks of one model keep and prune differently."""
    from sparc3.mask import Mask

    counts = Mask.load(mask).diff(Mask.load(other))
    total = {key: sum(row[key] for row in counts.values()) for key in next(iter(counts.values()))}
    if as_json:
        console.show_json({"total": total, "tensors": counts})
        return
    table = Table("kept by")
    for column in ("MASK only", "OTHER only", "both", "neither"):
        table.add_column(column, justify="right")
    for name, row in {**counts, "total": total}.items():
        table.add_row(name, *map(str, row.values()))
    console.show(table)


def _check_out(model: str, out: Path, force: bool) -> None:
    from sparc3.export import check_new

    console.check_apart(model, out)
    check_new(out, force)


def _load(name: str, mask: Mask, device: str) -> Loaded:
    """The model in the dtype that the mask was made in."""
    from sparc3.models import load

    console.begin()
    dtype = next((tensor["dtype"] for tensor in mask.fingerprint.get("tensors", {}).values()), "float32")
    with console.progress(f"loading {name}"):
        return load(name, dtype=dtype, device=device)


def _save(loaded: Loaded, mask: Mask | None, out: Path, force: bool) -> None:
    from sparc3.export import save_pretrained
    from sparc3.report import describe

    report = describe(loaded, mask) if mask else None
    save_pretrained(loaded.model, mask, out, loaded.tokenizer, report, force, loaded.note)


def _described(mask: Mask) -> dict[str, Any]:
    from sparc3.report import tensor_sparsity

    return {
        "model": mask.fingerprint.get("model"),
        "weights": mask.total,
        "sparsity": mask.sparsity,
        "settings": mask.settings,
        "tensors": tensor_sparsity(mask),
    }


def _summary(mask: Mask) -> str:
    return f"{len(mask.shapes)} tensors, {mask.total} weights, {mask.sparsity:.4%} pruned"


def _report_saved(mask: Mask, out: Path, as_json: bool) -> None:
    if as_json:
        console.show_json({"out": str(out), "weights": mask.total, "sparsity": mask.sparsity})
    else:
        console.show(f"Saved {out} ({_summary(mask)})")
