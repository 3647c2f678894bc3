"""Attention that keeps the log-sum-exp of its scores, for the LRP backward in `attention_backward`.

For query i and key j of one sequence, of head h and its key-value head,

    s_ij = scale q_i . k_j,   s_ij <- c tanh(s_ij / c) with a soft-cap c,
    P_ij = exp(s_ij - lse_i),   O_i = sum_j P_ij v_j,

over the keys j <= i where causal, of those the last `window` where there is a window.

Sequences: sample b of q [B, H, T, D] is the tokens begin[b] <= t < end[b] (left and right padding), or, with B = 1,
the sequences are packed along T and given by begin and end [S]. Tokens in no sequence get O = 0 and lse = 0.
Key-value heads are shared by H / H_kv query heads each and never repeated.

Triton: one program a block of queries and head, blocks of keys in a loop, O(T) memory (Dao et al. 2022,
FlashAttention). Differs from FlashAttention's own Triton version: sequences by begin and end, soft-cap, window,
strides of any layout. Not yet measured.

On a GPU 16-bit heads alone: fp32 ones would be multiplied in TF32, of 10 bits, which loses the 1e-5 that fp32 is for,
or as three such products, whose operands spill in blocks larger than 16 queries by 16 keys (backward, D = 128), too
small to reuse what is read. torch's memory-efficient SDPA takes fp32 in O(T) memory, so a wrapped fp32 model keeps
torch's attention, its gradients scaled (`sparc3.fused`).
"""

import math
from typing import Any

import torch
from torch import Tensor

from sparc3_kernels import triton_support as support
from sparc3_kernels.attention_blocks import (
    block_width,
    keys_of,
    last_contiguous,
    layout,
    load_block,
    score_block,
    seen_block,
    sequence_of,
    sequences_of,
    switches,
)
from sparc3_kernels.backend import choose
from sparc3_kernels.triton_support import jit, tl

WIDEST = 256  # head dimension

# ---- reference


