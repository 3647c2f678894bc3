"""Write pruned models that plain transformers loads, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sparc3_kernels.select import apply_bits_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.errors import InputError
from sparc3.mask import Mask
from sparc3.models import NOTE_FILE
from sparc3.report import write_report


@contextmanager
def new_folder(path: str | Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well, and goes when it does not.

    Raises:
        InputError: ``path`` exists and ``force`` is not set, its parent is missing or cannot be written, or the disk
            is full.
    """
    path = Path(path)
    check_new(path, force)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(f"cannot write beside {path}: {error}") from error
    try:
        yield partial
        # mkdtemp and safetensors make what only its owner may read.
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        if path.exists() and force:
            _replace(partial, path)
        else:
            partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(new: Path, path: Path) -> None:
    """Put ``new`` where ``path`` is; ``path`` is put back where that fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    old = aside / path.name
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    # The new folder is complete and in place: what cannot be removed of the old one is no failure.
    shutil.rmtree(aside, ignore_errors=True)


def check_new(path: str | Path, force: bool = False) -> None:
    """InputError where ``new_folder`` would refuse; to be called before long work."""
    path = Path(path)
    if path.exists() and not force:
        raise InputError(f"{path} exists; give another --out, or --force to replace it")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, not a folder; give another --out")
    # --force is for what this wrote before, not for a home folder.
    ours = any((path / name).is_file() for name in ("config.json", "report.json"))
    if path.exists() and any(path.iterdir()) and not ours:
        raise InputError(
            f"{path} holds no model or report (no config.json, no report.json), so --force does not replace it; "
            "remove it yourself"
        )
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write beside {path}: the folder {path.parent} is read-only")


def save_pretrained(
    model: PreTrainedModel,
    mask: Mask | None,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict[str, Any] | None = None,
    force: bool = False,
    note: str = "",
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write the model with the mask's zeros, the tokenizer, the mask and the report; ``model`` is not changed.

    Plain dense Hugging Face safetensors: everything loads it. Beside the weights, the config and the tokenizer lie
    mask.safetensors and report.json.

    Args:
        mask: None writes the model as it is. A mask that is already applied is fine.
        force: replace a folder that exists, once the new one is complete.
        note: of the base (sparc3.load(...).note), for whoever loads the folder with ``sparc3.load``.
        extra: writes more files into the folder that it is given, before it takes its name.

    Raises:
        InputError: the mask is for another model, or the folder cannot be written.
    """
    with new_folder(path, force) as folder:
        config = model.config
        quantization = config.__dict__.pop("quantization_config", None)
        try:
            model.save_pretrained(folder, state_dict=_pruned_state(model, mask))
        finally:
            if quantization is not None:
                config.quantization_config = quantization
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if mask is not None:
            mask.save(folder / "mask.safetensors")
        if report is not None:
            write_report(folder, report)
        if note:
            (folder / NOTE_FILE).write_text(note, encoding="utf-8")
        if extra is not None:
            extra(folder)


def _pruned_state(model: PreTrainedModel, mask: Mask | None) -> dict[str, torch.Tensor]:
    """The state dict, with copies of the pruned tensors alone."""
    state = model.state_dict()
    if mask is None:
        return state
    weights = mask._weights(model)
    if not all(
        weight.detach()[~mask.kept(name).to(weight.device)].eq(0).all() for name, weight in weights.items()
    ):
        mask.check(model)
    pruned = {
        weight.data_ptr(): apply_bits_(weight.detach().clone(), mask.bits[name].to(weight.device))
        for name, weight in weights.items()
    }
    # By address, so that the two names of a tied weight stay one tensor.
    return {name: pruned.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}
