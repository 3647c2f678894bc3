"""rms_norm_backward and layer_norm_backward against autograd through the definition, in float64.

Shapes: one token, an odd width, width 1 (where LayerNorm's output is its bias alone), and batch dimensions.
Values: normal, rows of zeros (eps alone keeps the scale finite), tiny rows (eps dominates), huge rows, and
rows with a mean far from zero (where LayerNorm's variance cancels).
"""

import pytest
import torch
from sparc3_kernels.norm import layer_norm_backward, rms_norm_backward

EPS = 1e-6
SHAPES = [(1, 7), (5, 33), (2, 3, 64), (4, 1)]


def inputs(shape, dtype=torch.float64, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return dy.to(dtype), (x * scale + shift).to(dtype), weight.to(dtype)


def rms_norm(x, weight, offset, constant):
    scale = (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    return x * (scale.detach() if constant else scale) * (offset + weight)


def layer_norm(x, weight, constant):
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return centred / (std.detach() if constant else std) * (1.0 if weight is None else weight)


def autograd(function, dy, x, *arguments):
    leaf = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf, *arguments), leaf, dy.double())
    return gradient


def close(ours, theirs, dtype, condition=1.0):
    """Within a few roundings of the largest term of each row.

    A row's dx is a difference of terms of the size of its largest one; each passes some 8 roundings of the
    accumulation dtype, and the result one of its own.
    """
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = 8 * wide * condition * theirs.abs().amax(-1, keepdim=True) + torch.finfo(dtype).eps * theirs.abs()
    # Below the smallest normal number rounding is absolute.
    assert ((ours.double() - theirs).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, offset, constant):
    dy, x, weight = inputs(shape)
    dx = rms_norm_backward(dy, x, weight, EPS, offset, 0.0 if constant else 1.0)
    expected = autograd(rms_norm, dy, x, weight, offset, constant)
    # Width 1 in gradient mode: dx = s w dy (1 - x^2 s^2), a difference of nearly equal terms, as far as eps
    # lets.
    condition = 1e7 if shape[-1] == 1 and not constant else 10.0
    close(dx, expected, torch.float64, condition)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape, affine, constant):
    dy, x, weight = inputs(shape)
    weight = weight if affine else None
    dx = layer_norm_backward(dy, x, weight, EPS, 0.0 if constant else 1.0)
    close(dx, autograd(layer_norm, dy, x, weight, constant), torch.float64, 10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# 1e-4: eps is a hundred times the mean square; 300: the square overflows fp16, the sum must not
@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
@pytest.mark.parametrize("constant", [True, False])
def test_low_precision_is_one_rounding_away(dtype, scale, constant):
    share = 0.0 if constant else 1.0
    dy, x, weight = inputs((5, 33), dtype, scale)
    dx = rms_norm_backward(dy, x, weight, EPS, 0.0, share)
    assert dx.dtype == dtype
    close(dx, autograd(rms_norm, dy, x, weight.double(), 0.0, constant), dtype, 10.0)
    dx = layer_norm_backward(dy, x, weight, EPS, share)
    assert dx.dtype == dtype
    close(dx, autograd(layer_norm, dy, x, weight.double(), constant), dtype, 10.0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_of_zeros_and_of_one_value_are_finite(share):
    dy, _, weight = inputs((3, 33), torch.float32)
    x = torch.tensor([[0.0], [7.0], [1e-20]]).expand(3, 33)
    rms = rms_norm_backward(dy, x, weight, EPS, 0.0, share)
    layer = layer_norm_backward(dy, x, weight, EPS, share)
    assert rms.isfinite().all()
    assert layer.isfinite().all()
    # x = 0: the scale is 1/sqrt(eps) and its gradient vanishes.
    torch.testing.assert_close(rms[0], dy[0] * weight * EPS**-0.5, rtol=1e-6, atol=0)


def test_a_large_mean_costs_no_more_than_the_input_has_lost():
    # x = 1000 + noise in fp32 carries the noise to 2^-24 * 1000 = 6e-5; the reference gets the same rounded
    # x.
    dy, x, weight = inputs((5, 64), torch.float32, 1.0, 1000.0)
    dx = layer_norm_backward(dy, x, weight, EPS, 1.0)
    # The mean itself is rounded at 6e-5, and with it xhat: 6e-5 / 6e-8 = 1000 times the roundings of close().
    close(dx, autograd(layer_norm, dy, x, weight.double(), False), torch.float32, 1000.0)


def test_constant_scale_conserves_relevance():
    dy, x, weight = inputs((5, 33))
    dx = rms_norm_backward(dy, x, weight, EPS, 0.0, 0.0)
    y = rms_norm(x, weight, 0.0, True)
    # sum of 33 products in float64
    torch.testing.assert_close((dx * x).sum(-1), (dy * y).sum(-1), rtol=1e-13, atol=1e-13)
