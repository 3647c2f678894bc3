"""Write pruned models that transformers loads, dense or packed (docs/formats.md), whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.errors import InputError
from sparc3.formats import check_format, pack_model, repack_model, summary
from sparc3.mask import Mask
from sparc3.models import NOTE_FILE
from sparc3.quantizer import Sparc3Config, check_files
from sparc3.report import write_report
from sparc3.runtime import SparseLinear

# Packed checkpoints are cut so that a broken download costs little; dense ones as transformers does it.
_SHARD = "5GB"


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
            replace_folder(partial, path)
        else:
            partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all; InputError where that is not possible."""
    path = Path(path)
    try:
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            # mkstemp makes a file that only its owner may read.
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def replace_folder(new: Path, path: Path) -> None:
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
    ours = any((path / name).is_file() for name in ("config.json", "report.json", "decode.json"))
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
    format: str = "dense",
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write the model with the mask's zeros, the tokenizer, the mask and the report; ``model`` is not changed.

    Plain dense Hugging Face safetensors: everything loads it. In another format transformers loads it after
    ``import sparc3``. Beside the weights, the config and the tokenizer lie mask.safetensors and report.json.

    Args:
        mask: None writes the model as it is. A mask that is already applied is fine.
        force: replace a folder that exists, once the new one is complete.
        note: of the base (sparc3.load(...).note), for whoever loads the folder with ``sparc3.load``.
        extra: writes more files into the folder that it is given, before it takes its name.
        format: dense, or how the pruned weights are packed (sparc3.formats.pack_model). Of a model that is packed
            already, how they are packed from now on (repack_model).
        progress: called with 1 for every weight packed.

    Returns:
        What ``pack_model`` chose for every pruned weight; empty for dense. The report gets it too, as "export".

    Raises:
        InputError: the mask is for another model, the format cannot hold a weight, a packed model is given a mask or
            asked for dense or auto, or the folder cannot be written.
    """
    check_format(format)
    linears: dict[str, SparseLinear] = {}
    choices: dict[str, dict[str, Any]] = {}
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        if mask is not None:
            raise InputError(
                "the model is packed already: its zeros are gone, and no mask can be applied to it"
            )
        linears, choices = repack_model(model, format, progress)
    elif format != "dense":
        linears, choices = pack_model(model, mask, format, progress)
    if choices and report is not None:
        report = report | {"export": {"asked": format, **summary(choices), "tensors": choices}}
    with new_folder(path, force) as folder:
        with _quantization_config(model, linears):
            state = _state(model, mask, linears)
            model.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD if linears else "50GB")
        if linears:
            check_files(sorted(folder.glob("*.safetensors")), {k: v.packing for k, v in linears.items()})
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
    return choices


@contextmanager
def _quantization_config(model: PreTrainedModel, linears: Mapping[str, SparseLinear]) -> Iterator[None]:
    """Within the context the config describes the packed linears, or nothing where there are none.

    The quantizer that a packed model was loaded by is out of the way: it would have its own state dict written.
    """
    config = model.config
    before = config.__dict__.pop("quantization_config", None)
    quantizer = model.__dict__.pop("hf_quantizer", None)
    if linears:
        config.quantization_config = Sparc3Config(
            {name: one.packing.entry() for name, one in linears.items()}
        )
    try:
        yield
    finally:
        config.__dict__.pop("quantization_config", None)
        if before is not None:
            config.quantization_config = before
        if quantizer is not None:
            model.__dict__["hf_quantizer"] = quantizer


def _state(
    model: PreTrainedModel, mask: Mask | None, linears: Mapping[str, SparseLinear]
) -> dict[str, torch.Tensor]:
    """The state dict with the packed linears, and with copies of the pruned tensors that stay dense."""
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in linears
    }
    for path, linear in linears.items():
        state |= {f"{path}.{name}": tensor for name, tensor in linear.state_dict().items()}
    if mask is None:
        return state
    if not mask.is_applied(model):
        mask.check_applies(model)
    # By address, so that the two names of a tied weight stay one tensor.
    pruned = {
        weight.data_ptr(): mask.prune_(name, weight.detach().clone())
        for name, weight in mask._weights(model).items()
        if name in state
    }
    return {name: pruned.get(tensor.data_ptr(), tensor) for name, tensor in state.items()}
