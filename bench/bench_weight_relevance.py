"""Time of `accumulate_weight_relevance_` beside plain torch, on one thread. See bench/ratios.py for the table.

`bytes`: both operands and the accumulator read, the accumulator written, once each; `flops`: the products.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparc3_kernels.weight_relevance import REDUCTIONS, accumulate_weight_relevance_
from torch import Tensor

# (samples, tokens, N, K): short prompts and one long sample on the MLP of SmolLM2.
SHAPES = [(64, 16, 576, 1536), (1, 2048, 576, 1536)]
REDUCE: dict[str, Callable[[Tensor], Tensor]] = {"abs": torch.abs, "square": torch.square}


@pytest.fixture(autouse=True)
def one_thread():
    """A GEMM and our kernel share their work out differently; one thread each compares the kernels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    """As one writes it in torch: a weight gradient per sample, its absolute value or square, a sum."""
    if reduce == "signed":
        acc += g.flatten(0, 1).T @ x.flatten(0, 1)
    elif reduce == "token-square":
        acc += g.flatten(0, 1).square().T @ x.flatten(0, 1).square()
    else:
        for g_s, x_s in zip(g, x, strict=True):
            acc += REDUCE[reduce](g_s.T @ x_s)


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, str], object]] = {
    "sparc3": accumulate_weight_relevance_,
    "torch": plain,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("samples", "tokens", "n", "k"), SHAPES)
def test_weight_relevance(benchmark, samples, tokens, n, k, reduce, implementation):
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(samples, tokens, n, generator=generator)
    x = torch.randn(samples, tokens, k, generator=generator)
    acc = torch.zeros(n, k)
    benchmark.group = f"weight relevance, {reduce}, {samples} x {tokens} tokens, {n} x {k}"
    benchmark.extra_info |= {
        "impl": implementation,
        "bytes": 4 * (g.numel() + x.numel() + 2 * acc.numel()),
        "flops": 2 * samples * tokens * n * k,
    }
    run = IMPLEMENTATIONS[implementation]
    benchmark.pedantic(run, (acc, g, x, reduce), rounds=25, warmup_rounds=2)
