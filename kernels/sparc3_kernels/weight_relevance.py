"""Relevance (or gradient) of every weight of a linear layer, accumulated over samples without a `.grad`.

For y = x W^T with S samples of T tokens, inputs X_s [T, K] and output relevances (or gradients) G_s [T, N],
the weight gradient of sample s is G_s^T X_s [N, K]. `accumulate_weight_relevance_` adds to acc [N, K], in
fp32,

    signed        sum_s G_s^T X_s
    abs           sum_s |G_s^T X_s|
    square        sum_s (G_s^T X_s)^2
    token-square  sum_s (G_s * G_s)^T (X_s * X_s)        (every token its own sample)

W is not needed: |W * g| = |W| |g|, so the caller multiplies by W, |W| or W^2 once at the end.
"""

import torch
from torch import Tensor

REDUCTIONS = ("signed", "abs", "square", "token-square")


def accumulate_weight_relevance_reference(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    """Plain torch, in acc's dtype (float64 included); takes S * N * K elements of memory."""
    g, x = g.to(acc.dtype), x.to(acc.dtype)
    if reduce == "token-square":
        g, x = g.square(), x.square()
    per_sample = torch.einsum("stn,stk->snk", g, x)
    if reduce == "abs":
        per_sample = per_sample.abs()
    elif reduce == "square":
        per_sample = per_sample.square()
    acc += per_sample.sum(0)


def accumulate_weight_relevance_(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> Tensor:
    """Add the relevance of S samples to `acc` in place and return it.

    Args:
        acc: [N, K] fp32 (fp64 on the reference backend).
        g: [S, T, N] relevance or gradient of the layer's output; fp32, bf16 or fp16.
        x: [S, T, K] the layer's input, same dtype and device as `g`.
        reduce: one of `REDUCTIONS`.

    Raises:
        ValueError: unknown `reduce`, or shapes, dtypes or devices that do not fit together.
    """
    _check(acc, g, x, reduce)
    with torch.no_grad():
        accumulate_weight_relevance_reference(acc, g, x, reduce)
    return acc


def _check(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if (
        acc.dim() != 2
        or g.dim() != 3
        or x.dim() != 3
        or ((*g.shape[:2], *acc.shape) != (*x.shape[:2], g.shape[2], x.shape[2]))
    ):
        raise ValueError(
            "shapes must be acc [N, K], g [S, T, N], x [S, T, K], "
            f"got {tuple(acc.shape)}, {tuple(g.shape)}, {tuple(x.shape)}"
        )
    if g.dtype != x.dtype or not g.is_floating_point() or acc.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"g and x must share a float dtype and acc be fp32, got {g.dtype}, {x.dtype}, {acc.dtype}"
        )
    if not acc.device == g.device == x.device:
        raise ValueError(f"acc, g and x must share a device, got {acc.device}, {g.device}, {x.device}")
