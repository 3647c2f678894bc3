"""Which format a pruned weight is stored in, by its bytes and by measured speed, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from sparc3.errors import InputError
from sparc3.families import Prunable, prunable
from sparc3.mask import Mask
from sparc3.pack import pack_linear, repack_linear
from sparc3.runtime import FORMATS, SparseLinear
from sparc3.select import parse_pattern
from sparc3.timing import cold_seconds

EXPORT_FORMATS = ("dense", *FORMATS, "auto")
# A slower format is taken for its fewer bytes where it is slower by less than this.
_SLOWER = 1.1
# Of an N:M that can be packed.
_LONGEST_GROUP = 16


def check_format(format: str) -> None:
    """InputError unless the format is one of ``EXPORT_FORMATS``."""
    if format not in EXPORT_FORMATS:
        raise InputError(f"format {format!r} is not known; use {' | '.join(EXPORT_FORMATS)}")


def pack_model(
    model: PreTrainedModel,
    mask: Mask | None,
    format: str,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, SparseLinear], dict[str, dict[str, Any]]]:
    """Pack the pruned weights of a model; the model is not changed.

    Args:
        mask: None takes the zeros of the prunable weights as they are.
        format: bitmap | nm | csr for every pruned weight, or auto: for each the smallest of those that decode at
            most 10 % slower than the fastest, here and now, the dense one included.
        progress: called with 1 for every weight done.

    Returns:
        ({path of a linear: what stands for it}, {weight: {"format", "bytes", "dense_bytes", "why", and for auto
        "candidates": {format: {"bytes", "microseconds"}}}}). A weight that stays dense is in the second alone.

    Raises:
        InputError: a weight that the format cannot hold, as fused experts or a tied head (auto keeps those dense), or
            the mask is for another model.
    """
    check_format(format)
    if mask is not None and not mask.is_applied(model):
        mask.check_applies(model)
    weights = prunable(model, include=["*"] if mask is not None else [])
    linears: dict[str, SparseLinear] = {}
    choices: dict[str, dict[str, Any]] = {}
    timed: dict[Any, float] = {}
    for name in mask.bits if mask is not None else weights:
        linear, choice = _pack(model, weights[name], mask, format, timed)
        choices[name] = choice
        if linear is not None:
            linears[name.removesuffix(".weight")] = linear
        if progress is not None:
            progress(1)
    return linears, choices


def repack_model(
    model: PreTrainedModel, format: str, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, SparseLinear], dict[str, dict[str, Any]]]:
    """The packed linears of a packed model in another format; the model is not changed.

    Args:
        format: bitmap | nm | csr.
        progress: called with 1 for every weight done.

    Returns:
        As ``pack_model``.

    Raises:
        InputError: another format, or a weight that is not N:M.
    """
    if format not in FORMATS:
        raise InputError(
            f"the model is packed already; it can be written as {', '.join(FORMATS)}, not as {format}: export the "
            "dense model with its mask instead"
        )
    linears: dict[str, SparseLinear] = {}
    choices: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, SparseLinear):
            continue
        linears[path] = repack_linear(module, format)
        size = module.out_features * module.in_features * module.weight.element_size()
        stored = {"format": format, "bytes": _bytes(linears[path])}
        choices[f"{path}.weight"] = {**stored, "dense_bytes": size, "why": "asked for"}
        if progress is not None:
            progress(1)
    return linears, choices


def sparsify_(
    model: PreTrainedModel, mask: Mask | None = None, format: str = "bitmap"
) -> dict[str, dict[str, Any]]:
    """Replace the pruned linears of a model in memory by packed ones; returns the choices of ``pack_model``."""
    linears, choices = pack_model(model, mask, format)
    for path, linear in linears.items():
        model.set_submodule(path, linear)
    return choices


def summary(choices: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"formats": {format: weights}, "bytes", "dense_bytes", "ratio"} of the pruned weights."""
    stored, dense = (sum(choice[key] for choice in choices.values()) for key in ("bytes", "dense_bytes"))
    return {
        "formats": dict(Counter(choice["format"] for choice in choices.values())),
        "bytes": stored,
        "dense_bytes": dense,
        "ratio": stored / max(1, dense),
    }


