"""What the compile gate compiles: every op, through its launcher, at shapes that reach each configuration."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sparc3_kernels import (
    attention,
    attention_backward,
    gated_mlp,
    lm_head,
    norm,
    weight_relevance,
    weight_score,
)
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


@dataclass(frozen=True)
class Case:
    """One launcher and one shape; `run(dtype)` calls the launcher on meta tensors.

    Only with --all, where a neighbour is tighter: `rarely`.
    """

    name: str
    run: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    matrix_product: bool = False
    rarely: bool = False


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _norms() -> list[Case]:
    cases = []
    # One width a block size: heads, 135M, GPT-2, 2B, 8B, 70B, and the widest.
    for width in (64, 512, 768, 2048, 4096, 8192, 16384):

        def forward(dtype: torch.dtype, width: int = width) -> None:
            x, weight = meta(4096, width, dtype=dtype), meta(width, dtype=dtype)
            norm._norm_triton(x, None, weight, None, 1e-6, 1.0, False)
            norm._norm_triton(x, x, weight, None, 1e-6, 1.0, False)
            norm._norm_triton(x, x, weight, weight, 1e-5, 0.0, True)

        def backward(dtype: torch.dtype, width: int = width) -> None:
            x, weight = meta(4096, width, dtype=dtype), meta(width, dtype=dtype)
            scale = meta(4096, dtype=torch.float32)
            for share in (0.0, 1.0):
                norm._norm_backward_triton(x, x, weight, scale, 1e-6, 1.0, share, False)
                norm._norm_backward_triton(x, x, weight, scale, 1e-5, 0.0, share, True)

        rarely = width in (512, 768, 2048, 8192)
        cases += [
            Case(f"norm {width}", forward, rarely=rarely),
            Case(f"norm backward {width}", backward, rarely=rarely),
        ]
    return cases


def _gated_mlp() -> list[Case]:
    cases = []
    for name in gated_mlp.RATIO:

        def run(dtype: torch.dtype, name: str = name) -> None:
            x = meta(2048, 11008, dtype=dtype)
            gated_mlp._gated_product_triton(x, x, name)
            for identity in (True, False):
                gated_mlp._activation_backward_triton(x, x, name, identity)
                gated_mlp._gated_product_backward_triton(x, x, x, name, identity, 0.5, 0.5)

        cases.append(Case(f"gated MLP {name}", run, rarely=name not in ("gelu", "gelu_tanh")))
    return cases


def _weight_relevance() -> list[Case]:
    cases = []
    for reduce in weight_relevance.REDUCTIONS:

        def run(dtype: torch.dtype, reduce: str = reduce) -> None:
            acc, g, x = (
                meta(4096, 11008, dtype=torch.float32),
                meta(2048, 4096, dtype=dtype),
                meta(2048, 11008, dtype=dtype),
            )
            bounds = torch.empty(17, dtype=torch.int32, device="meta")
            weight_relevance._accumulate_triton(acc, g, x, reduce, bounds)

        rarely = reduce in ("signed", "square")
        cases.append(Case(f"weight relevance {reduce}", run, matrix_product=True, rarely=rarely))
    return cases


def _weight_score() -> list[Case]:
    cases = []
    for reduce in weight_relevance.REDUCTIONS:

        def run(dtype: torch.dtype, reduce: str = reduce) -> None:
            acc, weight = meta(4096, 11008, dtype=torch.float32), meta(4096, 11008, dtype=dtype)
            weight_score._weight_scores_triton_(acc, weight, reduce)
            weight_score._compress_24_triton(acc, weight, reduce)
            for m in (2, 4, 8, 16):
                weight_score._choose_nm_triton(acc, weight, reduce, m // 2, m)

        cases.append(Case(f"weight score {reduce}", run, rarely=reduce != "abs"))
    return cases


# name: causal, window, softcap, sequences by begin and end, temperature, need_qk, and whether a neighbour is tighter
_ATTENTIONS = {
    "causal": (True, 0, 0.0, False, 1.0, True, False),
    "causal, values only": (True, 0, 0.0, False, 1.0, False, False),
    "causal, padded": (True, 0, 0.0, True, 1.0, True, True),
    "window, padded": (True, 1024, 0.0, True, 1.0, True, True),
    "window, soft-cap, padded": (True, 1024, 50.0, True, 1.0, True, False),
    "soft-cap": (True, 0, 50.0, False, 1.0, True, True),
    "values only, window, soft-cap": (True, 1024, 50.0, True, 1.0, False, True),
    "temperature": (True, 0, 0.0, False, 2.0, True, True),
    "temperature, soft-cap, window": (True, 1024, 50.0, True, 2.0, True, True),
    "full": (False, 0, 0.0, False, 1.0, True, True),
}


def _attention() -> list[Case]:
    cases = []
    for name, (causal, window, softcap, sequences, temperature, need_qk, rarely) in _ATTENTIONS.items():
        for width in (64, 96, 80, 128, 256):  # 80 gives the binaries of 96, each compiled once

            def run(
                dtype: torch.dtype,
                settings: tuple = (causal, window, softcap),
                sequences: bool = sequences,
                last: tuple = (temperature, need_qk),
                width: int = width,
            ) -> None:
                q, k = meta(2, 32, 2048, width, dtype=dtype), meta(2, 8, 2048, width, dtype=dtype)
                out, lse = meta(2, 2048, 32, width, dtype=dtype), meta(2, 32, 2048, dtype=torch.float32)
                bound = meta(2, dtype=torch.int32) if sequences else None
                attention.attention_triton(q, k, k, bound, bound, 0.1, *settings)
                attention_backward.attention_backward_triton(
                    out, q, k, k, out, lse, bound, bound, 0.1, *settings, 0.25, 0.25, 0.5, *last
                )

            skip = rarely or width == 64
            cases.append(Case(f"attention {width} {name}", run, HALVES, matrix_product=True, rarely=skip))
    return cases


def _lm_head() -> list[Case]:
    def run(dtype: torch.dtype) -> None:
        z, labels = meta(256, 262144, dtype=dtype), meta(256, dtype=torch.int64)
        for target in lm_head.TARGETS:
            lm_head._logits_gradient_triton_(z, labels, target, 0.0)
        lm_head._logits_gradient_triton_(z, labels, "logprob", 30.0)

    return [Case("LM head", run)]


CASES: list[Case] = [
    *_norms(),
    *_gated_mlp(),
    *_weight_relevance(),
    *_weight_score(),
    *_attention(),
    *_lm_head(),
]
