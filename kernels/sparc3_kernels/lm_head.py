"""The explained scalar of an LM head and its gradient, a chunk of tokens at a time instead of T x V logits.

With z = W h for h [T, D] and W [V, D], z <- c tanh(z / c) with a final soft-cap c, and y the explained word,

============ ============================= =======================
target       value of a token              d value / dz_v
============ ============================= =======================
logit        z_y                           1[v = y]
logit-mean   z_y - mean_v z_v              1[v = y] - 1 / V
logprob      z_y - log sum_v exp(z_v)      1[v = y] - softmax(z)_v
============ ============================= =======================

and dh = W^T dz (times 1 - (z / c)^2 with a soft-cap). Tokens whose y is negative are not explained: value and
gradient are 0.

Triton: the logits of a chunk are replaced by their gradients in place, in two passes over them, and never leave the
chunk's buffer: 2 matrix products and 4 passes over the logits in their own dtype. Not yet measured on a GPU.
"""

import torch
from torch import Tensor

from sparc3_kernels import triton_support as support
from sparc3_kernels.backend import choose
from sparc3_kernels.linear import input_gradient, linear
from sparc3_kernels.triton_support import jit, tl

TARGETS = ("logit", "logit-mean", "logprob")
# Logits in flight, in elements: on a GPU 128 MiB in bf16, enough rows of 262,144 words to fill a matrix product; a
# CPU's are full with fewer.
_CHUNK, _CHUNK_ON_CPU = 1 << 26, 1 << 24
_BLOCK = 4096  # words a step


# ---- reference


def logits_gradient_reference_(z: Tensor, labels: Tensor, target: str, softcap: float) -> Tensor:
    """Replace logits z [T, V] by their gradients; returns the values [T]. In at least fp32."""
    wide = z if z.dtype == torch.float64 else z.float()
    capped = torch.tanh(wide / softcap).mul_(softcap) if softcap else wide
    slope = (capped / softcap).square_().neg_().add_(1.0) if softcap else None
    index = labels.clamp(min=0)[:, None]
    # Of minus the value, so that probabilities need not be negated.
    if target == "logprob":
        gradient = torch.log_softmax(capped, 1)
        value = gradient.gather(1, index)
        gradient.exp_()
    elif target == "logit-mean":
        value = capped.gather(1, index) - capped.mean(1, keepdim=True)
        gradient = torch.full_like(capped, 1.0 / z.shape[1])
    else:
        value = capped.gather(1, index)
        gradient = torch.zeros_like(capped)
    gradient.scatter_add_(1, index, -torch.ones_like(value))
    if slope is not None:
        gradient.mul_(slope)
    explained = (labels >= 0)[:, None]
    torch.mul(gradient, -explained.to(gradient.dtype), out=z)
    return torch.where(explained, value, 0.0).squeeze(1)


# ---- Triton


@jit
def _capped(z, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    else:
        return z


@jit
def _logits_gradient_kernel(
    z_ptr,
    labels_ptr,
    value_ptr,
    words,
    softcap,
    TARGET: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    z_ptr += token * words
    label = tl.load(labels_ptr + token).to(tl.int32)
    explained = label >= 0
    column = tl.arange(0, BLOCK)
    value = tl.load(z_ptr + tl.maximum(label, 0)).to(tl.float32)
    value = _capped(value, softcap, SOFTCAP)
    # First pass: the sum, or the maximum and the sum of exponentials, lane by lane.
    maximum = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if TARGET != "logit":
        for start in range(0, words, BLOCK):
            inside = start + column < words
            z = tl.load(z_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
            z = _capped(z, softcap, SOFTCAP)
            if TARGET == "logprob":
                higher = tl.maximum(maximum, tl.where(inside, z, -1e38))
                total = total * tl.exp(maximum - higher) + tl.where(inside, tl.exp(z - higher), 0.0)
                maximum = higher
            else:
                total += tl.where(inside, z, 0.0)
    log_sum = 0.0
    if TARGET == "logprob":
        top = tl.max(maximum, 0)
        log_sum = top + tl.log(tl.sum(total * tl.exp(maximum - top), 0))
        value -= log_sum
    elif TARGET == "logit-mean":
        value -= tl.sum(total, 0) / words
    tl.store(value_ptr + token, tl.where(explained, value, 0.0))
    for start in range(0, words, BLOCK):
        inside = start + column < words
        z = tl.load(z_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        z = _capped(z, softcap, SOFTCAP)
        gradient = tl.where(start + column == label, 1.0, 0.0)
        if TARGET == "logprob":
            gradient -= tl.exp(z - log_sum)
        elif TARGET == "logit-mean":
            gradient -= 1.0 / words
        if SOFTCAP:
            gradient *= 1.0 - (z / softcap) * (z / softcap)
        gradient = tl.where(explained, gradient, 0.0)
        tl.store(z_ptr + start + column, gradient.to(z_ptr.dtype.element_ty), mask=inside)


def _logits_gradient_triton_(z: Tensor, labels: Tensor, target: str, softcap: float) -> Tensor:
    value = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    support.launch(
        _logits_gradient_kernel, (z.shape[0],), z, labels, value, z.shape[1], softcap,
        TARGET=target, SOFTCAP=softcap > 0, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return value


# ---- op

torch.library.define(
    "sparc3::lm_head_target",
    "(Tensor hidden, Tensor weight, Tensor labels, str target, float softcap) -> (Tensor, Tensor)",
)


@torch.library.impl("sparc3::lm_head_target", "default")
def _lm_head_target(
    hidden: Tensor, weight: Tensor, labels: Tensor, target: str, softcap: float
) -> tuple[Tensor, Tensor]:
    in_triton = choose("lm_head_target", {"triton": support.unfit(hidden, weight)}) == "triton"
    run = _logits_gradient_triton_ if in_triton else logits_gradient_reference_
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    value = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    gradient = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    rows = max(1, (_CHUNK_ON_CPU if hidden.device.type == "cpu" else _CHUNK) // weight.shape[0])
    for start in range(0, len(hidden), rows):
        some = slice(start, start + rows)
        z = linear(hidden[some], weight)
        value[some] = run(z, labels[some].contiguous(), target, softcap)
        gradient[some] = input_gradient(z, weight)
    return value, gradient


@torch.library.register_fake("sparc3::lm_head_target")
def _lm_head_target_fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, target: str, softcap: float
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape)


def lm_head_target(
    hidden: Tensor, weight: Tensor, labels: Tensor, target: str, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(value [T], gradient [T, D]) of the explained scalar of each token.

    Args:
        hidden: [T, D] what enters the LM head; fp32, bf16 or fp16 (fp64 on the reference backend).
        weight: [V, D] of the same dtype.
        labels: int64 [T], the explained word, negative where nothing is explained.
        target: one of `TARGETS`.
        softcap: c of the module's formula, 0 for none.

    Returns:
        value in fp32 (fp64 for fp64), gradient in hidden's dtype.

    Raises:
        ValueError: unknown target, or shapes or dtypes that do not fit together.
    """
    if target not in TARGETS:
        raise ValueError(f"target is one of {', '.join(TARGETS)}, got {target!r}")
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or labels.shape != hidden.shape[:1]
    ):
        raise ValueError(
            "shapes must be hidden [T, D], weight [V, D], labels [T], "
            f"got {list(hidden.shape)}, {list(weight.shape)}, {list(labels.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must share a dtype, got {hidden.dtype} and {weight.dtype}")
    with torch.no_grad():
        return torch.ops.sparc3.lm_head_target(hidden, weight, labels, target, softcap)
