"""Time of exact selection, ours beside what people call today, on one thread. See bench/ratios.py for the table.

The peers find a threshold or an order and stop there, or go on to a boolean mask; ours always writes the packed
mask. `bytes` is what must be read and written at least once: the scores and one bit a score.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sparc3_kernels import native, select_flat, select_nm, select_rows
from torch import Tensor

FLAT = 1 << 24
ROWS, COLUMNS = 4096, 4096


@pytest.fixture(autouse=True)
def one_thread():
    """np.partition and torch.kthvalue have one thread, so everything here gets one."""
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