def _pack(
    model: PreTrainedModel, weight: Prunable, mask: Mask | None, format: str, timed: dict[Any, float]
) -> tuple[SparseLinear | None, dict[str, Any]]:
    """What stands for one weight (None: the dense one), and why."""
    tensor = weight.weight.detach()
    size = tensor.numel() * tensor.element_size()
    choice = {"format": "dense", "bytes": size, "dense_bytes": size}
    if reason := _unpackable(model, weight):
        if format not in ("auto", "dense"):
            raise InputError(
                f"{weight.name} cannot be packed as {format}: {reason}; use --format auto or dense"
            )
        return None, choice | {"why": reason}
    if mask is not None:
        tensor = mask.prune_(weight.name, tensor.clone())
    dense = weight.canonical(tensor).contiguous()
    kept = int(dense.count_nonzero())
    if format == "dense" or (mask is None and kept == dense.numel()):
        return None, choice | {"why": "asked for" if format == "dense" else "nothing of it is pruned"}
    bias: Any = weight.module.bias
    n, m = _pattern(weight.name, dense, mask, format)

    def packed(kind: str) -> SparseLinear:
        pattern = (n, m) if kind == "nm" else (0, 0)
        return pack_linear(dense, kind, bias, *pattern, weight.name, weight.transposed)

    if format != "auto":
        linear = packed(format)
        return linear, choice | {"format": format, "bytes": _bytes(linear), "why": "asked for"}
    candidates = {kind: packed(kind) for kind in FORMATS if kind != "nm" or m}
    best, why, figures = _best(dense, candidates, kept, size, timed)
    choice |= {"format": best, "bytes": figures[best]["bytes"], "why": why, "candidates": figures}
    return candidates.get(best), choice


def _unpackable(model: PreTrainedModel, weight: Prunable) -> str:
    """Why a weight can only be stored dense; empty where it can be packed."""
    if weight.weight.dim() != 2:
        return f"its experts are fused in one tensor of shape {list(weight.weight.shape)}"
    embeddings = model.get_input_embeddings()
    if weight.weight is getattr(embeddings, "weight", None):
        return "it is tied to the embeddings, which are read row by row"
    return ""


def _pattern(name: str, dense: torch.Tensor, mask: Mask | None, format: str) -> tuple[int, int]:
    """(N, M) of the mask, or else the sparsest that the weight has with N <= M / 2 and M = 4, 8 or 16, or (0, 0)."""
    if format not in ("nm", "auto"):
        return 0, 0
    asked = _asked_pattern(mask.settings) if mask is not None else ""
    if asked:
        n, m = parse_pattern(asked)
        return (n, m) if m <= _LONGEST_GROUP or format == "nm" else (0, 0)
    found = []
    for m in (4, 8, 16):
        if dense.shape[1] and dense.shape[1] % m == 0:
            n = max(1, int(dense.view(-1, m).count_nonzero(1).max()))
            if 2 * n <= m:
                found.append((n / m, n, m))
    if found:
        _, n, m = min(found)
        return n, m
    if format == "nm":
        raise InputError(
            f"{name} is not N:M, not even half of every 4, 8 or 16 weights of a row: prune with --pattern 2:4, give "
            "the mask of another N:M, or use --format bitmap"
        )
    return 0, 0


def _asked_pattern(settings: Mapping[str, Any]) -> str:
    """The N:M that a mask was made for, or empty; what keeps no more than an N:M mask does is N:M too."""
    if settings.get("combined") == "and":
        return next(filter(None, map(_asked_pattern, settings["of"])), "")
    pattern = str(settings.get("pattern"))
    return pattern if ":" in pattern else ""


def _bytes(linear: SparseLinear) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in linear.stored().values())


def _best(
    dense: torch.Tensor, candidates: dict[str, SparseLinear], kept: int, size: int, timed: dict[Any, float]
) -> tuple[str, str, dict[str, dict[str, float]]]:
    """The format taken, why, and {format: {"bytes", "microseconds"}} of all, dense included.

    Weights of one shape and nearly one density (5 % steps) are timed once.
    """
    x = torch.randn(1, dense.shape[1], device=dense.device, dtype=dense.dtype)
    calls: dict[str, Callable[[], object]] = {"dense": partial(F.linear, x, dense)}
    calls |= {kind: partial(linear, x) for kind, linear in candidates.items()}
    key = (tuple(dense.shape), dense.dtype, round(20 * kept / max(1, dense.numel())), tuple(calls))
    if (key, "dense") not in timed:
        with torch.no_grad():
            timed |= {(key, kind): seconds for kind, seconds in cold_seconds(calls, dense.device).items()}
    figures = {
        kind: {
            "bytes": size if kind == "dense" else _bytes(candidates[kind]),
            "microseconds": round(timed[key, kind] * 1e6, 1),
        }
        for kind in calls
    }
    fastest = min(figures, key=lambda kind: figures[kind]["microseconds"])
    limit = _SLOWER * figures[fastest]["microseconds"]
    near = [kind for kind in figures if figures[kind]["microseconds"] <= limit]
    best = min(near, key=lambda kind: (figures[kind]["bytes"], figures[kind]["microseconds"]))
    if best == fastest:
        why = "the fastest" + (" and the smallest of those nearly as fast" if len(near) > 1 else "")
    else:
        why = f"the smallest of those at most 10 % slower than the fastest, {fastest}"
    return best, why, figures
