"""dq of `attention_backward`, in a kernel of its own: ds is recomputed, so that nothing is added up atomically.

    dq_i = factor sum_j ds_ij k_j,   ds_ij = P_ij (dO_i . v_j - delta_i)   (times 1 - (s/c)^2 with a soft-cap c)

with P = exp(s / t - lse) for a softmax temperature t, and s as in `attention`. One program a block of queries and
head, blocks of keys in a loop: 3 products. Not yet measured on a GPU.
"""

import torch
from torch import Tensor

from sparc3_kernels import triton_support as support
from sparc3_kernels.attention_blocks import (
    keys_of,
    layout,
    load_block,
    score_block,
    seen_block,
    sequence_of,
    sequences_of,
    switches,
)
from sparc3_kernels.triton_support import jit, tl


@jit
def _queries_against(
    dq, q, d_out, lse, delta, k_ptr, v_ptr, k_t, v_t, first, last, i, length, width, scale, softcap, window,
    temperature, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Queries i against the blocks of keys from `first` to `last`."""
    d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_block(k_ptr, j, k_t, d, length, width, MASKED, EVEN_D)
        v = load_block(v_ptr, j, v_t, d, length, width, MASKED, EVEN_D)
        s = score_block(tl.dot(q, tl.trans(k)), scale, softcap, SOFTCAP)
        p = tl.exp2((s / temperature - lse[:, None]) * 1.4426950408889634)
        if MASKED:
            p = tl.where(seen_block(i[:, None], j[None, :], length, window, CAUSAL, WINDOW), p, 0.0)
        dp = tl.dot(d_out, tl.trans(v))
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= 1.0 - (s / softcap) * (s / softcap)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@jit
def _query_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, begin_ptr, end_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, batch_step, tokens, heads, group, width,
    scale, softcap, window, temperature, q_factor,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    # The last block of a causal sequence has the most keys: start with it.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch, begin, length = sequence_of(begin_ptr, end_ptr, batch_step, tokens)
    i, d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    k_ptr += batch * k_b + (head // group) * k_h + begin * k_t
    v_ptr += batch * v_b + (head // group) * v_h + begin * v_t
    q = load_block(q_ptr + batch * q_b + head * q_h + begin * q_t, i, q_t, d, length, width, True, EVEN_D)
    row = (batch * tokens + begin) * heads + head
    d_out = load_block(d_out_ptr + row * width, i, heads * width, d, length, width, True, EVEN_D)
    place = (batch * heads + head) * tokens + begin
    lse = tl.load(lse_ptr + place + i, mask=i < length, other=float("inf"))
    delta = tl.load(delta_ptr + place + i, mask=i < length, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, whole, last = keys_of(start, length, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if not WINDOW:
        dq = _queries_against(
            dq, q, d_out, lse, delta, k_ptr, v_ptr, k_t, v_t, first, whole, i, length, width, scale, softcap, window,
            temperature, CAUSAL, WINDOW, SOFTCAP, False, BLOCK_N, BLOCK_D, EVEN_D,
        )  # fmt: skip
    dq = _queries_against(
        dq, q, d_out, lse, delta, k_ptr, v_ptr, k_t, v_t, whole, last, i, length, width, scale, softcap, window,
        temperature, CAUSAL, WINDOW, SOFTCAP, True, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    place = ((batch * heads + head) * tokens + begin + i)[:, None] * width + d[None, :]
    live = (i < length)[:, None] & (d < width)[None, :]
    tl.store(dq_ptr + place, (dq * q_factor).to(dq_ptr.dtype.element_ty), mask=live)


def _configuration(width: int, shared: int) -> dict[str, int]:
    """Sizes of the kernel over queries; none spills (tests/kernels/compile_gate.py)."""
    if 120_000 < shared <= 200_000 and 64 < width < 128:
        block_m, block_n, warps, stages = 64, 64, 8, 2  # sm_80, 96 channels with masks, in Triton 3.6
    elif width <= 128:
        block_m, block_n, warps, stages = (128, 64, 8, 2) if shared > 200_000 else (128, 32, 8, 2)
    else:
        block_m, block_n, warps, stages = (128, 32, 8, 2) if shared > 200_000 else (32, 64, 8, 1)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def query_gradient_triton(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, begin: Tensor | None,
    end: Tensor | None, scale: float, causal: bool, window: int, softcap: float, temperature: float, factor: float,
) -> Tensor:  # fmt: skip
    """dq [B, H, T, D]; lse and delta [B, H, T] at the temperature, the rest as in `attention_backward`."""
    _, heads, tokens, width = q.shape
    fresh = torch.empty_like if begin is None else torch.zeros_like
    dq = fresh(q, memory_format=torch.contiguous_format)
    sizes = _configuration(width, support.chip(q.device)[1])
    support.launch(
        _query_kernel, (support.ceil_div(tokens, sizes["BLOCK_M"]), heads, sequences_of(q, begin)),
        *(q, k, v, d_out, lse, delta, dq, begin, end, *layout(q, k, v, begin)),
        *(scale, softcap, window, temperature, factor),
        **switches(width, causal, window, softcap), **sizes,
    )  # fmt: skip
    return dq
