"""sparc3 export: a pruned model on disk, dense or packed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import sparc3
from sparc3 import console
from sparc3.console import AsJson, Device, Force
from sparc3.errors import InputError


def export(
    model: Annotated[
        str, typer.Argument(help="The dense model of the mask, or a model that is pruned already.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    mask: Annotated[
        Path | None, typer.Option(help="The mask to apply. Without one the zeros of the weights count.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="dense: opens in everything. bitmap | nm | csr: fewer bytes and faster decoding, for transformers "
            "after `import sparc3`. auto: for each weight what is smallest and fastest here."
        ),
    ] = "dense",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 | bfloat16 | float16: what to write. Default: as the model is stored."),
    ] = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a pruned model, dense or with its pruned weights packed (docs/formats.md)."""
    import torch

    from sparc3.export import check_new, save_pretrained
    from sparc3.formats import check_format
    from sparc3.mask import Mask
    from sparc3.report import describe, versions
    from sparc3.runtime import DTYPES

    console.check_apart(model, out)
    check_new(out, force)
    check_format(format)
    known = {str(kind).removeprefix("torch."): kind for kind in DTYPES}
    if dtype is not None and dtype not in known:
        raise InputError(f"dtype {dtype!r} is not known; use {' | '.join(known)}")
    found = Mask.load(mask) if mask is not None else None
    console.begin()
    with console.progress(f"loading {model}") as update:
        made_in = next(iter(found.fingerprint.get("tensors", {}).values()), None) if found else None
        loaded = sparc3.load(model, dtype=made_in["dtype"] if made_in else "auto", device=device)
        if found is not None:
            if not found.is_applied(loaded.model):
                found.apply(loaded.model)
            report = describe(loaded, found)
        else:
            report = {
                "model": {"name": loaded.name, "origin": loaded.origin, "note": loaded.note},
                **versions(),
            }
        if dtype is not None:
            torch.nn.Module.to(loaded.model, known[dtype])
        update(description=f"packing as {format}", total=len(found.bits) if found else None)
        choices = save_pretrained(
            loaded.model,
            found,
            out,
            loaded.tokenizer,
            report,
            force,
            loaded.note,
            format=format,
            progress=lambda done: update(advance=done),
        )
    _show(out, format, choices, as_json)


def _show(out: Path, format: str, choices: dict[str, dict[str, Any]], as_json: bool) -> None:
    from sparc3.formats import summary

    size = sum(file.stat().st_size for file in out.glob("*.safetensors") if file.name != "mask.safetensors")
    whole = {"out": str(out), "format": format, "file_bytes": size}
    if choices:
        whole["weights"] = summary(choices)
    if as_json:
        console.show_json(whole)
        return
    if not choices:
        console.show(f"Saved {out} (dense, {size / 1e6:.4g} MB)")
        return
    table = Table("stored as", "why")
    for column in ("weights", "MB", "dense MB", "ratio"):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for choice in choices.values():
        groups.setdefault((choice["format"], choice["why"]), []).append(choice)
    for (stored, why), members in groups.items():
        total = summary(dict(enumerate(members)))  # type: ignore[arg-type]
        table.add_row(stored, why, str(len(members)), *_megabytes(total))
    total = summary(choices)
    table.add_row("all pruned weights", "", str(len(choices)), *_megabytes(total))
    console.show(table, f"Saved {out} ({size / 1e6:.4g} MB; report.json tells every weight's format and why)")


def _megabytes(total: dict[str, Any]) -> tuple[str, str, str]:
    return f"{total['bytes'] / 1e6:.4g}", f"{total['dense_bytes'] / 1e6:.4g}", f"{total['ratio']:.3f}"
