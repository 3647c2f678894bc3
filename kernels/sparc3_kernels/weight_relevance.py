"""Relevance (or gradient) of every weight of a linear layer, accumulated over samples without a `.grad`.

For y = x W^T with S samples of T tokens, inputs X_s [T, K] and output relevances (or gradients) G_s [T, N],
the weight gradient of sample s is G_s^T X_s [N, K]. `accumulate_weight_relevance_` adds to acc [N, K], in
fp32,

    signed        sum_s G_s^T X_s
    abs           sum_s |G_s^T X_s|
    square        sum_s (G_s^T X_s)^2
    token-square  sum_s (G_s * G_s)^T (X_s * X_s)        (every token its own sample)

W is not needed: |W * g| = |W| |g|, so the caller multiplies by W, |W| or W^2 once at the end.

signed and token-square are one GEMM over all tokens. abs and square need the sum of each sample by itself: the CPU
library keeps a register tile per sample and reads and writes acc once per 256 tokens, up to `NATIVE_TOKENS` tokens
a sample. Above that a GEMM per sample into a buffer is faster (one core of a Xeon with AVX-512, GFLOP/s, 2048 x
2048: 199 against 157 for the GEMM at 128 tokens, 186 against 182 at 256, 164 against 192 at 512).
"""

import torch
from torch import Tensor

from sparc3_kernels import native
from sparc3_kernels.backend import choose

REDUCTIONS = ("signed", "abs", "square", "token-square")
NATIVE_TOKENS = 384
# Elements of the GEMM's result held at a time: 4 MB in fp32 on a CPU; a GPU needs more to fill it.
_BUFFER_CPU, _BUFFER_GPU = 1 << 20, 1 << 24


def accumulate_weight_relevance_reference(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    """Plain torch in acc's dtype (fp64 included): one GEMM, or one per sample through a bounded buffer."""
    if reduce in ("signed", "token-square"):
        g, x = (a.to(acc.dtype).flatten(0, 1) for a in (g, x))
        if reduce == "token-square":
            g, x = g.square(), x.square()
        acc.addmm_(g.T, x)
        return
    rows = max(1, (_BUFFER_CPU if acc.device.type == "cpu" else _BUFFER_GPU) // max(1, acc.shape[1]))
    buffer = acc.new_empty(min(rows, acc.shape[0]), acc.shape[1])
    for g_s, x_s in zip(g, x, strict=True):
        g_s, x_s = g_s.to(acc.dtype), x_s.to(acc.dtype)
        for part, g_part in zip(acc.split(rows), g_s.split(rows, dim=1), strict=True):
            product = torch.mm(g_part.T, x_s, out=buffer[: part.shape[0]])
            part.add_(product.abs_() if reduce == "abs" else product.square_())


torch.library.define(
    "sparc3::accumulate_weight_relevance_", "(Tensor(a!) acc, Tensor g, Tensor x, str reduce) -> ()"
)


@torch.library.impl("sparc3::accumulate_weight_relevance_", "default")
def _accumulate(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    chosen = choose("accumulate_weight_relevance_", {"cpu": _unfit(acc, g)})
    if chosen == "cpu" and reduce in native.REDUCTIONS and g.shape[1] <= NATIVE_TOKENS:
        _accumulate_native(acc, g.contiguous(), x.contiguous(), reduce)
    else:
        accumulate_weight_relevance_reference(acc, g, x, reduce)


def _accumulate_native(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    library, threads = native.library(), torch.get_num_threads()
    samples, tokens, n, k = (*g.shape, x.shape[2])
    work = native.workspace(library.sparc3_weight_relevance_workspace_size(samples, tokens, n, k, threads))
    native.check(
        library.sparc3_weight_relevance(
            *(native.DTYPES[g.dtype], native.REDUCTIONS[reduce], g.data_ptr(), x.data_ptr()),
            *(samples, tokens, n, k, acc.data_ptr(), threads, work.data_ptr(), work.numel()),
        )
    )


def _unfit(acc: Tensor, g: Tensor) -> str | None:
    if acc.device.type != "cpu":
        return f"the tensors are on {acc.device}"
    if g.dtype not in native.DTYPES or acc.dtype != torch.float32:
        return f"it takes an fp32 acc and fp32, bf16 or fp16 operands, not {acc.dtype} and {g.dtype}"
    return None if acc.is_contiguous() else "acc is not contiguous"


@torch.library.register_fake("sparc3::accumulate_weight_relevance_")
def _fake(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    return None


def accumulate_weight_relevance_(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> Tensor:
    """Add the relevance of S samples to `acc` in place and return it.

    Takes no memory of the size of N * K (a few MB, and fp32 copies of 16-bit operands where a GEMM runs).

    Args:
        acc: [N, K] fp32 (fp64 on the reference backend).
        g: [S, T, N] relevance or gradient of the layer's output; fp32, bf16 or fp16, summed up in fp32.
        x: [S, T, K] the layer's input, same dtype and device as `g`.
        reduce: one of `REDUCTIONS`.

    Raises:
        ValueError: unknown `reduce`, or shapes, dtypes or devices that do not fit together.
    """
    _check(acc, g, x, reduce)
    with torch.no_grad():
        torch.ops.sparc3.accumulate_weight_relevance_(acc, g, x, reduce)
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