def scores_reference(
    q: Tensor, k: Tensor, begin: Tensor | None, end: Tensor | None, scale: float, causal: bool, window: int,
    softcap: float,
) -> Tensor:  # fmt: skip
    """s [B, H, T, T], -inf where a key is not seen."""
    s = scale * (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    return s.masked_fill(~seen_reference(q, begin, end, causal, window)[:, None], -torch.inf)


def seen_reference(q: Tensor, begin: Tensor | None, end: Tensor | None, causal: bool, window: int) -> Tensor:
    """Bool [B, T, T]: which keys a query sees."""
    batch, _, length, _ = q.shape
    token = torch.arange(length, device=q.device)
    seen = torch.ones(batch, length, length, dtype=torch.bool, device=q.device)
    if begin is not None and end is not None:
        inside = (token >= begin[:, None]) & (token < end[:, None])  # [S, T]
        pairs = inside[:, :, None] & inside[:, None, :]
        seen = pairs if batch == len(begin) else pairs.any(0, keepdim=True)
    distance = token[:, None] - token[None, :]
    if causal:
        seen = seen & (distance >= 0)
    return seen & (distance < window) if window else seen


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, end: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(O [B, T, H, D], lse [B, H, T]) in plain torch, with all T x T scores in memory."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = scores_reference(q.to(dtype), k.to(dtype), begin, end, scale, causal, window, softcap)
    lse = torch.logsumexp(s, -1)
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    p = torch.exp(s - lse[..., None])
    out = p @ v.to(dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


# ---- Triton


@jit
def _attend(
    acc, maximum, total, q, k_ptr, v_ptr, k_t, v_t, first, last, i, length, width, scale, softcap, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Queries i against the blocks of keys from `first` to `last`."""
    d = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = load_block(k_ptr, j, k_t, d, length, width, MASKED, EVEN_D)
        v = load_block(v_ptr, j, v_t, d, length, width, MASKED, EVEN_D)
        s = score_block(tl.dot(q, tl.trans(k)), scale, softcap, SOFTCAP)
        s *= 1.4426950408889634  # exp2 is the hardware's
        if MASKED:
            s = tl.where(seen_block(i[:, None], j[None, :], length, window, CAUSAL, WINDOW), s, float("-inf"))
        higher = tl.maximum(maximum, tl.max(s, 1))
        # A row that has seen no key yet has the maximum -inf; 0 in its place keeps exp2 from inf - inf.
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(maximum - finite)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        maximum = higher
    return acc, maximum, total


@jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, begin_ptr, end_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, batch_step, tokens, heads, group, width, scale, softcap, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    # The last block of a causal sequence has the most keys: start with it.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch, begin, length = sequence_of(begin_ptr, end_ptr, batch_step, tokens)
    q_ptr += batch * q_b + head * q_h + begin * q_t
    k_ptr += batch * k_b + (head // group) * k_h + begin * k_t
    v_ptr += batch * v_b + (head // group) * v_h + begin * v_t
    i, d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mine = (i < length)[:, None] & (d < width)[None, :]
    q = tl.load(q_ptr + i[:, None] * q_t + d[None, :], mask=mine, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first, whole, last = keys_of(start, length, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if not WINDOW:
        acc, maximum, total = _attend(
            acc, maximum, total, q, k_ptr, v_ptr, k_t, v_t, first, whole, i, length, width, scale, softcap, window,
            CAUSAL, WINDOW, SOFTCAP, False, BLOCK_N, BLOCK_D, EVEN_D,
        )  # fmt: skip
    acc, maximum, total = _attend(
        acc, maximum, total, q, k_ptr, v_ptr, k_t, v_t, whole, last, i, length, width, scale, softcap, window,
        CAUSAL, WINDOW, SOFTCAP, True, BLOCK_N, BLOCK_D, EVEN_D,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)
    row = batch * tokens + begin
    out_ptr += (row * heads + head) * width
    out = acc / total[:, None]
    tl.store(out_ptr + i[:, None] * (heads * width) + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mine)
    lse_ptr += (batch * heads + head) * tokens + begin
    tl.store(lse_ptr + i, (maximum + tl.log2(total)) * 0.6931471805599453, mask=i < length)


def _configuration(width: int, shared: int) -> dict[str, int]:
    """Sizes by head dimension and the chip's shared memory; none spills (tests/kernels/compile_gate.py)."""
    if width <= 64:
        block_m, block_n, warps, stages = (128, 64, 8, 3) if shared > 200_000 else (128, 64, 8, 2)
    elif width <= 128:
        block_m, block_n, warps, stages = (128, 64, 8, 2) if shared > 200_000 else (128, 32, 8, 2)
    else:
        block_m, block_n, warps, stages = (128, 32, 8, 2) if shared > 200_000 else (64, 32, 8, 2)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, end: Tensor | None,
    scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, tokens, width = q.shape
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    fresh = torch.empty if begin is None else torch.zeros
    out = fresh(batch, tokens, heads, width, dtype=q.dtype, device=q.device)
    lse = fresh(batch, heads, tokens, dtype=torch.float32, device=q.device)
    sizes = _configuration(block_width(width), support.chip(q.device)[1])
    support.launch(
        _attention_kernel, (support.ceil_div(tokens, sizes["BLOCK_M"]), heads, sequences_of(q, begin)),
        *(q, k, v, out, lse, begin, end, *layout(q, k, v, begin), scale, softcap, window),
        **switches(width, causal, window, softcap), **sizes,
    )  # fmt: skip
    return out, lse


def unfit(q: Tensor, *others: Tensor) -> str | None:
    """Why the Triton kernels cannot take these heads, or None where they can."""
    if q.shape[-1] > WIDEST:
        return f"heads are wider than {WIDEST}"
    if q.is_cuda and q.dtype == torch.float32:
        # see the module's docstring
        return "it takes bf16 and fp16 heads on a GPU, not fp32"
    return support.unfit(q, *others)


# ---- op

torch.library.define(
    "sparc3::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? begin, Tensor? end, float scale, bool causal, int window, float softcap) "
    "-> (Tensor, Tensor)",
)


@torch.library.impl("sparc3::attention", "default")
def _attention(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    in_triton = choose("attention", {"triton": unfit(q, k, v)}) == "triton"
    return (attention_triton if in_triton else attention_reference)(q, k, v, *others)


@torch.library.register_fake("sparc3::attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, tokens, heads, width), q.new_empty(batch, heads, tokens, dtype=dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    begin: Tensor | None = None,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp of the scores.

    Args:
        q: [B, H, T, D] of any strides; fp32, bf16 or fp16 (fp64 on the reference backend), D <= 256.
        k, v: [B, H_kv, T, D], H a multiple of H_kv.
        scale: factor on q . k; 1 / sqrt(D) where None.
        causal: whether a query sees only keys up to itself.
        window: how many keys, itself included, a query sees at most; 0: all. Needs `causal`.
        softcap: c of the module's formula, 0 for none.
        begin, end: int32 or int64 [S] with S = B, or B = 1, on q's device; both or neither.

    Returns:
        (O [B, T, H, D] in q's dtype, lse [B, H, T] in fp32 (fp64 for fp64)).

    Raises:
        ValueError: shapes, dtypes or settings that do not fit together.
    """
    check(q, k, v, causal, window, softcap, begin, end)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.ops.sparc3.attention(q, k, v, begin, end, scale, causal, window, softcap)


# Whether ours is taken for 16-bit heads instead of torch's backward with its gradients scaled (fp32 is torch's, see
# above). Not measured yet: by published figures torch's (cuDNN, FlashAttention 2) is faster up to D = 128 where all
# three gradients are wanted; values alone take 2 products of 5, and torch has no kernel for soft-caps or windows, nor
# a fast one for D = 256. bench/gpu.py prints what this table should be.
DISPATCH = {
    "soft-cap": True,
    "window": True,
    "values alone": True,
    "heads wider than 128": True,
    "all gradients": False,
}


def dispatch_row(width: int, softcap: float, window: int, need_qk: bool) -> str:
    """The row of `DISPATCH` that decides a case."""
    if softcap > 0:
        return "soft-cap"
    if window > 0:
        return "window"
    if not need_qk:
        return "values alone"
    return "heads wider than 128" if width > 128 else "all gradients"


def beats_sdpa(width: int, softcap: float, window: int, need_qk: bool) -> bool:
    """Whether `attention` and its backward are taken instead of torch's own."""
    return DISPATCH[dispatch_row(width, softcap, window, need_qk)]


def check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, softcap: float, begin: Any, end: Any
) -> None:
    """ValueError where arguments of `attention` do not fit together."""
    if (
        q.dim() != 4
        or k.shape != v.shape
        or (*q.shape[:1], *q.shape[2:]) != (*k.shape[:1], *k.shape[2:])
        or not k.shape[1]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(
            "shapes must be q [B, H, T, D], k and v [B, H_kv, T, D] with H a multiple of H_kv, "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share a float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if window < 0 or softcap < 0 or (window and not causal):
        raise ValueError(
            f"window and softcap must not be negative and a window needs causal=True, got {window}, {softcap}"
        )
    if (begin is None) != (end is None) or (
        begin is not None
        and (begin.dim() != 1 or begin.shape != end.shape or (len(begin) != q.shape[0] and q.shape[0] != 1))
    ):
        raise ValueError("begin and end are both None or both [S], with S = B, or B = 1 for packed sequences")
