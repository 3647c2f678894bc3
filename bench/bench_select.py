"""Time of exact selection, ours beside what people call today. See bench/ratios.py for the table.

The peers find a threshold or an order and stop there, or go on to a boolean mask; ours always writes the packed
mask, except where a case is called a threshold. `bytes` is what must be read and written at least once: the scores
and one bit a score. A streamed threshold reads 16-bit scores once and fp32 scores twice; a plain read of the same
chunks, as often, on the same threads says what the memory gives.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sparc3_kernels import native, select_flat, select_nm, select_rows
from torch import Tensor

FLAT = 1 << 24
STREAM, CHUNK = 1 << 28, 1 << 22
ROWS, COLUMNS = 4096, 4096


@pytest.fixture(autouse=True)
def one_thread():
    """np.partition and torch.kthvalue have one thread, so everything gets one unless it says more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scores(shape: tuple[int, ...], kind: str) -> Tensor:
    """fp32 scores like |w x|: distinct, with heavy ties (64 values), or rounded to bf16."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()
    if kind == "ties":
        return (made * 16).round() / 16
    return made.bfloat16().float() if kind == "bf16-rounded" else made


def _partition(flat: Tensor) -> Callable[[], object]:
    array, middle = flat.numpy(), flat.numel() // 2
    return lambda: np.partition(array, middle)


def _stream_threshold(flat: Tensor, prune: int, threads: int) -> int:
    """Key of the threshold of scores fed in chunks of 4 M."""
    library = native.library()
    state = native.workspace(library.sparc3_select_state_size())
    work = native.workspace(library.sparc3_select_workspace_size(threads))
    native.check(library.sparc3_select_init(state.data_ptr(), native.DTYPES[flat.dtype]))
    more, threshold = ctypes.c_int(1), native.Threshold()
    while more.value:
        for chunk in flat.split(CHUNK):
            native.check(
                library.sparc3_select_count(
                    state.data_ptr(), chunk.data_ptr(), chunk.numel(), threads, work.data_ptr(), work.numel()
                )
            )
        native.check(library.sparc3_select_refine(state.data_ptr(), prune, ctypes.byref(more)))
    native.check(library.sparc3_select_threshold(state.data_ptr(), ctypes.byref(threshold)))
    return threshold.key


def _plain_read(flat: Tensor) -> None:
    """Sum up the chunks, as often as the stream reads them; 16-bit ones as if they were fp32, for speed."""
    for _ in range(2 if flat.dtype == torch.float32 else 1):
        for chunk in flat.split(CHUNK):
            chunk.view(torch.float32).sum()


STREAM_IMPLEMENTATIONS: dict[str, Callable[[Tensor], Callable[[], object]]] = {
    "sparc3": lambda flat: lambda: _stream_threshold(flat, flat.numel() // 2, torch.get_num_threads()),
    "plain read": lambda flat: lambda: _plain_read(flat),
    "np.partition": _partition,
    "torch.kthvalue": lambda flat: lambda: torch.kthvalue(flat, flat.numel() // 2),
}

FLAT_IMPLEMENTATIONS: dict[str, Callable[[Tensor], Callable[[], object]]] = {
    "sparc3": lambda flat: lambda: select_flat(flat, flat.numel() // 2),
    "np.partition": _partition,
    "torch.kthvalue": lambda flat: lambda: torch.kthvalue(flat, flat.numel() // 2),
}


def _wanda_sort(matrix: Tensor) -> None:
    """lib/prune.py of Wanda: sort every row, scatter the lower half into a boolean mask."""
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    order = torch.sort(matrix, dim=-1, stable=True)[1]
    mask.scatter_(1, order[:, : matrix.shape[1] // 2], True)


def _topk(matrix: Tensor) -> None:
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    lowest = torch.topk(matrix, matrix.shape[1] // 2, dim=-1, largest=False, sorted=False)[1]
    mask.scatter_(1, lowest, True)


ROW_IMPLEMENTATIONS: dict[str, Callable[[Tensor], object]] = {
    "sparc3": lambda matrix: select_rows(matrix, matrix.shape[1] // 2),
    "torch.sort (Wanda)": _wanda_sort,
    "torch.topk": _topk,
}


def _wanda_groups(matrix: Tensor) -> None:
    """lib/prune.py of Wanda for 2:4: topk of four columns at a time."""
    mask = torch.zeros_like(matrix, dtype=torch.bool)
    for column in range(0, matrix.shape[1], 4):
        lowest = torch.topk(matrix[:, column : column + 4], 2, dim=1, largest=False)[1]
        mask.scatter_(1, column + lowest, True)


def _topk_groups(matrix: Tensor) -> None:
    groups = matrix.view(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, torch.topk(groups, 2, dim=1, largest=False, sorted=False)[1], True)


GROUP_IMPLEMENTATIONS: dict[str, Callable[[Tensor], object]] = {
    "sparc3": lambda matrix: select_nm(matrix, 2, 4),
    "torch.topk by columns (Wanda)": _wanda_groups,
    "torch.topk": _topk_groups,
}


def _info(benchmark, group: str, implementation: str, n: int) -> None:
    benchmark.group = group
    benchmark.extra_info |= {"impl": implementation, "bytes": 4 * n + n // 8, "flops": 0}


@pytest.mark.parametrize("implementation", FLAT_IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["distinct", "ties", "bf16-rounded"])
def test_flat(benchmark, kind, implementation):
    run = FLAT_IMPLEMENTATIONS[implementation](scores((FLAT,), kind))
    _info(benchmark, f"median of 16.8 M fp32, {kind}", implementation, FLAT)
    if implementation == "sparc3":
        benchmark.extra_info["workspace"] = native.library().sparc3_select_flat_workspace_size(1)
    benchmark.pedantic(run, rounds=3 if implementation == "torch.kthvalue" else 15, warmup_rounds=1)


@pytest.fixture(scope="module")
def many() -> Tensor:
    """268 M fp32 scores."""
    made = torch.empty(STREAM)
    for seed, chunk in enumerate(made.split(CHUNK)):
        chunk.normal_(generator=torch.Generator().manual_seed(seed)).abs_()
    return made


@pytest.mark.parametrize(
    ("dtype", "threads", "implementation"),
    [
        *(("fp32", 1, name) for name in STREAM_IMPLEMENTATIONS),
        *(("bf16", 1, name) for name in STREAM_IMPLEMENTATIONS if name != "np.partition"),  # knows no bf16
        *((dtype, 2, name) for dtype in ("fp32", "bf16") for name in ("sparc3", "plain read")),
    ],
)
def test_stream(benchmark, many, dtype, threads, implementation):
    torch.set_num_threads(threads)
    flat = many if dtype == "fp32" else many.bfloat16()
    benchmark.group = f"threshold of 268 M {dtype} in chunks of 4 M, {threads} threads"
    passes = 2 if dtype == "fp32" and implementation in ("sparc3", "plain read") else 1
    benchmark.extra_info |= {"impl": implementation, "bytes": passes * flat.nbytes, "flops": 0}
    if implementation == "sparc3":
        assert _stream_threshold(flat, STREAM // 2, threads) == _middle_key(flat)
    run = STREAM_IMPLEMENTATIONS[implementation](flat)
    benchmark.pedantic(run, rounds=1 if implementation == "torch.kthvalue" else 5, warmup_rounds=1)


def _middle_key(flat: Tensor) -> int:
    """The bits of the lower median of non-negative scores, as csrc's key has them."""
    value = torch.from_numpy(
        np.partition(flat.float().numpy(), STREAM // 2 - 1)[STREAM // 2 - 1 : STREAM // 2]
    )
    return int(value.view(torch.int32))


@pytest.mark.parametrize("implementation", ROW_IMPLEMENTATIONS)
def test_rows(benchmark, implementation):
    matrix = scores((ROWS, COLUMNS), "distinct")
    _info(benchmark, f"half of each row of {ROWS} x {COLUMNS} fp32", implementation, matrix.numel())
    run = ROW_IMPLEMENTATIONS[implementation]
    benchmark.pedantic(run, (matrix,), rounds=15 if implementation == "sparc3" else 5, warmup_rounds=1)


@pytest.mark.parametrize("implementation", GROUP_IMPLEMENTATIONS)
def test_groups(benchmark, implementation):
    matrix = scores((ROWS, COLUMNS), "distinct")
    _info(benchmark, f"2:4 of {ROWS} x {COLUMNS} fp32", implementation, matrix.numel())
    run = GROUP_IMPLEMENTATIONS[implementation]
    benchmark.pedantic(run, (matrix,), rounds=15 if implementation == "sparc3" else 5, warmup_rounds=1)
