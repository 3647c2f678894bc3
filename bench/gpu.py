"""Time every fused kernel beside its peers on one GPU, each result checked before it is timed; ratios come last.

    python bench/gpu.py [--only NAME] [--out FILE]      # or: make bench-gpu
    TRITON_INTERPRET=1 python bench/gpu.py --dry        # tiny shapes without a GPU; its times mean nothing

A case is ours and its peers on the same inputs, and a floor: the bytes it must move, or the flops it must do. Each
call takes the next of several copies of its inputs, so that the L2 cache does not hold them; a time is the median of
single calls between CUDA events (of calls in a CUDA graph where launching takes as long), the implementations taking
turns. The whole model comes first, each way in a process of its own. Peers that cannot be imported or do not run are
named with the reason. Results go to bench/results/DATE-GPU.json with versions and commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_case import Case
from gpu_cases import cases
from gpu_model import WAYS
from gpu_timing import in_graph, median_ms
from rich.console import Console
from rich.table import Table
from sparc3_kernels import backend
from sparc3_kernels.attention import DISPATCH

_SECONDS = 500  # for everything: under nine minutes with the start
_CASE_SECONDS = 30  # a case with peers that compile may take so long, so that none begins with less left
_MODEL_SECONDS = 60  # for each way through a whole model, at most
_WHOLE_MODEL = "whole model, Llama-3-8B shape, 2048 tokens, all weights, abs per sample"
_COLD_BYTES = 128 << 20  # copies of the inputs take at least this much, twice the largest L2


def measure(case: Case, device: torch.device, dry: bool, seconds: float) -> dict[str, Any]:
    """One case: check every implementation against the first peer or the reference, then time those that agree."""
    made = case.make(device, dry)
    bytes_each = sum(t.nbytes for t in made.inputs if isinstance(t, torch.Tensor))
    # An implementation may read few of the inputs: a packed weight, not the dense one beside it.
    read = min(bytes_each, made.bytes or bytes_each)
    copies = 1 if dry else max(1, min(8, _COLD_BYTES // max(1, read) + 1))
    sets = [made.inputs] + [
        [t.clone() if isinstance(t, torch.Tensor) else t for t in made.inputs] for _ in range(copies - 1)
    ]
    expected = made.reference(*made.inputs)
    result: dict[str, Any] = {
        "case": case.name,
        "bytes": made.bytes,
        "flops": made.flops,
        "dispatch": made.dispatch,
        "skipped": {},
        "errors": {},
    }
    calls: dict[str, Callable[[int], Any]] = {}
    for name, run in made.implementations.items():
        try:
            outputs = run(*made.inputs)
            error = max(
                ((mine.float() - exact.float()).norm() / exact.float().norm().clamp(min=1e-30)).item()
                for mine, exact in zip(outputs, expected, strict=True)
            )
        except Exception as problem:  # a peer that is not installed or refuses the case
            if name.startswith("sparc3"):
                raise
            result["skipped"][name] = f"{type(problem).__name__}: {problem}"[:200]
            continue
        result["errors"][name] = error
        if not error <= made.tolerance:
            if name.startswith("sparc3"):
                raise ArithmeticError(f"{name} is off by {error:.3g}, more than {made.tolerance}")
            result["skipped"][name] = f"off by {error:.3g}"
            continue
        calls[name] = lambda index, run=run: run(*sets[index % len(sets)])
    for name, run in made.rates.items():
        calls[name] = lambda index, run=run: run(*sets[index % len(sets)])
    graphs = made.short and not dry
    if graphs:
        for name in list(calls):
            try:
                calls[name] = in_graph(calls[name], copies)
            except RuntimeError as problem:  # a peer that cannot be captured
                if name.startswith("sparc3"):
                    raise
                result["skipped"][name] = f"{type(problem).__name__}: {problem}"[:200]
                del calls[name]
    times = median_ms(calls, dry, seconds)
    result["ms"] = {name: ms / copies if graphs else ms for name, ms in times.items()}
    return result


def whole_model(dry: bool, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """Ways to attribute a whole model, as `measure` gives a case, and the peak of memory of each."""
    result: dict[str, Any] = {
        "case": _WHOLE_MODEL,
        "bytes": 0,
        "flops": 0,
        "skipped": {},
        "errors": {},
        "ms": {},
        "peak_bytes": {},
    }
    for way in ways:
        command = [sys.executable, str(Path(__file__).with_name("gpu_model.py")), way]
        try:
            finished = subprocess.run(
                command + ["--dry"] * dry,
                capture_output=True,
                text=True,
                timeout=None
                if dry
                else _MODEL_SECONDS,  # a dry run measures nothing, so no slow machine fails it
                check=True,
            )
        except subprocess.TimeoutExpired:
            result["skipped"][way] = f"took more than {_MODEL_SECONDS} s"
            continue
        except subprocess.CalledProcessError as problem:
            result["skipped"][way] = (problem.stderr.strip().splitlines() or ["no message"])[-1][:200]
            continue
        found = json.loads(finished.stdout.splitlines()[-1])
        result["ms"][way], result["peak_bytes"][way] = found["ms"], found["peak_bytes"]
        result["flops"] = found["flops"]
        if "error" in found:
            result["errors"][way] = found["error"]
    return result


def ceilings(device: torch.device, dry: bool) -> dict[str, float]:
    """Measured copy bandwidth (bytes/s) and bf16 product rate (flop/s), in the same run."""
    size = 1 << (10 if dry else 13)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << (20 if dry else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = median_ms({"copy": lambda _: target.copy_(source), "product": lambda _: a @ b}, dry, 2.0)
    return {"copy": 2 * source.nbytes / ms["copy"] * 1e3, "product": 2 * size**3 / ms["product"] * 1e3}


def versions() -> dict[str, str]:
    """Of what takes part, and the commit."""
    found = {}
    for package in ("torch", "triton", "transformers", "liger-kernel", "lxt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found | {"commit": commit.stdout.strip() or "unknown"}


def table(results: list[dict[str, Any]], limits: dict[str, float]) -> Table:
    """Ratios: each peer's time over ours, and ours against the floor."""
    shown = Table(title="peer / ours above 1: ours is faster; floor / ours: share of the measured ceiling")
    for column in ("case", "implementation", "ms", "peer / ours", "floor / ours", "peak GiB"):
        shown.add_column(column, justify="left" if column in ("case", "implementation") else "right")
    for result in results:
        ours = min(
            (ms for name, ms in result["ms"].items() if name.startswith("sparc3")), default=float("nan")
        )
        floor = 1e3 * max(result["bytes"] / limits["copy"], result["flops"] / limits["product"])
        for name, ms in sorted(result["ms"].items(), key=lambda item: item[1]):
            mine = name.startswith("sparc3")
            shown.add_row(
                *(result["case"], name, f"{ms:.3f}", "" if mine else f"{ms / ours:.2f}"),
                f"{floor / ms:.0%}" if mine else "",
                f"{peak / 2**30:.1f}" if (peak := result.get("peak_bytes", {}).get(name)) else "",
            )
        for name, reason in result["skipped"].items():
            shown.add_row(result["case"], name, "-", reason[:60], "", "")
        shown.add_section()
    return shown


