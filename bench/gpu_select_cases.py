"""Cases of bench/gpu.py: exact selection beside what torch has for it."""

from __future__ import annotations

from typing import Any

import torch
from gpu_case import Case, Implementation, Made, on_gpu
from sparc3_kernels import backend
from sparc3_kernels.select import pack_bits, select_rows, select_rows_reference
from sparc3_kernels.select_native import CpuSelector, CudaSelector


def _select_threshold(count: int) -> Case:
    """The threshold of one counting pass, against what finds the same number; no mask."""

    def make(device: torch.device, dry: bool) -> Made:
        n, prune = (5001, 2500) if dry else (count, count // 2)
        scores = torch.randn(n, device=device).abs_().bfloat16()

        def ours(scores: Any) -> tuple[torch.Tensor, ...]:
            in_cuda = on_gpu(scores.device)
            selector = CudaSelector(scores.dtype, scores.device) if in_cuda else CpuSelector(scores.dtype)
            selector.count(scores)
            selector.refine(prune)
            # The key of a non-negative score is its bits.
            return (torch.tensor([selector.threshold.key], dtype=torch.int32).view(torch.float32).to(device),)

        peers: dict[str, Implementation] = {
            "torch.kthvalue": lambda scores: (scores.kthvalue(prune).values[None],),
            "torch.topk": lambda scores: (
                scores.topk(prune, largest=False, sorted=False).values.max()[None],
            ),
            "torch.sort": lambda scores: (scores.sort().values[prune - 1][None],),
        }
        return Made([scores], peers["torch.sort"], {"sparc3": ours} | peers, bytes=2 * n)

    return Case(f"select: threshold of {count >> 20} M bf16", make)


def _select_rows(rows: int, columns: int) -> Case:
    """The packed mask of half of each row; the peers make a boolean mask first."""

    def make(device: torch.device, dry: bool) -> Made:
        r, c, prune = (9, 301, 150) if dry else (rows, columns, columns // 2)
        scores = torch.randn(r, c, device=device).abs_()

        def ours(scores: Any) -> tuple[torch.Tensor, ...]:
            with backend("cuda" if on_gpu(scores.device) else "cpu"):
                return (select_rows(scores, prune),)

        def scattered(lowest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (pack_bits(torch.ones(r, c, dtype=torch.bool, device=device).scatter_(1, lowest, False)),)

        peers: dict[str, Implementation] = {
            "torch.kthvalue": lambda scores: (pack_bits(scores > scores.kthvalue(prune, 1, True).values),),
            "torch.topk": lambda scores: scattered(scores.topk(prune, 1, False, False).indices),
            "torch.sort": lambda scores: scattered(scores.sort(dim=1, stable=True).indices[:, :prune]),
        }
        reference: Implementation = lambda scores: (select_rows_reference(scores, prune),)  # noqa: E731
        return Made([scores], reference, {"sparc3": ours} | peers, bytes=4 * r * c + r * c // 8)

    return Case(f"select: half of each row of {rows}x{columns} fp32", make)


def select_cases() -> list[Case]:
    """All cases of selection."""
    return [_select_threshold(1 << 30), _select_rows(8192, 28672)]
