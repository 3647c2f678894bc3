"""Backward of RMSNorm and LayerNorm with the scale held constant (LRP) or not (gradient).

With gw = dy * (offset + weight), s = 1/rms or 1/std in at least fp32, and xhat the normalised input:

- RMSNorm:   dx = s * (gw - c * xhat * mean(gw * xhat))
- LayerNorm: dx = s * (gw - mean(gw) - c * xhat * mean(gw * xhat))

c = ``scale_gradient`` is 0 where the scale is a constant, so that R_x = R_y up to the centring, and 1 for the
plain derivative. Source: AttnLRP (arXiv 2402.05602), the identity rule on normalisation. Runs on any device in
plain torch.
"""

from __future__ import annotations

import torch


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float,
    scale_gradient: float,
) -> torch.Tensor:
    """Gradient of RMSNorm's input.

    Args:
        dy: [..., D] gradient of the output.
        x: [..., D] input of the norm.
        weight: [D].
        eps: added to the mean square.
        offset: added to the weight, 1 in Gemma's norms and 0 elsewhere.
        scale_gradient: c of the module's formula, 0 or 1.

    Returns:
        [..., D] in x's dtype.
    """
    dtype = _accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    dx = dy.to(dtype) * (weight.to(dtype) + offset if offset else weight.to(dtype))
    if scale_gradient:
        normalised = wide * scale
        dx -= scale_gradient * normalised * (dx * normalised).mean(-1, keepdim=True)
    return dx.mul_(scale).to(x.dtype)


def layer_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    scale_gradient: float,
) -> torch.Tensor:
    """Gradient of LayerNorm's input over the last dimension; the mean is always differentiated.

    Args:
        dy: [..., D] gradient of the output.
        x: [..., D] input of the norm.
        weight: [D], or None where the norm has none.
        eps: added to the (biased) variance.
        scale_gradient: c of the module's formula, 0 or 1.

    Returns:
        [..., D] in x's dtype.
    """
    dtype = _accumulation_dtype(x.dtype)
    dx = dy.to(dtype) if weight is None else dy.to(dtype) * weight.to(dtype)
    variance, mean = torch.var_mean(x.to(dtype), -1, correction=0, keepdim=True)
    scale = torch.rsqrt(variance + eps)
    correction = dx.mean(-1, keepdim=True)
    if scale_gradient:
        normalised = (x.to(dtype) - mean) * scale
        correction = correction + scale_gradient * normalised * (dx * normalised).mean(-1, keepdim=True)
    return ((dx - correction) * scale).to(x.dtype)
