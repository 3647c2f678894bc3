"""The LRP backward of `attention`, its rule given as numbers.

With dO [B, T, H, D], P and s of the forward, P_t = softmax(s / t) for a softmax temperature t, and

    delta_i = sum_d O_id dO_id            (relevance of head h at token i)
    dP_ij   = dO_i . v_j
    ds_ij   = P_t,ij (dP_ij - sum_l P_t,il dP_il)   (times 1 - (s/c)^2 with a soft-cap c)

    dq_i = q_scale scale sum_j ds_ij k_j
    dk_j = k_scale scale sum_i ds_ij q_i          (summed over the query heads that share k)
    dv_j = v_scale sum_i P_ij dO_i                (likewise)

The plain gradient is scales of 1 and t = 1; AttnLRP 1/4, 1/4, 1/2 (Achtibat et al. 2024, arXiv 2402.05602); CP-LRP
takes dv alone. t = 2 is the temperature-adjusted gradient of GIM (Edin et al. 2025, arXiv 2505.17630), up to the
factor 1/t of that softmax, which belongs into q_scale and k_scale.

Triton: dk and dv in one kernel over blocks of keys, dq in `attention_query_gradient`, P recomputed from lse in both:
7 products for the gradient (on sm_90 8 for the widest heads), 2 for dv alone, no atomics, so the same bits always.
Where t is not 1 the forward runs once more at that temperature. Not yet measured on a GPU.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sparc3_kernels import triton_support as support
from sparc3_kernels.attention import attention_triton, check, scores_reference, unfit
from sparc3_kernels.attention_blocks import (
    block_width,
    last_contiguous,
    layout,
    load_block,
    score_block,
    sequence_of,
    sequences_of,
    switches,
)
from sparc3_kernels.attention_query_gradient import query_gradient_triton
from sparc3_kernels.backend import choose
from sparc3_kernels.triton_support import jit, tl

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]

# ---- reference


def attention_backward_reference(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, begin: Tensor | None,
    end: Tensor | None, scale: float, causal: bool, window: int, softcap: float,
    q_scale: float, k_scale: float, v_scale: float,
    temperature: float, need_qk: bool,
) -> Gradients:  # fmt: skip
    """(dq, dk, dv, delta) in plain torch, with all T x T scores in memory."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    dout = d_out.to(dtype).transpose(1, 2)
    s = scores_reference(q.to(dtype), k.to(dtype), begin, end, scale, causal, window, softcap)
    p = torch.exp(s - lse.to(dtype)[..., None])
    delta = (out.to(dtype).transpose(1, 2) * dout).sum(-1)
    dv = v_scale * (p.transpose(-1, -2) @ dout).unflatten(1, (-1, group)).sum(2)
    if not need_qk:
        return q.new_empty(0), k.new_empty(0), dv.to(v.dtype), delta
    if temperature != 1.0:
        lse = torch.logsumexp(s / temperature, -1, keepdim=True)
        p = torch.exp(s / temperature - torch.where(lse == -torch.inf, 0.0, lse))
    dp = dout @ v.to(dtype).repeat_interleave(group, 1).transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    if softcap:
        ds = ds * torch.where(s == -torch.inf, 0.0, 1.0 - (s / softcap).square())
    dq = q_scale * scale * (ds @ k.to(dtype).repeat_interleave(group, 1))
    dk = k_scale * scale * (ds.transpose(-1, -2) @ q.to(dtype)).unflatten(1, (-1, group)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), delta


# ---- Triton


