"""Time of the matrices of a decoder block while decoding: dense, peers and packed, in one run.

What counts while decoding is how fast a weight streams from memory, so each implementation has as many copies of its
weight as it takes to leave the cache behind, and goes through them in turn. All results are checked against fp64
before anything is timed; implementations take turns, and medians are compared.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sparc3.decode_peers import Bind, Call, Implementation, Operand
from sparc3.errors import InputError
from sparc3.select import parse_pattern
from sparc3.timing import cache_bytes, synchronize


@dataclass(frozen=True)
class Matrix:
    """A weight of a decoder block; ``count`` of them are alike."""

    name: str
    rows: int
    columns: int
    count: int


def _llama(hidden: int, intermediate: int, key_value: int) -> tuple[Matrix, ...]:
    attention = (
        (Matrix("q, k, v, o", hidden, hidden, 4),)
        if key_value == hidden
        else (Matrix("q, o", hidden, hidden, 2), Matrix("k, v", key_value, hidden, 2))
    )
    return (
        *attention,
        Matrix("gate, up", intermediate, hidden, 2),
        Matrix("down", hidden, intermediate, 1),
    )


SHAPES = {
    "llama-2-7b": _llama(4096, 11008, 4096),
    "llama-3-8b": _llama(4096, 14336, 1024),
    "llama-3-70b": _llama(8192, 28672, 1024),
    "llama-3.2-1b": _llama(2048, 8192, 512),
}
_ROUNDS = 15
# A slow peer stops after this long a turn for turn, but not before its third.
_SECONDS_EACH = 0.5
_SECONDS_A_PASS = 0.1
_MOST_COPIES = 64


@dataclass(frozen=True)
class Timing:
    """One line of the table.

    Attributes:
        matrix: its name, or "block" for the sum over a block.
        sparsity: share of zeros, or N:M.
        kind: dense | peer | sparc3 | own.
        seconds: median; None where the result was wrong or the implementation failed (``failure`` says how).
        bytes: of the weight as stored; None where not known.
        bandwidth: bytes / seconds as a share of what this machine reads from memory.
        ratio: time of the fastest dense implementation / this one; below 1 this one is slower.
    """

    matrix: str
    rows: int
    columns: int
    count: int
    sparsity: str
    batch: int
    implementation: str
    kind: str
    seconds: float | None
    bytes: int | None
    bandwidth: float | None = None
    ratio: float | None = None
    failure: str = ""

    def line(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def matrices_of(name: str) -> tuple[Matrix, ...]:
    """The matrices of a known shape, or of the first decoder block of a model (folder or hub id).

    Raises:
        InputError: neither, or an architecture that is not declared.
    """
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparc3.families import family_of, prunable
    from sparc3.models import resolve

    try:
        source, _ = resolve(name)
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"--shape {name} is none of {', '.join(SHAPES)}, and as a model: {error}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    first = f"{family_of(model).blocks}.0."
    groups: dict[tuple[int, int], list[str]] = {}
    for key, weight in prunable(model).items():
        if key.startswith(first) and weight.weight.dim() == 2:
            rows, columns = weight.canonical(weight.weight).shape
            groups.setdefault((rows, columns), []).append(key.removesuffix(".weight").rpartition(".")[2])
    return tuple(
        Matrix(", ".join(names), rows, columns, len(names)) for (rows, columns), names in groups.items()
    )


def pruned_weight(
    matrix: Matrix, sparsity: str, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, int, int]:
    """(random weight [rows, columns] with zeros at random places, n, m); the same for the same arguments.

    Raises:
        InputError: the sparsity is neither a share nor N:M.
    """
    generator = torch.Generator().manual_seed(matrix.rows * 31 + matrix.columns)
    weight = torch.randn(matrix.rows, matrix.columns, generator=generator)
    if ":" in sparsity:
        n, m = parse_pattern(sparsity)
        if matrix.columns % m:
            raise InputError(f"{sparsity} does not divide rows of {matrix.columns} weights ({matrix.name})")
        groups = torch.rand(matrix.rows, matrix.columns // m, m, generator=generator)
        weight.view_as(groups).scatter_(2, groups.argsort(2)[..., n:], 0.0)
    else:
        n = m = 0
        weight.masked_fill_(torch.rand(weight.shape, generator=generator) < float(sparsity), 0.0)
    return weight.to(device, dtype), n, m


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that torch reads from memory: the sum of a vector many times the cache."""
    vector = torch.ones(max(8 * cache_bytes(device), 1 << 28) // 4, device=device)
    times = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        vector.sum()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return vector.numel() * 4 / statistics.median(times)


def measure(
    matrices: Sequence[Matrix],
    sparsities: Sequence[str],
    batches: Sequence[int],
    chosen: Sequence[Implementation],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Timing], float]:
    """Time every matrix, and sum up the block.

    Args:
        sparsities: shares as ".5", or N:M.
        batches: numbers of vectors.
        progress: called with a few words before every matrix and sparsity.

    Returns:
        (timings of matrices and blocks, the machine's bytes a second).
    """
    bandwidth = read_bandwidth(device)
    timings: list[Timing] = []
    for sparsity in sparsities:
        for matrix in matrices:
            if progress is not None:
                progress(f"{matrix.rows} x {matrix.columns}, {sparsity}")
            timings += _of_matrix(matrix, sparsity, batches, chosen, dtype, device, bandwidth)
    return timings + _blocks(timings, matrices, bandwidth), bandwidth


