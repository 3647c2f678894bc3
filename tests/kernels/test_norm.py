"""The norms and their backwards against autograd through the definition, in float64, on every backend.

Shapes: one token, an odd width, width 1 (where LayerNorm's output is its bias alone), and batch dimensions.
Values: normal, rows of zeros (eps alone keeps the scale finite), tiny rows (eps dominates), huge rows, and
rows with a mean far from zero (where LayerNorm's variance cancels).
"""

import pytest
import torch
from precision import assert_as_good_as_torch
from sparc3_kernels.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward

EPS = 1e-6
SHAPES = [(1, 7), (5, 33), (2, 3, 64), (4, 1)]


def inputs(shape, dtype=torch.float64, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return dy.to(dtype), (x * scale + shift).to(dtype), weight.to(dtype)


def rms(x, weight, offset, constant):
    scale = (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    return x * (scale.detach() if constant else scale) * (offset + weight)


def layer(x, weight, constant):
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
    expected = autograd(rms, dy, x, weight, offset, constant)
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
    close(dx, autograd(layer, dy, x, weight, constant), torch.float64, 10.0)


LOW = [torch.float32, torch.bfloat16, torch.float16]
# Widths around the blocks of 128, 512 and 2048, heads of a projection, and one row a program.
WIDE = [(5, 33), (2, 3, 4, 64), (17, 128), (3, 576), (1, 2049)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", WIDE)
def test_forward(fused, device, shape, dtype):
    residual, x, weight = inputs(shape, dtype)
    bias = weight.flip(0) / 2
    for offset in (0.0, 1.0):
        y, total, scale = rms_norm(x.to(device), weight.to(device), EPS, offset)
        close(y.cpu(), rms(x.double(), weight.double(), offset, False), dtype, 4.0)
        assert torch.equal(total.cpu(), x)
        expected = (x.double().square().mean(-1) + EPS).rsqrt()
        # mean, root and quotient: a few roundings of fp32
        torch.testing.assert_close(scale.cpu().double(), expected, rtol=1e-6, atol=0)
    y, total, _ = layer_norm(x.to(device), weight.to(device), bias.to(device), EPS, residual.to(device))
    assert torch.equal(total.cpu(), x + residual)
    wide = (x + residual).double()
    close(y.cpu(), layer(wide, weight.double(), False) + bias.double(), dtype, 10.0)
    y, _, _ = layer_norm(x.to(device), None, None, EPS)
    close(y.cpu(), layer(x.double(), None, False), dtype, 10.0)
    y, total, _ = rms_norm(x.to(device), weight.to(device), EPS, residual=residual.to(device))
    assert torch.equal(total.cpu(), x + residual)
    close(y.cpu(), rms(wide, weight.double(), 0.0, False), dtype, 4.0)


@pytest.mark.parametrize("dtype", LOW)
# 1e-4: eps is a hundred times the mean square; 300: the square overflows fp16, the sum must not
@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
@pytest.mark.parametrize("constant", [True, False])
def test_low_precision_is_one_rounding_away(fused, device, dtype, scale, constant):
    share = 0.0 if constant else 1.0
    dy, x, weight = inputs((5, 33), dtype, scale)
    on_device = [tensor.to(device) for tensor in (dy, x, weight)]
    dx = rms_norm_backward(*on_device, EPS, 0.0, share)
    assert dx.dtype == dtype
    close(dx.cpu(), autograd(rms, dy, x, weight.double(), 0.0, constant), dtype, 10.0)
    dx = layer_norm_backward(*on_device, EPS, share)
    assert dx.dtype == dtype
    close(dx.cpu(), autograd(layer, dy, x, weight.double(), constant), dtype, 10.0)


def in_torch(x, weight, bias, offset, centred, constant):
    """What a model's own module computes in 16 bit: F.layer_norm, F.rms_norm, or Gemma's with 1 + weight in fp32."""
    if not constant:
        if centred:
            return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)
        if not offset:
            return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    wide = wide - wide.mean(-1, keepdim=True) if centred else wide
    scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    y = wide * (scale.detach() if constant else scale) * (offset + weight.to(wide.dtype))
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(("centred", "offset"), [(False, 0.0), (False, 1.0), (True, 0.0)])
def test_16_bit_is_as_good_as_torch(fused, device, centred, offset, constant, dtype):
    dy, x, weight = inputs((17, 128), dtype)
    bias = weight.flip(0) / 2 if centred else None

    def differentiated(*tensors):
        dy, x, weight, bias = tensors
        leaf = x.clone().requires_grad_()
        y = in_torch(leaf, weight, bias, offset, centred, constant)
        return y, *torch.autograd.grad(y, leaf, dy)

    there = [None if tensor is None else tensor.to(device) for tensor in (dy, x, weight, bias)]
    theirs = differentiated(*there)
    exact = differentiated(*(None if tensor is None else tensor.double() for tensor in (dy, x, weight, bias)))
    dy, x, weight, bias = there
    share = 0.0 if constant else 1.0
    if centred:
        y, _, scale = layer_norm(x, weight, bias, EPS)
        dx = layer_norm_backward(dy, x, weight, EPS, share, scale)
    else:
        y, _, scale = rms_norm(x, weight, EPS, offset)
        dx = rms_norm_backward(dy, x, weight, EPS, offset, share, scale)
    assert y.dtype == dx.dtype == dtype
    assert_as_good_as_torch((y, dx), theirs, exact)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("shape", WIDE)
def test_backward_with_the_scale_of_the_forward(fused, device, shape, constant):
    share = 0.0 if constant else 1.0
    dy, x, weight = inputs(shape, torch.float32)
    on_device = [tensor.to(device) for tensor in (dy, x, weight)]
    _, _, scale = rms_norm(on_device[1], on_device[2], EPS, 1.0)
    dx = rms_norm_backward(*on_device, EPS, 1.0, share, scale)
    close(dx.cpu(), autograd(rms, dy, x, weight.double(), 1.0, constant), torch.float32, 10.0)
    _, _, scale = layer_norm(on_device[1], on_device[2], None, EPS)
    dx = layer_norm_backward(*on_device, EPS, share, scale)
    close(dx.cpu(), autograd(layer, dy, x, weight.double(), constant), torch.float32, 10.0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rows_of_zeros_and_of_one_value_are_finite(fused, device, share):
    dy, _, weight = (tensor.to(device) for tensor in inputs((3, 33), torch.float32))
    x = torch.tensor([[0.0], [7.0], [1e-20]], device=device).expand(3, 33)
    rms = rms_norm_backward(dy, x, weight, EPS, 0.0, share)
    layer = layer_norm_backward(dy, x, weight, EPS, share)
    assert rms.isfinite().all()
    assert layer.isfinite().all()
    # x = 0: the scale is 1/sqrt(eps) and its gradient vanishes.
    torch.testing.assert_close(rms[0], dy[0] * weight * EPS**-0.5, rtol=1e-6, atol=0)


def test_a_large_mean_costs_no_more_than_the_input_has_lost(fused, device):
    # x = 1000 + noise in fp32 carries the noise to 2^-24 * 1000 = 6e-5; the reference gets the same rounded
    # x.
    dy, x, weight = inputs((5, 64), torch.float32, 1.0, 1000.0)
    dx = layer_norm_backward(dy.to(device), x.to(device), weight.to(device), EPS, 1.0)
    # The mean itself is rounded at 6e-5, and with it xhat: 6e-5 / 6e-8 = 1000 times the roundings of close().
    close(dx.cpu(), autograd(layer, dy, x, weight.double(), False), torch.float32, 1000.0)


def test_strided_inputs_and_empty_ones(fused, device):
    dy, x, weight = (tensor.to(device) for tensor in inputs((6, 40), torch.float32))
    half = (dy[::2], x[::2], weight)
    assert torch.equal(
        rms_norm_backward(*half, EPS, 0.0, 1.0),
        rms_norm_backward(*(tensor.contiguous() for tensor in half), EPS, 0.0, 1.0),
    )
    assert rms_norm_backward(dy[:0], x[:0], weight, EPS, 0.0, 0.0).shape == (0, 40)
    assert rms_norm(x[:0], weight, EPS)[0].shape == (0, 40)


@pytest.mark.parametrize("centred", [False, True])
def test_ops_are_registered(fused, device, centred):
    dy, x, weight = (tensor.to(device) for tensor in inputs((3, 40), torch.float32))
    norm, backward = torch.ops.sparc3.norm.default, torch.ops.sparc3.norm_backward.default
    for residual in (None, dy):
        torch.library.opcheck(norm, (x, residual, weight, None, EPS, 1.0, centred))
    scale = norm(x, None, weight, None, EPS, 1.0, centred)[2]
    for share in (0.0, 1.0):
        torch.library.opcheck(backward, (dy, x, weight, scale, EPS, 1.0, share, centred))


def test_constant_scale_conserves_relevance():
    dy, x, weight = inputs((5, 33))
    dx = rms_norm_backward(dy, x, weight, EPS, 0.0, 0.0)
    y = rms(x, weight, 0.0, True)
    # sum of 33 products in float64
    torch.testing.assert_close((dx * x).sum(-1), (dy * y).sum(-1), rtol=1e-13, atol=1e-13)
