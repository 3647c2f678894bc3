"""Our peers beside the public code of their authors: same model, same windows, perplexity of both.

    python bench/peer_code.py --wanda DIR --sparsegpt DIR --ria DIR --owl DIR --gblm DIR

DIR are checkouts of github.com/locuslab/wanda, github.com/IST-DASLab/sparsegpt,
github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning, github.com/luuyin/OWL and
github.com/VILA-Lab/GBLM-Pruner; they are imported from where they are. Their scripts want transformers 4 on a GPU:
what they call of it that is gone is given to them here, and their pruning functions run as they are. SparseGPT's own
class runs inside Wanda's driver for it. Results go to bench/results/peer-code-MODEL.json, row by row; rows that are
there already are not run again.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from attribution_cases import load_benchmark_model
from real_models import lee, lee_background
from rich.console import Console
from torch import nn

from sparc3.compress import prune
from sparc3.evaluate import perplexity
from sparc3.report import versions
from sparc3.samples import read_documents, windows

RESULTS = Path(__file__).parent / "results"
LENGTH = 128
# OWL's published defaults; GBLM's factor on gradients.
OWL_THRESHOLD, OWL_RANGE, GBLM_SCALE = 5.0, 0.08, 100
METHODS = {
    "wanda": ("row", "2:4"),
    "ria": ("row", "2:4"),
    "sparsegpt": ("layer", "2:4"),
    "owl": ("row",),
    "gblm": ("row", "2:4"),
}
console = Console(stderr=True, width=120)


class Layer(nn.Module):
    """A decoder layer as transformers 4 had it: it makes its own rotary tables and returns a tuple."""

    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = [rotary]  # not a submodule

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        places = torch.arange(hidden.shape[1])[None]
        return (self.layer(hidden, position_embeddings=self.rotary[0](hidden, places)),)


@contextmanager
def as_transformers_4(model: Any, calibration: torch.Tensor) -> Iterator[Callable[[ModuleType], None]]:
    """Within the context the model looks as the public scripts expect it; yields what fits a module of theirs."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(Layer(layer, model.model.rotary_emb) for layer in layers)
    model.hf_device_map, model.seqlen = {}, calibration.shape[1]
    synchronize, torch.cuda.synchronize = torch.cuda.synchronize, lambda *args: None
    to_cuda, torch.Tensor.cuda = torch.Tensor.cuda, lambda tensor: tensor

    def inputs(*args: Any) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor]:
        hidden = model.model.embed_tokens(calibration).detach()
        return hidden, torch.zeros_like(hidden), None, torch.zeros(1)

    def fit(module: ModuleType) -> None:
        module.get_loaders = lambda *args, **kwargs: ([(row[None],) for row in calibration], None)
        module.prepare_calibration_input = inputs

    try:
        yield fit
    finally:
        model.model.layers = layers
        torch.cuda.synchronize, torch.Tensor.cuda = synchronize, to_cuda


def public_module(folder: Path, name: str) -> ModuleType:
    """A module of a checkout, imported with its folder first on the path and without what it has no use for here."""
    for loaded in [key for key in sys.modules if key.split(".")[0] in ("lib", "quant", "sparsegpt")]:
        del sys.modules[loaded]
    sys.modules.setdefault("datasets", ModuleType("datasets")).load_dataset = None  # type: ignore[attr-defined]
    # By name: loading a model may have put another module object in place of the one that was imported first.
    sys.modules["transformers"].AdamW = torch.optim.AdamW  # type: ignore[attr-defined]
    # GBLM's script prints the versions of packages that are not there.
    version, importlib.metadata.version = importlib.metadata.version, lambda package: "unknown"
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        importlib.metadata.version = version


def gblm_gradients(model: Any, calibration: torch.Tensor, folder: Path, path: Path) -> None:
    """Write what GBLM's pruning reads: the L2 norm over samples of each weight's gradient, by their own class."""
    found = public_module(folder, "gradient_computation").gradient_computation(model, GBLM_SCALE)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for number, row in enumerate(calibration, 1):
        model(input_ids=row[None], labels=row[None]).loss.backward()
        found.update_gradient(model, number)
        model.zero_grad()
    # Blocks are wrapped while they are pruned (``Layer``), which shows in the names.
    torch.save({f"layer.{name}": total.sqrt().half() for name, total in found.gradients_l2.items()}, path)


def theirs(
    model: Any, calibration: torch.Tensor, method: str, pattern: str, folders: dict[str, Path]
) -> None:
    """Prune ``model`` for good by the public code."""
    kept, group = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    arguments = SimpleNamespace(
        nsamples=len(calibration),
        seed=0,
        sparsity_ratio=0.5,
        use_variant=False,
        model="llama",
        a=0.5,
        calib_dataset="c4",
        seqlen=calibration.shape[1],
        reconstruction=False,
        gptq=False,
        prune_method=method,
        reallocation=False,
        lsa=False,
        semi_sparse_acc=False,
        per_outneuron=True,
        Hyper_m=OWL_THRESHOLD,
        Lamda=OWL_RANGE,
        gradient_inv=False,
    )
    prune_n = group - kept
    with tempfile.TemporaryDirectory() as partial:
        if method == "gblm":
            arguments.gradient_path = str(Path(partial) / "gradients.pt")
            gblm_gradients(model, calibration, folders["gblm"], Path(arguments.gradient_path))
        _prune_publicly(model, calibration, method, arguments, prune_n, group, folders)