def _of_matrix(
    matrix: Matrix,
    sparsity: str,
    batches: Sequence[int],
    chosen: Sequence[Implementation],
    dtype: torch.dtype,
    device: torch.device,
    bandwidth: float,
) -> Iterator[Timing]:
    weight, n, m = pruned_weight(matrix, sparsity, dtype, device)
    fitting = [one for one in chosen if m or not one.needs_pattern]
    generator = torch.Generator().manual_seed(7)
    vectors = [torch.randn(batch, matrix.columns, generator=generator).to(device, dtype) for batch in batches]
    operands: dict[str, Operand] = {}
    copies: dict[str, list[Bind]] = {}
    failures: dict[str, str] = {}
    for one in fitting:
        try:
            operands[one.name] = one.prepare(weight, n, m)
            copies[one.name] = _copies(operands[one.name], weight, vectors[0], device)
        except Exception as error:
            # A kernel of somebody else may fail in any way; the others are measured all the same.
            failures[one.name] = _words(error)
    for batch, x in zip(batches, vectors, strict=True):
        wrong, calls = dict(failures), {}
        for name, stored in copies.items():
            try:
                bound = [bind(x) for bind in stored]
                if reason := _wrong(bound[0](), operands[name].rows_first, weight, x):
                    wrong[name] = reason
                else:
                    calls[name] = bound
            except Exception as error:
                wrong[name] = _words(error)
        seconds = _interleaved(calls, device)
        dense = min(
            (seconds[one.name] for one in fitting if one.kind == "dense" and one.name in seconds),
            default=None,
        )
        for one in fitting:
            taken = seconds.get(one.name)
            size = operands[one.name].bytes if one.name in operands else None
            yield Timing(
                *(
                    matrix.name,
                    matrix.rows,
                    matrix.columns,
                    matrix.count,
                    sparsity,
                    batch,
                    one.name,
                    one.kind,
                ),
                taken,
                size,
                bandwidth=size / taken / bandwidth if size and taken else None,
                ratio=dense / taken if dense and taken else None,
                failure=wrong.get(one.name, ""),
            )


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _copies(operand: Operand, weight: torch.Tensor, x: torch.Tensor, device: torch.device) -> list[Bind]:
    """As many copies as leave the cache behind; fewer of what takes so long that the cache cannot matter."""
    made = [operand.copy()]
    first = made[0](x)
    first()
    taken = _one_pass([first], device)()
    # What does not say its size is taken for half of the dense one, which is copies enough.
    size = operand.bytes or weight.numel() * weight.element_size() // 2
    needed = min(
        _MOST_COPIES, math.ceil(2 * cache_bytes(device) / max(1, size)), int(_SECONDS_A_PASS / taken)
    )
    return made + [operand.copy() for _ in range(needed - 1)]


