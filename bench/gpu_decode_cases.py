"""Cases of bench/gpu.py: products of few vectors with packed weights beside dense and 2:4 products of libraries.

Bound by memory bandwidth: the floor is the bytes of the packed weight, without row offsets, and of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_case import Case, Implementation, Made, normal, on_gpu
from sparc3_kernels import backend
from sparc3_kernels.bitmap import bitmap_linear, pack_bitmap
from sparc3_kernels.bitmap_cuda import arrange_bitmap, arranged_bitmap_linear
from sparc3_kernels.nm import nm_linear, pack_nm
from sparc3_kernels.two_of_four_cuda import arrange_two_of_four, arranged_two_of_four_linear
from torch.nn import functional as F

_SHAPES = ((4096, 11008), (8192, 28672))
_BATCHES = (1, 4, 8, 16)
_LIBRARY_COLUMNS = 8  # cuSPARSELt takes bf16 in multiples of so many vectors


def _made(
    x: torch.Tensor,
    weight: torch.Tensor,
    neutral: Sequence[torch.Tensor],
    packed: Sequence[Any],
    ours: Implementation,
    peers: dict[str, Implementation],
) -> Made:
    """A case of x [batch, columns] and weight [rows, columns], its zeros those that `packed` leaves out.

    Args:
        neutral: the weight packed by pack_bitmap or pack_nm: masks or places and values come first.
        packed: what `ours` takes after x and weight.
        peers: beside the dense products.
    """

    def reference(x: Any, weight: Any, *packed: Any) -> tuple[torch.Tensor, ...]:
        return (x.float() @ weight.float().T,)

    dense: dict[str, Implementation] = {
        "cuBLAS x @ W.T": lambda x, weight, *packed: (x @ weight.T,),
        "cuBLAS W @ x.T": lambda x, weight, *packed: ((weight @ x.T).T,),
    }
    vectors = x.nbytes + len(x) * len(weight) * x.element_size()
    return Made(
        [x, weight, *packed],
        reference,
        {"sparc3": ours} | dense | peers,
        bytes=sum(t.nbytes for t in neutral[:2]) + vectors,
        short=True,
    )


def _bitmap(sparsity: float, rows: int, columns: int, batch: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        r, c, vectors = (40, 72, batch) if dry else (rows, columns, batch)
        x, weight = normal(device, vectors, c), normal(device, r, c)
        weight *= torch.rand(r, c, device=device) >= sparsity
        neutral = pack_bitmap(weight)

        def by_cuda(x: Any, weight: Any, *packed: Any) -> tuple[torch.Tensor, ...]:
            with backend("cuda"):
                return (arranged_bitmap_linear(x, *packed, r, c),)

        def by_cpu(x: Any, weight: Any, *packed: Any) -> tuple[torch.Tensor, ...]:
            with backend("cpu"):
                return (bitmap_linear(x, *packed),)

        if on_gpu(device):
            return _made(x, weight, neutral, arrange_bitmap(*neutral, c), by_cuda, {})
        return _made(x, weight, neutral, neutral, by_cpu, {})

    return Case(f"decode: bitmap {sparsity:.0%} {rows}x{columns} batch {batch}", make)


def _cusparselt() -> Implementation:
    """cuSPARSELt by the fastest algorithm of its search; each copy of the inputs is prepared when it is first met."""
    prepared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    algorithm: list[int] = []

    def run(x: Any, weight: Any, *packed: Any) -> tuple[torch.Tensor, ...]:
        if (key := weight.data_ptr()) not in prepared:
            columns = F.pad(x, (0, 0, 0, -len(x) % _LIBRARY_COLUMNS)).T.contiguous()
            prepared[key] = torch._cslt_compress(weight), columns
        operands = prepared[key]
        if not algorithm:
            algorithm.append(torch._cslt_sparse_mm_search(*operands))
        return (torch._cslt_sparse_mm(*operands, alg_id=algorithm[0])[:, : len(x)].T,)

    return run


def _two_of_four(rows: int, columns: int, batch: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        r, c, vectors = (40, 72, batch) if dry else (rows, columns, batch)
        x, weight = normal(device, vectors, c), normal(device, r, c)
        # Two of the four ranks are below 2.
        weight *= (torch.rand(r, c // 4, 4, device=device).argsort(-1) < 2).view(r, c)
        neutral = pack_nm(weight, 2, 4)

        def by_cuda(x: Any, weight: Any, *packed: Any) -> tuple[torch.Tensor, ...]:
            with backend("cuda"):
                return (arranged_two_of_four_linear(x, *packed, r, c),)

        def by_cpu(x: Any, weight: Any, *packed: Any) -> tuple[torch.Tensor, ...]:
            with backend("cpu"):
                return (nm_linear(x, *packed, 2, 4),)

        peers = {"cuSPARSELt": _cusparselt()}
        if on_gpu(device):
            return _made(x, weight, neutral, arrange_two_of_four(*neutral), by_cuda, peers)
        return _made(x, weight, neutral, neutral, by_cpu, peers)

    return Case(f"decode: 2:4 {rows}x{columns} batch {batch}", make)


def decode_cases() -> list[Case]:
    """Bitmaps of 50 and 70 % and 2:4, on a matrix of a 7B and one of a 70B model."""
    found = []
    for (rows, columns), batch in ((shape, batch) for shape in _SHAPES for batch in _BATCHES):
        found += [_bitmap(sparsity, rows, columns, batch) for sparsity in (0.5, 0.7)]
        found.append(_two_of_four(rows, columns, batch))
    return found