def _prune_publicly(
    model: Any,
    calibration: torch.Tensor,
    method: str,
    arguments: SimpleNamespace,
    prune_n: int,
    group: int,
    folders: dict[str, Path],
) -> None:
    with as_transformers_4(model, calibration) as fit:
        folder = folders["wanda" if method == "sparsegpt" else method]
        module = public_module(folder, "lib.prune_all" if method == "owl" else "lib.prune")
        fit(module)
        if method == "sparsegpt":
            own = public_module(folders["sparsegpt"], "sparsegpt").SparseGPT

            class Adapted(own):  # type: ignore[misc, valid-type]
                def fasterprune(self, sparsity: float, prune_n: int, prune_m: int, **rest: Any) -> None:
                    super().fasterprune(sparsity, prunen=prune_n, prunem=prune_m, **rest)

            module.SparseGPT = Adapted
        run = getattr(module, "prune_wanda_outlier" if method == "owl" else f"prune_{method}")
        run(arguments, model, None, torch.device("cpu"), prune_n=prune_n, prune_m=group)


def main(
    wanda: Annotated[Path, typer.Option(help="A checkout.")],
    sparsegpt: Annotated[Path, typer.Option(help="A checkout.")],
    ria: Annotated[Path, typer.Option(help="A checkout.")],
    owl: Annotated[Path, typer.Option(help="A checkout.")],
    gblm: Annotated[Path, typer.Option(help="A checkout.")],
    model: str = "smollm2",
    samples: int = 8,
    judged: int = 12,
) -> None:
    """Prune by both codes and write what came out."""
    folders = {"wanda": wanda, "sparsegpt": sparsegpt, "ria": ria, "owl": owl, "gblm": gblm}
    loaded = load_benchmark_model(model)
    calibration = windows(loaded.tokenizer, read_documents([str(lee_background())]), LENGTH, samples, seed=0)
    held_out = windows(loaded.tokenizer, read_documents([str(lee())]), LENGTH, judged, seed=0)
    target = RESULTS / f"peer-code-{model}.json"
    header = {
        "model": model,
        "note": loaded.note,
        "calibration": {"windows": samples, "tokens": LENGTH},
        "judged": {"windows": len(held_out), "tokens": LENGTH},
    }
    earlier = json.loads(target.read_text()) if target.exists() else {}
    same = all(earlier.get(key) == value for key, value in header.items())
    rows: list[dict[str, Any]] = earlier["results"] if same else []
    for method, patterns in METHODS.items():
        for pattern in patterns:
            if any((row["method"], row["pattern"]) == (method, pattern) for row in rows):
                continue
            rows.append(_both(loaded.model, calibration, held_out, method, pattern, folders))
            console.print(rows[-1])
            data = header | {
                "commits": {name: _commit(folder) for name, folder in folders.items()},
                "date": time.strftime("%Y-%m-%d"),
                "versions": versions(),
                "results": rows,
            }
            target.write_text(json.dumps(data, indent=1) + "\n")


def _both(
    model: Any,
    calibration: torch.Tensor,
    held_out: torch.Tensor,
    method: str,
    pattern: str,
    folders: dict[str, Path],
) -> dict[str, Any]:
    """Perplexity after ours and after the public code, and the share of weights on which their masks agree."""
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    allocate = {"allocate": "owl"} if method == "owl" else {}
    found = {}
    # SparseGPT once more with the samples in reverse: the same sums but for their rounding.
    for suffix, drawn in [("", calibration), ("_reversed", calibration.flip(0))]:
        if suffix and method != "sparsegpt":
            continue
        ours_by = "wanda" if method == "owl" else method
        mask = prune(model, drawn, ours_by, None if ":" in pattern else 0.5, pattern, **allocate)
        mask.apply(model)
        found[f"ours{suffix}"], ours = _pruned(model, mask.bits, held_out, dense)
        theirs(model, drawn, method, pattern, folders)
        found[f"public{suffix}"], public = _pruned(model, mask.bits, held_out, dense)
        if not suffix:
            found["ratio"] = found["ours"] / found["public"]
            same = sum(int((kept == public[name]).sum()) for name, kept in ours.items())
            found["same_mask"] = same / mask.total
    return {"method": method, "pattern": pattern, **found}


def _pruned(
    model: Any, names: Iterable[str], held_out: torch.Tensor, dense: dict[str, torch.Tensor]
) -> tuple[float, dict[str, torch.Tensor]]:
    """(perplexity, what is kept of each weight); the model is dense afterwards."""
    value = perplexity(model, held_out).value
    kept = {name: model.get_parameter(name) != 0 for name in names}
    model.load_state_dict(dense)
    return value, kept


def _commit(folder: Path) -> str:
    head = folder / "COMMIT"
    return head.read_text().strip() if head.exists() else folder.name


if __name__ == "__main__":
    typer.run(main)