def dispatch_table(results: list[dict[str, Any]]) -> Table:
    """What sparc3_kernels.attention.DISPATCH is and what it should be, by the slowest ratio of a row's cases."""
    ratios: dict[str, list[float]] = {row: [] for row in DISPATCH}
    for result in results:
        peers = [ms for name, ms in result["ms"].items() if name.startswith("sdpa")]
        if result.get("dispatch") and peers and "sparc3" in result["ms"]:
            ratios[result["dispatch"]].append(min(peers) / result["ms"]["sparc3"])
    shown = Table(title="dispatch of attention: ours where SDPA takes longer in every case of a row")
    for column in ("row", "ours now", "SDPA / ours", "ours by this run"):
        shown.add_column(column)
    for row, found in ratios.items():
        figures = ", ".join(f"{ratio:.2f}" for ratio in found) or "SDPA has none"
        shown.add_row(row, str(DISPATCH[row]), figures, str(all(ratio >= 1 for ratio in found)))
    return shown


def run(
    chosen: Sequence[Case], device: torch.device, dry: bool, started: float, console: Console
) -> list[dict[str, Any]]:
    """Measure the cases one after the other; those that begin too late, or where ours fails, are named as skipped.

    Args:
        started: time.monotonic() when everything began: all of it has `_SECONDS`.
    """
    results = []
    for number, case in enumerate(chosen):
        left = _SECONDS - (time.monotonic() - started)
        if left < _CASE_SECONDS:
            console.print(f"no time left for {case.name}")
            results.append(_nothing(case, "all", f"no time left: {left:.0f} s of {_SECONDS}"))
            continue
        # Half of a case's share: compiling and checking take the other.
        share = min(6.0, left / (len(chosen) - number) / 2)
        console.print(f"{number + 1}/{len(chosen)} {case.name}")
        try:
            results.append(measure(case, device, dry, share))
        except Exception as problem:  # the figures of the others are wanted all the same
            results.append(_nothing(case, "sparc3", f"{type(problem).__name__}: {problem}"[:200]))
        if not dry:
            torch.cuda.empty_cache()
    return results


def _nothing(case: Case, name: str, reason: str) -> dict[str, Any]:
    """The result of a case that gave none."""
    return {"case": case.name, "bytes": 0, "flops": 0, "skipped": {name: reason}, "errors": {}, "ms": {}}


def main() -> None:
    """Measure, write the file, print the table; exit code 1 where ours failed or was wrong in a case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.dry and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --dry runs the same code on tiny shapes without one")
    device = torch.device("cpu" if arguments.dry else "cuda")
    torch.manual_seed(0)
    chosen = [case for case in cases() if arguments.only in case.name]
    console, results = Console(width=150), []
    started = time.monotonic()
    if arguments.only in _WHOLE_MODEL:
        console.print(_WHOLE_MODEL)
        results.append(whole_model(arguments.dry))
    with backend("triton"):
        limits = ceilings(device, arguments.dry)
        results += run(chosen, device, arguments.dry, started, console)
    name = "dry" if arguments.dry else torch.cuda.get_device_name().replace(" ", "-").lower()
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    out = arguments.out or Path(__file__).parent / "results" / f"{day}-{name}.json"
    if not arguments.dry or arguments.out:
        document = {"device": name, "versions": versions(), "ceilings": limits, "cases": results}
        beside = out.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(document, indent=1) + "\n")
        beside.replace(out)
        console.print(f"wrote {out}")
    console.print(dispatch_table(results))
    console.print(table(results, limits))
    if failed := [result["case"] for result in results if "sparc3" in result["skipped"]]:
        raise SystemExit(f"sparc3 failed in {'; '.join(failed)}")


if __name__ == "__main__":
    main()
