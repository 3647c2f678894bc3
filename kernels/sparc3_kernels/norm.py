"""RMSNorm and LayerNorm, and their backward with the scale held constant (LRP) or not (gradient).

With s = 1/rms or 1/std in at least fp32, and xhat the normalised input:

    y = xhat (offset + weight) + bias, of x or of x + residual

and with gw = dy (offset + weight):

- RMSNorm:   dx = s * (gw - c * xhat * mean(gw * xhat))
- LayerNorm: dx = s * (gw - mean(gw) - c * xhat * mean(gw * xhat))

c = ``scale_gradient`` is 0 where the scale is a constant, so that R_x = R_y up to the centring, and 1 for the
plain derivative. Source: AttnLRP (arXiv 2402.05602), the identity rule on normalisation. With a residual, dx is the
gradient of both, to which that of the sum, where it goes on beside the norm, is added.

Triton: a program holds whole rows, so each tensor is read once; with s kept and c = 0 the backward does not read x at
all (8 bytes an element of D in bf16: dy in, dx out). fp32 arithmetic. Not yet measured on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from sparc3_kernels import triton_support as support
from sparc3_kernels.backend import choose
from sparc3_kernels.triton_support import jit, tl

_WIDEST = 16384  # elements of D that a program can hold without spilling


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- reference


def norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, x + residual, s) in plain torch; y is rounded once."""
    total = x if residual is None else x + residual
    wide = total.to(_accumulation_dtype(x.dtype))
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    y = wide * scale
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype), total.clone() if residual is None else total, scale.squeeze(-1)


def norm_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor | None, eps: float, offset: float,
    scale_gradient: float, centred: bool,
) -> Tensor:  # fmt: skip
    """dx in plain torch."""
    dtype = _accumulation_dtype(x.dtype)
    dx = (
        dy.to(dtype)
        if weight is None
        else dy.to(dtype) * (weight.to(dtype) + offset if offset else weight.to(dtype))
    )
    wide = x.to(dtype)
    if scale is not None and not scale_gradient and not centred:
        return (dx * scale.unsqueeze(-1)).to(x.dtype)
    if centred:
        variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        correction = dx.mean(-1, keepdim=True)
    else:
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    if scale_gradient:
        normalised = (wide - mean if centred else wide) * scale
        share = scale_gradient * normalised * (dx * normalised).mean(-1, keepdim=True)
        correction = correction + share if centred else share
    elif not centred:
        return (dx * scale).to(x.dtype)
    return ((dx - correction) * scale).to(x.dtype)


# ---- Triton


@jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, scale_ptr, rows, D, eps, offset,
    CENTRED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        # The sum is rounded as the model's own addition rounds it.
        total = x + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + place, total, mask=inside)
        x = total.to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    y = x * scale[:, None]
    if weight_ptr is not None:
        y *= (tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, scale_ptr, dx_ptr, rows, D, eps, offset, scale_gradient,
    CENTRED: tl.constexpr, CONSTANT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]
    dx = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        dx *= (tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset)[None, :]
    if scale_ptr is not None and CONSTANT:
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        if CENTRED:
            dx -= (tl.sum(dx, axis=1) / D)[:, None]
    else:
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            x = tl.where(inside, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
        mean = tl.sum(dx, axis=1) / D if CENTRED else tl.zeros((BLOCK_ROWS,), tl.float32)
        if not CONSTANT:
            normalised = x * scale[:, None]
            share = scale_gradient * tl.sum(dx * normalised, axis=1) / D
            dx -= share[:, None] * normalised
        dx -= mean[:, None]
    tl.store(dx_ptr + place, (dx * scale[:, None]).to(dx_ptr.dtype.element_ty), mask=inside)


def _configuration(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sizes: 8 elements of a row in a thread (32 of the widest), and small rows many at a time."""
    block = next(size for size in (128, 512, 1024, 2048, 4096, 8192, _WIDEST) if size >= width)
    block_rows = max(1, 2048 // block)
    # With 16 elements a thread, fp32 backwards of 4096 and 8192 spill on sm_86; 32 warps hold 64 registers each.
    warps = max(4, block // 256) if block < _WIDEST else 16
    return (support.ceil_div(rows, block_rows),), {
        "BLOCK_ROWS": block_rows,
        "BLOCK_D": block,
        "num_warps": warps,
    }


def _norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        grid, sizes = _configuration(scale.numel(), x.shape[-1])
        pointers = (x, residual, weight, bias, y, None if residual is None else total, scale)
        support.launch(
            _norm_kernel, grid, *pointers, scale.numel(), x.shape[-1], eps, offset, CENTRED=centred, **sizes
        )
    return y, total, scale


def _norm_backward_triton(
    dy: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor | None, eps: float, offset: float,
    scale_gradient: float, centred: bool,
) -> Tensor:  # fmt: skip
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        rows = x.numel() // x.shape[-1]
        grid, sizes = _configuration(rows, x.shape[-1])
        support.launch(
            _norm_backward_kernel, grid, dy, x, weight, scale, dx, rows, x.shape[-1], eps, offset, scale_gradient,
            CENTRED=centred, CONSTANT=scale_gradient == 0.0, **sizes,
        )  # fmt: skip
    return dx


def _unfit(x: Tensor, *others: Tensor | None) -> str | None:
    if x.dim() and x.shape[-1] > _WIDEST:
        return f"rows are wider than {_WIDEST}"
    return support.unfit(x, *others)


# ---- ops

torch.library.define(
    "sparc3::norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, bool centred) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "sparc3::norm_backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? scale, float eps, float offset, float scale_gradient, "
    "bool centred) -> Tensor",
)


@torch.library.impl("sparc3::norm", "default")
def _norm(x: Tensor, residual: Any, weight: Any, bias: Any, *numbers: Any) -> Any:
    if choose("norm", {"triton": _unfit(x, residual, weight, bias)}) == "triton":
        return _norm_triton(x, residual, weight, bias, *numbers)
    y, total, scale = norm_reference(x, residual, weight, bias, *numbers)
    return y.contiguous(), x.new_empty(0) if residual is None else total.contiguous(), scale.contiguous()


@torch.library.register_fake("sparc3::norm")
def _norm_fake(x: Tensor, residual: Any, *others: Any) -> Any:
    dtype = _accumulation_dtype(x.dtype)
    total = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=dtype)


@torch.library.impl("sparc3::norm_backward", "default")
def _norm_backward(dy: Tensor, x: Tensor, weight: Any, *others: Any) -> Tensor:
    if choose("norm_backward", {"triton": _unfit(x, dy, weight)}) == "triton":
        return _norm_backward_triton(dy, x, weight, *others)
    return norm_backward_reference(dy, x, weight, *others).contiguous()


@torch.library.register_fake("sparc3::norm_backward")
def _norm_backward_fake(dy: Tensor, x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of x, or of x + residual in the same pass.

    Args:
        x: [..., D] fp32, bf16 or fp16 (fp64 on the reference backend).
        weight: [D].
        eps: added to the mean square.
        offset: added to the weight, 1 in Gemma's norms and 0 elsewhere.
        residual: [..., D] added first, rounded to x's dtype.

    Returns:
        (y [..., D] in x's dtype, x + residual or x, s [...] in fp32 (fp64 for fp64)).
    """
    y, total, scale = torch.ops.sparc3.norm(x, residual, weight, None, eps, offset, False)
    return y, x if residual is None else total, scale


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension, as `rms_norm`; eps is added to the (biased) variance."""
    y, total, scale = torch.ops.sparc3.norm(x, residual, weight, bias, eps, 0.0, True)
    return y, x if residual is None else total, scale


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    scale_gradient: float,
    scale: Tensor | None = None,
) -> Tensor:
    """Gradient of RMSNorm's input.

    Args:
        dy: [..., D] gradient of the output.
        x: [..., D] input of the norm.
        weight: [D].
        eps, offset: as in `rms_norm`.
        scale_gradient: c of the module's formula, 0 or 1.
        scale: [...] s as `rms_norm` returned it; saves reading x where scale_gradient is 0.

    Returns:
        [..., D] in x's dtype.
    """
    return torch.ops.sparc3.norm_backward(dy, x, weight, scale, eps, offset, scale_gradient, False)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    scale_gradient: float,
    scale: Tensor | None = None,
) -> Tensor:
    """Gradient of LayerNorm's input over the last dimension, as `rms_norm_backward`; the mean is differentiated."""
    return torch.ops.sparc3.norm_backward(dy, x, weight, scale, eps, 0.0, scale_gradient, True)