@jit
def _delta_kernel(
    out_ptr, d_out_ptr, delta_ptr, tokens, heads, width, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    live = (i < tokens)[:, None] & (d < width)[None, :]
    place = ((batch * tokens + i) * heads + head)[:, None] * width + d[None, :]
    out = tl.load(out_ptr + place, mask=live, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + place, mask=live, other=0.0).to(tl.float32)
    delta_ptr += (batch * heads + head) * tokens
    tl.store(delta_ptr + i, tl.sum(out * d_out, axis=1), mask=i < tokens)


@jit
def _keys_against(
    dk, dv, k, v, q_ptr, d_out_ptr, lse_ptr, lse_t_ptr, delta_ptr, q_t, d_out_t, first, last, j, length, width,
    scale, softcap, window, temperature, NEED_K: tl.constexpr, NEED_V: tl.constexpr, TEMPERED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Keys j against the blocks of queries from `first` to `last`.

    Every block is masked: with loops of their own for the blocks that need no mask the kernel spills. Keys beyond
    the sequence need none, their gradients are not stored.
    """
    d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        # A query beyond the sequence has lse = inf and so P = 0; the row read in its place saves the masks.
        row = tl.minimum(i, length - 1)
        q = load_block(q_ptr, row, q_t, d, length, width, False, EVEN_D)
        d_out = load_block(d_out_ptr, row, d_out_t, d, length, width, False, EVEN_D)
        lse = tl.load(lse_ptr + i, mask=i < length, other=float("inf"))
        s = score_block(tl.dot(k, tl.trans(q)), scale, softcap, SOFTCAP)
        p = tl.exp2((s - lse[None, :]) * 1.4426950408889634)
        if CAUSAL:
            p = tl.where(i[None, :] >= j[:, None], p, 0.0)
        if WINDOW:
            p = tl.where(i[None, :] - j[:, None] < window, p, 0.0)
        if NEED_V:
            dv = tl.dot(p.to(d_out.dtype), d_out, dv)
        if NEED_K:
            delta = tl.load(delta_ptr + i, mask=i < length, other=0.0)
            if TEMPERED:
                lse_t = tl.load(lse_t_ptr + i, mask=i < length, other=float("inf"))
                p = tl.exp2((s / temperature - lse_t[None, :]) * 1.4426950408889634)
                if CAUSAL:
                    p = tl.where(i[None, :] >= j[:, None], p, 0.0)
                if WINDOW:
                    p = tl.where(i[None, :] - j[:, None] < window, p, 0.0)
            dp = tl.dot(v, tl.trans(d_out))
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds *= 1.0 - (s / softcap) * (s / softcap)
            dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@jit
def _key_value_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, lse_t_ptr, delta_ptr, dk_ptr, dv_ptr, begin_ptr, end_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, batch_step, tokens, heads, group, width,
    scale, softcap, window, temperature, k_factor, v_factor,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, TEMPERED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1).to(tl.int64)
    batch, begin, length = sequence_of(begin_ptr, end_ptr, batch_step, tokens)
    j, d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k = load_block(k_ptr + batch * k_b + kv_head * k_h + begin * k_t, j, k_t, d, length, width, True, EVEN_D)
    v = k
    if NEED_K:
        v = load_block(
            v_ptr + batch * v_b + kv_head * v_h + begin * v_t, j, v_t, d, length, width, True, EVEN_D
        )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first, last = 0, tl.where(start < length, length, 0)
    if CAUSAL:
        first = start // BLOCK_M * BLOCK_M
    if WINDOW:
        last = tl.minimum(last, start + BLOCK_N + window - 1)
    for member in range(0, group):
        head = kv_head * group + member
        place = (batch * heads + head) * tokens + begin
        dk, dv = _keys_against(
            dk, dv, k, v, q_ptr + batch * q_b + head * q_h + begin * q_t,
            d_out_ptr + ((batch * tokens + begin) * heads + head) * width,
            lse_ptr + place, lse_t_ptr + place, delta_ptr + place, q_t, heads * width, first, last, j, length, width,
            scale, softcap, window, temperature, NEED_K, NEED_V, TEMPERED, CAUSAL, WINDOW, SOFTCAP, BLOCK_M,
            BLOCK_D, EVEN_D,
        )  # fmt: skip
    kv_heads = heads // group
    place = ((batch * kv_heads + kv_head) * tokens + begin + j)[:, None] * width + d[None, :]
    live = (j < length)[:, None] & (d < width)[None, :]
    if NEED_V:
        tl.store(dv_ptr + place, (dv * v_factor).to(dv_ptr.dtype.element_ty), mask=live)
    if NEED_K:
        tl.store(dk_ptr + place, (dk * k_factor).to(dk_ptr.dtype.element_ty), mask=live)


def _configuration(width: int, need_qk: bool, softcap: bool, shared: int) -> tuple[dict[str, int], bool]:
    """Sizes of the kernel over keys, and whether dk and dv are found apart (one product more).

    None spills (tests/kernels/compile_gate.py). With wgmma, the accumulators of both for 256 channels do not fit the
    registers, nor do those for 128 beside a soft-cap and the masks of a narrower head; without it, neither do larger
    tiles.
    """
    large = shared > 200_000  # sm_90
    block_d = block_width(width)
    if block_d <= 64:
        if softcap:
            block_m = 16 if need_qk and not large else 32  # 32 spills beside the masks, in Triton 3.6
        else:
            block_m = 32 if need_qk and not large else 64
        block_n, warps, stages = 128, 8, 2
    elif large and need_qk and width < block_d <= 128:
        block_m, block_n, warps, stages = 32, 64, 8, 2  # 96 channels with masks, in Triton 3.6
    elif block_d <= 128:
        block_m, block_n, warps, stages = (32, 128, 8, 2) if large or not need_qk else (64, 64, 8, 1)
    elif large:
        block_m, block_n, warps, stages = 32, 64, 8, 2
    else:
        block_m, block_n, warps, stages = 32, 32 if need_qk else 64, 8, 1
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    return sizes, large and (block_d > 128 or (softcap and 64 < width < 128))


def _delta_triton(out: Tensor, d_out: Tensor) -> Tensor:
    """delta [B, H, T] of contiguous [B, T, H, D]."""
    batch, tokens, heads, width = out.shape
    delta = torch.empty(batch, heads, tokens, dtype=torch.float32, device=out.device)
    support.launch(
        _delta_kernel, (support.ceil_div(tokens, 32), heads, batch), out, d_out, delta, tokens, heads, width,
        BLOCK_M=32, BLOCK_D=block_width(width), num_warps=4,
    )  # fmt: skip
    return delta


def attention_backward_triton(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, begin: Tensor | None,
    end: Tensor | None, scale: float, causal: bool, window: int, softcap: float,
    q_scale: float, k_scale: float, v_scale: float,
    temperature: float, need_qk: bool,
) -> Gradients:  # fmt: skip
    """(dq, dk, dv, delta); dq and dk empty without need_qk."""
    tokens, width = q.shape[2:]
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    d_out, out = d_out.contiguous(), out.contiguous()
    delta = _delta_triton(out, d_out)
    lse_t, delta_t, tempered = lse, delta, need_qk and temperature != 1.0
    if tempered:
        # c tanh(s / c) / t is a soft-cap of c / t on s / t.
        softer = (scale / temperature, causal, window, softcap / temperature)
        out_t, lse_t = attention_triton(q, k, v, begin, end, *softer)
        delta_t = _delta_triton(out_t, d_out)
    fresh = torch.empty_like if begin is None else torch.zeros_like
    dv = fresh(v, memory_format=torch.contiguous_format)
    dk = fresh(k, memory_format=torch.contiguous_format) if need_qk else k.new_empty(0)
    sizes, apart = _configuration(width, need_qk, softcap > 0, support.chip(q.device)[1])
    for need_k, need_v in ((True, False), (False, True)) if apart and need_qk else ((need_qk, True),):
        support.launch(
            _key_value_kernel,
            (support.ceil_div(tokens, sizes["BLOCK_N"]), k.shape[1], sequences_of(q, begin)),
            *(q, k, v, d_out, lse, lse_t, delta_t, dk, dv, begin, end, *layout(q, k, v, begin)),
            *(scale, softcap, window, temperature, k_scale * scale, v_scale),
            NEED_K=need_k, NEED_V=need_v, TEMPERED=tempered and need_k,
            **switches(width, causal, window, softcap), **sizes,
        )  # fmt: skip
    if not need_qk:
        return q.new_empty(0), dk, dv, delta
    dq = query_gradient_triton(
        *(q, k, v, d_out, lse_t, delta_t, begin, end, scale, causal, window, softcap, temperature),
        q_scale * scale,
    )
    return dq, dk, dv, delta


# ---- op

torch.library.define(
    "sparc3::attention_backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? begin, Tensor? end, float scale, "
    "bool causal, int window, float softcap, float q_scale, float k_scale, float v_scale, float temperature, "
    "bool need_qk) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("sparc3::attention_backward", "default")
def _attention_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Gradients:
    in_triton = choose("attention_backward", {"triton": unfit(q, k, v, d_out)}) == "triton"
    run = attention_backward_triton if in_triton else attention_backward_reference
    return run(d_out, q, k, v, *others)


@torch.library.register_fake("sparc3::attention_backward")
def _attention_backward_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *others: Any
) -> Gradients:
    need_qk = others[-1]
    dq, dk = (x.new_empty(x.shape) if need_qk else x.new_empty(0) for x in (q, k))
    return dq, dk, v.new_empty(v.shape), lse.new_empty(lse.shape)


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    begin: Tensor | None = None,
    end: Tensor | None = None,
    q_scale: float = 1.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    softmax_temperature: float = 1.0,
    need_qk: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients (or relevances over values) of attention's inputs, by the numbers of a rule.

    Args:
        d_out, out: [B, T, H, D] gradient of the output, and the output.
        q, k, v, scale, causal, window, softcap, begin, end: as `attention` was called with.
        lse: [B, H, T] as `attention` returned it.
        q_scale, k_scale, v_scale: factors on the three gradients.
        softmax_temperature: t of the module's formula.
        need_qk: False leaves dq and dk out, and with them five of the seven products.

    Returns:
        (dq [B, H, T, D], dk [B, H_kv, T, D], dv [B, H_kv, T, D], head relevance sum_d O dO [B, H, T] in fp32); dq and
        dk are None without `need_qk`.

    Raises:
        ValueError: shapes, dtypes or settings that do not fit together.
    """
    check(q, k, v, causal, window, softcap, begin, end)
    if softmax_temperature <= 0:
        raise ValueError(f"softmax_temperature must be positive, got {softmax_temperature}")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    dq, dk, dv, delta = torch.ops.sparc3.attention_backward(
        *(d_out, q, k, v, out, lse, begin, end, scale, causal, window, softcap),
        *(q_scale, k_scale, v_scale, softmax_temperature, need_qk),
    )
    return (dq, dk, dv, delta) if need_qk else (None, None, dv, delta)