def _wrong(found: Any, rows_first: bool, weight: torch.Tensor, x: torch.Tensor) -> str:
    """What is wrong with a product, or nothing.

    Allowed: one rounding of the result to its dtype, and of each of the fp32 sums of a row.
    """
    result = torch.as_tensor(found, device=x.device)
    product = (result.T if rows_first else result).double()
    shape = (x.shape[0], weight.shape[0])
    if tuple(product.shape) != shape:
        return f"the product has shape {list(product.shape)}, not {list(shape)}"
    step = 1024
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step].double()
        exact, scale = F.linear(x.double(), rows), F.linear(x.double().abs(), rows.abs())
        allowed = torch.finfo(x.dtype).eps * exact.abs() + rows.shape[1] * 2.0**-24 * scale
        error = (product[:, start : start + step] - exact).abs()
        if not (error <= allowed).all():
            row = start + int((error > allowed).any(0).to(torch.uint8).argmax())
            return f"wrong result: row {row} is off by {error.max().item():.3g}"
    return ""


def _interleaved(calls: dict[str, list[Call]], device: torch.device) -> dict[str, float]:
    """Median seconds of one call, each implementation going through its copies in its turn."""
    passes = {name: _one_pass(copies, device) for name, copies in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_ROUNDS):
        for name, one in passes.items():
            if turn < 3 or sum(seconds[name]) * len(calls[name]) < _SECONDS_EACH:
                seconds[name].append(one() / len(calls[name]))
    return {name: statistics.median(times) for name, times in seconds.items()}


def _one_pass(copies: Sequence[Call], device: torch.device) -> Callable[[], float]:
    """A function that runs through the copies and returns the seconds; on a GPU as one CUDA graph."""
    if device.type != "cuda":

        def on_cpu() -> float:
            start = time.perf_counter()
            for copy in copies:
                copy()
            return time.perf_counter() - start

        return on_cpu
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for copy in copies:
            copy()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            copy()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_gpu() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return on_gpu


def _blocks(timings: Sequence[Timing], matrices: Sequence[Matrix], bandwidth: float) -> list[Timing]:
    """The sum over the matrices of a block, for implementations that ran them all.

    The dense time that counts is the sum of the fastest for each matrix.
    """
    groups: dict[tuple[str, int, str], list[Timing]] = {}
    dense: dict[tuple[str, int], dict[str, float]] = {}
    for timing in timings:
        groups.setdefault((timing.sparsity, timing.batch, timing.implementation), []).append(timing)
        if timing.kind == "dense" and timing.seconds is not None:
            best = dense.setdefault((timing.sparsity, timing.batch), {})
            taken = timing.count * timing.seconds
            best[timing.matrix] = min(best.get(timing.matrix, math.inf), taken)
    blocks = []
    for (sparsity, batch, name), lines in groups.items():
        if len(lines) < len(matrices) or any(line.seconds is None for line in lines):
            continue
        seconds = sum(line.count * (line.seconds or 0) for line in lines)
        known = all(line.bytes is not None for line in lines)
        size = sum(line.count * (line.bytes or 0) for line in lines) if known else None
        best = dense.get((sparsity, batch), {})
        blocks.append(
            Timing(
                *("block", 0, 0, sum(line.count for line in lines), sparsity, batch, name, lines[0].kind),
                *(seconds, size),
                bandwidth=size / seconds / bandwidth if size else None,
                ratio=sum(best.values()) / seconds if len(best) == len(matrices) else None,
            )
        )
    return blocks
