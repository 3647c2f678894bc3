"""Relevance (or gradient) of every weight of a linear layer, accumulated over samples without a `.grad`.

For y = x W^T with S samples of T tokens, inputs X_s [T, K] and output relevances (or gradients) G_s [T, N],
the weight gradient of sample s is G_s^T X_s [N, K]. `accumulate_weight_relevance_` adds to acc [N, K], in
fp32,

    signed        sum_s G_s^T X_s
    abs           sum_s |G_s^T X_s|
    square        sum_s (G_s^T X_s)^2
    token-square  sum_s (G_s * G_s)^T (X_s * X_s)        (every token its own sample)

W is not needed: |W * g| = |W| |g|, so the caller multiplies by W, |W| or W^2 once at the end.

signed and token-square are one GEMM over all tokens. The CPU library multiplies squares that it forms while it packs
its operands; `make bench` times it beside torch. Where the CPU multiplies bf16 faster, squares of bf16 operands are
rounded to bf16 once more and torch multiplies them. abs and square need the sum of each sample by itself: the library
keeps a register tile per sample and reads and writes acc once per 256 tokens, up to `NATIVE_TOKENS` tokens a sample.
Above that a GEMM per sample into a buffer is faster (one core of a Xeon with AVX-512, GFLOP/s, 2048 x 2048: 199
against 157 for the GEMM at 128 tokens, 186 against 182 at 256, 164 against 192 at 512).

Triton: one program a tile of acc, the loop over samples inside it, so that no product of a sample reaches memory
and acc is read and written once a launch. 16-bit operands go to the tensor cores as they are (from sm_90 on through
TMA), fp32 ones as three TF32 products; squares of tokens are formed in fp32 and multiplied in TF32 (three products
for fp32 operands). Not yet measured on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from sparc3_kernels import native
from sparc3_kernels import triton_support as support
from sparc3_kernels.backend import choose, multiplies_bf16
from sparc3_kernels.triton_support import jit, tl

REDUCTIONS = ("signed", "abs", "square", "token-square")
NATIVE_TOKENS = 384
# Elements of the GEMM's result held at a time: 4 MB in fp32 on a CPU; a GPU needs more to fill it.
_BUFFER_CPU, _BUFFER_GPU = 1 << 20, 1 << 24


def accumulate_weight_relevance_reference(
    acc: Tensor, g: Tensor, x: Tensor, reduce: str, cu_seqlens: Tensor | None = None
) -> None:
    """Plain torch in acc's dtype (fp64 included): one GEMM, or one per sample through a bounded buffer."""
    if reduce in ("signed", "token-square"):
        g, x = (a.to(acc.dtype).reshape(-1, a.shape[-1]) for a in (g, x))
        if reduce == "token-square":
            g, x = g.square(), x.square()
        acc.addmm_(g.T, x)
        return
    rows = max(1, (_BUFFER_CPU if acc.device.type == "cpu" else _BUFFER_GPU) // max(1, acc.shape[1]))
    buffer = acc.new_empty(min(rows, acc.shape[0]), acc.shape[1])
    for g_s, x_s in zip(_samples(g, cu_seqlens), _samples(x, cu_seqlens), strict=True):
        g_s, x_s = g_s.to(acc.dtype), x_s.to(acc.dtype)
        for part, g_part in zip(acc.split(rows), g_s.split(rows, dim=1), strict=True):
            product = torch.mm(g_part.T, x_s, out=buffer[: part.shape[0]])
            part.add_(product.abs_() if reduce == "abs" else product.square_())


def _samples(tokens: Tensor, cu_seqlens: Tensor | None) -> Any:
    """The samples of [S, T, N], or of [tokens, N] packed."""
    if cu_seqlens is None:
        return tokens
    return tokens.split(cu_seqlens.diff().tolist())


# ---- Triton


@jit
def _weight_relevance_kernel(
    acc_ptr, g, x, cu_seqlens_ptr, samples, length, N, K, acc_row, acc_column, g_stride, x_stride,
    REDUCE: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # GROUP tiles along N run beside each other, so that they share their part of x in L2.
    tile = tl.program_id(0)
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    first = tile // (GROUP * tiles_k) * GROUP
    inside = tile % (GROUP * tiles_k)
    beside = min(tiles_n - first, GROUP)
    n_start, k_start = (first + inside % beside) * BLOCK_N, inside // beside * BLOCK_K
    n, k = n_start + tl.arange(0, BLOCK_N), k_start + tl.arange(0, BLOCK_K)
    row = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for sample in range(samples):
        if cu_seqlens_ptr is not None:
            begin, end = tl.load(cu_seqlens_ptr + sample), tl.load(cu_seqlens_ptr + sample + 1)
        else:
            begin, end = sample * length, (sample + 1) * length
        product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        # A descriptor reads past the sample: its last, ragged block is masked by itself, so that the others go from
        # shared memory to the tensor cores without passing through registers.
        whole = begin + (end - begin) // BLOCK_T * BLOCK_T if DESCRIPTOR else end
        for t in range(begin, whole, BLOCK_T):
            if DESCRIPTOR:
                g_tile, x_tile = g.load([t, n_start]), x.load([t, k_start])
            else:
                live = (t + row < end)[:, None]
                g_at = g + tl.cast(t, tl.int64) * g_stride + row[:, None] * g_stride + n[None, :]
                x_at = x + tl.cast(t, tl.int64) * x_stride + row[:, None] * x_stride + k[None, :]
                g_tile = tl.load(g_at, mask=live & (n < N)[None, :], other=0.0)
                x_tile = tl.load(x_at, mask=live & (k < K)[None, :], other=0.0)
            if REDUCE == "token-square":
                g_tile, x_tile = g_tile.to(tl.float32), x_tile.to(tl.float32)
                g_tile, x_tile = g_tile * g_tile, x_tile * x_tile
            product = tl.dot(tl.trans(g_tile), x_tile, product, input_precision=PRECISION)
        if DESCRIPTOR:
            if whole < end:
                live = (whole + row < end)[:, None]
                g_tile = tl.where(live, g.load([whole, n_start]), 0.0)
                x_tile = tl.where(live, x.load([whole, k_start]), 0.0)
                if REDUCE == "token-square":
                    g_tile, x_tile = g_tile.to(tl.float32), x_tile.to(tl.float32)
                    g_tile, x_tile = g_tile * g_tile, x_tile * x_tile
                product = tl.dot(tl.trans(g_tile), x_tile, product, input_precision=PRECISION)
        if REDUCE == "abs":
            total += tl.abs(product)
        elif REDUCE == "square":
            total += product * product
        else:
            total += product
    place = acc_ptr + n.to(tl.int64)[:, None] * acc_row + k.to(tl.int64)[None, :] * acc_column
    inside_acc = (n < N)[:, None] & (k < K)[None, :]
    tl.store(place, tl.load(place, mask=inside_acc, other=0.0) + total, mask=inside_acc)


def _accumulate_triton(acc: Tensor, g: Tensor, x: Tensor, reduce: str, cu_seqlens: Tensor | None) -> None:
    samples, length = 1, g.numel() // g.shape[-1]
    if reduce not in ("abs", "square"):
        cu_seqlens = None  # one sum over all tokens
    elif cu_seqlens is None:
        samples, length = g.shape[:2]
    else:
        samples, cu_seqlens = len(cu_seqlens) - 1, cu_seqlens.to(torch.int32)
    g, x = (a.reshape(-1, a.shape[-1]).contiguous() for a in (g, x))
    (n, k), wide = acc.shape, g.dtype == torch.float32
    capability, shared = support.chip(acc.device)
    precision = "tf32x3" if wide else "tf32"
    # The two fp32 accumulators take half of the registers; fp32 operands fill the rest, so their tiles are smaller.
    block_t, block_n, block_k = (32, 64, 64) if wide else (64, 128, 128)
    if reduce == "token-square":
        block_t = 32  # squares are fp32 in shared memory
    aligned = all(a.stride(0) * a.element_size() % 16 == 0 and a.data_ptr() % 16 == 0 for a in (g, x))
    descriptor = capability >= 90 and aligned and not wide
    # Four stages are 131,104 bytes; without TMA a fourth costs registers that are not there.
    stages = 2 if wide else 4 if descriptor and shared > 131_104 else 3
    operands: tuple[Any, Any] = (g, x)
    if descriptor:
        operands = (
            support.TensorDescriptor(g, list(g.shape), list(g.stride()), [block_t, block_n]),
            support.TensorDescriptor(x, list(x.shape), list(x.stride()), [block_t, block_k]),
        )
    support.launch(
        _weight_relevance_kernel, (support.ceil_div(n, block_n) * support.ceil_div(k, block_k),),
        *(acc, *operands, cu_seqlens, samples, length, n, k, *acc.stride(), g.stride(0), x.stride(0)),
        REDUCE=reduce, DESCRIPTOR=descriptor, PRECISION=precision, BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=block_k,
        GROUP=8, num_warps=8, num_stages=stages,
    )  # fmt: skip


# ---- native


def _accumulate_native(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    library, threads = native.library(), torch.get_num_threads()
    samples, n, k = len(g), g.shape[-1], x.shape[-1]
    tokens = g[0].numel() // n
    work = native.workspace(library.sparc3_weight_relevance_workspace_size(samples, tokens, n, k, threads))
    native.check(
        library.sparc3_weight_relevance(
            *(native.DTYPES[g.dtype], native.REDUCTIONS[reduce], g.data_ptr(), x.data_ptr()),
            *(samples, tokens, n, k, acc.data_ptr(), threads, work.data_ptr(), work.numel()),
        )
    )


def _accumulate_bf16(acc: Tensor, g: Tensor, x: Tensor) -> None:
    """token-square of bf16 operands."""
    g, x = (a.reshape(-1, a.shape[-1]).square() for a in (g, x))
    rows = max(1, _BUFFER_CPU // max(1, acc.shape[1]))
    for part, g_part in zip(acc.split(rows), g.split(rows, dim=1), strict=True):
        part.add_(torch.mm(g_part.T, x))


# ---- op

torch.library.define(
    "sparc3::accumulate_weight_relevance_",
    "(Tensor(a!) acc, Tensor g, Tensor x, str reduce, Tensor? cu_seqlens=None) -> ()",
)


@torch.library.impl("sparc3::accumulate_weight_relevance_", "default")
def _accumulate(acc: Tensor, g: Tensor, x: Tensor, reduce: str, cu_seqlens: Tensor | None = None) -> None:
    fits = {"triton": _unfit_triton(acc, g, x), "cpu": _unfit(acc, g)}
    chosen = choose("accumulate_weight_relevance_", fits)
    if not (acc.numel() and g.numel()):
        return
    if chosen == "triton":
        _accumulate_triton(acc, g, x, reduce, cu_seqlens)
    elif chosen == "cpu" and _as_bf16(g, reduce):
        _accumulate_bf16(acc, g, x)
    elif chosen == "cpu" and _in_library(g, reduce, cu_seqlens):
        _accumulate_native(acc, g.contiguous(), x.contiguous(), reduce)
    else:
        accumulate_weight_relevance_reference(acc, g, x, reduce, cu_seqlens)


def _in_library(g: Tensor, reduce: str, cu_seqlens: Tensor | None) -> bool:
    if reduce == "token-square":
        return True
    return cu_seqlens is None and reduce in native.REDUCTIONS and g.shape[1] <= NATIVE_TOKENS


def _as_bf16(g: Tensor, reduce: str) -> bool:
    return reduce == "token-square" and g.dtype == torch.bfloat16 and multiplies_bf16(g.device)


def _unfit_triton(acc: Tensor, g: Tensor, x: Tensor) -> str | None:
    if acc.dtype != torch.float32:
        return f"it takes an fp32 acc, not {acc.dtype}"
    return support.unfit(acc, g, x)


def _unfit(acc: Tensor, g: Tensor) -> str | None:
    if acc.device.type != "cpu":
        return f"the tensors are on {acc.device}"
    if g.dtype not in native.DTYPES or acc.dtype != torch.float32:
        return f"it takes an fp32 acc and fp32, bf16 or fp16 operands, not {acc.dtype} and {g.dtype}"
    return None if acc.is_contiguous() else "acc is not contiguous"


@torch.library.register_fake("sparc3::accumulate_weight_relevance_")
def _fake(acc: Tensor, g: Tensor, x: Tensor, reduce: str, cu_seqlens: Tensor | None = None) -> None:
    return None


def accumulate_weight_relevance_(
    acc: Tensor, g: Tensor, x: Tensor, reduce: str, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Add the relevance of S samples to `acc` in place and return it.

    Takes no memory of the size of N * K (a few MB, and fp32 copies of 16-bit operands where a GEMM runs).

    Args:
        acc: [N, K] fp32 (fp64 on the reference backend).
        g: [S, T, N] relevance or gradient of the layer's output; fp32, bf16 or fp16, summed up in fp32 (token-square
            of bf16 on a CPU that multiplies bf16: in fp32 over the call's tokens, whose sum is rounded to bf16).
        x: [S, T, K] the layer's input, same dtype and device as `g`.
        reduce: one of `REDUCTIONS`.
        cu_seqlens: [S + 1] int32 or int64, ascending from 0 to the number of tokens, on `g`'s device: the samples are
            packed, sample s being rows cu_seqlens[s] to cu_seqlens[s + 1] of g [tokens, N] and x [tokens, K].

    Raises:
        ValueError: unknown `reduce`, or shapes, dtypes or devices that do not fit together.
    """
    _check(acc, g, x, reduce, cu_seqlens)
    with torch.no_grad():
        torch.ops.sparc3.accumulate_weight_relevance_(acc, g, x, reduce, cu_seqlens)
    return acc


def _check(acc: Tensor, g: Tensor, x: Tensor, reduce: str, cu_seqlens: Tensor | None) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    packed = cu_seqlens is not None
    dimensions, expected = (2, "g [tokens, N], x [tokens, K]") if packed else (3, "g [S, T, N], x [S, T, K]")
    if (
        acc.dim() != 2
        or g.dim() != dimensions
        or x.dim() != dimensions
        or ((*g.shape[:-1], *acc.shape) != (*x.shape[:-1], g.shape[-1], x.shape[-1]))
    ):
        raise ValueError(
            f"shapes must be acc [N, K], {expected}, "
            f"got {tuple(acc.shape)}, {tuple(g.shape)}, {tuple(x.shape)}"
        )
    if cu_seqlens is not None and (
        cu_seqlens.dim() != 1
        or not len(cu_seqlens)
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.device != g.device
    ):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [S + 1] on {g.device}, "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if g.dtype != x.dtype or not g.is_floating_point() or acc.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"g and x must share a float dtype and acc be fp32, got {g.dtype}, {x.dtype}, {acc.dtype}"
        )
    if not acc.device == g.device == x.device:
        raise ValueError(f"acc, g and x must share a device, got {acc.device}, {g.device}, {x.device}")
