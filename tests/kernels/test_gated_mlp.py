"""Closed forms of f(x)/x and the gated product, against f itself and against autograd, in float64."""

import math

import pytest
import torch
from precision import assert_as_good_as_torch
from sparc3_kernels.gated_mlp import (
    RATIO,
    activation_backward,
    activation_backward_reference,
    gated_product,
    gated_product_backward,
    gated_product_backward_reference,
)
from torch.nn import functional as F

FUNCTIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
LOW = [torch.float32, torch.bfloat16, torch.float16]
# Zeros of both signs, numbers that an epsilon of 1e-10 would cancel or that fp16 rounds to zero, both
# tails, and values whose cube, or 1.702 times which, overflows fp16.
ADVERSARIAL = [
    0.0,
    -0.0,
    1e-10,
    -1e-10,
    1e-7,
    -1e-7,
    1e-3,
    -1e-3,
    -1.5,
    3.0,
    -9.0,
    9.0,
    88.0,
    -88.0,
    6e4,
    -6e4,
]


def test_every_activation_has_a_function_to_compare_with():
    assert set(FUNCTIONS) == set(RATIO)


@pytest.mark.parametrize("name", RATIO)
def test_ratio_times_x_is_the_activation(name):
    x = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    # Both sides cancel in the tail, where f(x) is the difference of numbers near |x| rounded at 2^-53.
    torch.testing.assert_close(RATIO[name](x) * x, FUNCTIONS[name](x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", set(RATIO) - {"relu"})
@pytest.mark.parametrize("dtype", LOW)
def test_ratio_at_zero_is_its_limit(name, dtype):
    x = torch.tensor([0.0, -0.0, 1e-10, -1e-10], dtype=dtype)
    # f(x)/x -> f'(0) = 1/2 for all smooth ones; one rounding away at most.
    torch.testing.assert_close(RATIO[name](x), torch.full_like(x, 0.5), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("name", RATIO)
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_is_finite_and_close(fused, device, name, dtype, identity):
    x = torch.tensor(ADVERSARIAL, dtype=dtype)
    dy = torch.full_like(x, 1.25)
    ours = activation_backward(dy.to(device), x.to(device), name, identity).cpu()
    theirs = activation_backward_reference(dy.double(), x.double(), name, identity)
    assert ours.isfinite().all()
    # The argument z = c x (1 + ...) of the closed form is rounded up to 6 times, which moves a ratio in [0,
    # 1] by at most 6 eps |z r'(z)| <= 6 eps * 0.3; then dy times it is rounded once. f' = r + x r' has two
    # such terms.
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1.25 * 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_keeps_its_tail(dtype):
    # Phi(-5) = 2.9e-7: 1 + erf would lose every digit of it in fp32.
    x = torch.tensor([-5.0, -3.0], dtype=dtype)
    expected = [0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()]
    # d log Phi / d log x = 27 at -5, for a rounding of x / sqrt(2) each.
    torch.testing.assert_close(
        RATIO["gelu"](x), torch.tensor(expected, dtype=dtype), rtol=2 * 27 * torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("name", RATIO)
def test_derivative(name):
    x = torch.cat([torch.linspace(-8, 8, 401), torch.tensor([0.0, -0.0])]).double().requires_grad_()
    dy = torch.linspace(-2, 2, 403, dtype=torch.float64)
    (expected,) = torch.autograd.grad(FUNCTIONS[name](x), x, dy)
    torch.testing.assert_close(
        activation_backward(dy, x.detach(), name, False), expected, rtol=1e-12, atol=1e-14
    )


def share(x, part):
    return x * part + (x * (1 - part)).detach()


# All three choices of the gate part, with an activation of each kind of closed form; a width that no tile
# divides.
@pytest.mark.parametrize("scales", [(0.5, 0.5), (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated_product(name, identity, scales):
    generator = torch.Generator().manual_seed(0)
    dp, gate, up = torch.randn(3, 2, 5, 47, generator=generator, dtype=torch.float64)
    gate.requires_grad_()
    up.requires_grad_()
    y = FUNCTIONS[name](gate)
    activated = gate * (y / gate).detach() if identity else y
    product = share(activated, scales[0]) * share(up, scales[1])
    expected = torch.autograd.grad(product, (gate, up), dp)
    ours = gated_product_backward(dp, gate.detach(), up.detach(), name, identity, scales[0], scales[1])
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_half_rule_conserves_relevance():
    generator = torch.Generator().manual_seed(1)
    dp, gate, up = torch.randn(3, 5, 47, generator=generator, dtype=torch.float64)
    activated = F.silu(gate)
    dgate, dup = gated_product_backward(dp, gate, up, "silu", True, 0.5, 0.5)
    relevance = dp * activated * up
    torch.testing.assert_close(dgate * gate, relevance / 2, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(dup * up, relevance / 2, rtol=1e-13, atol=1e-15)


def test_inputs_are_left_alone(fused, device):
    dp, gate, up = torch.randn(3, 5, 47, generator=torch.Generator().manual_seed(2)).to(device)
    before = [tensor.clone() for tensor in (dp, gate, up)]
    gated_product_backward(dp, gate, up, "silu", True, 0.5, 0.5)
    gated_product(gate, up, "silu")
    for tensor, copy in zip((dp, gate, up), before, strict=True):
        assert torch.equal(tensor, copy)


# One block and a ragged one after it; an odd width; halves of one tensor, as Phi-3 has them.
@pytest.mark.parametrize("shape", [(1, 1030), (2, 3, 47)])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", RATIO)
def test_low_precision_gated_product(fused, device, name, dtype, shape):
    generator = torch.Generator().manual_seed(4)
    dp = torch.randn(shape, generator=generator).to(dtype)
    both = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)
    gate, up = both.chunk(2, -1)
    on_device = both.to(device).chunk(2, -1)
    product = gated_product(*on_device, name).cpu().double()
    activated = FUNCTIONS[name](gate.double())
    # f(gate) = gate * ratio is off by 3 roundings of values up to |gate|, the reference rounds it and the product.
    bound = 8 * torch.finfo(dtype).eps * (gate.double().abs() * up.double().abs()) + 1e-7
    assert ((product - activated * up.double()).abs() <= bound).all()
    for identity in (True, False):
        for scales in ((0.5, 0.5), (0.0, 1.0)):
            ours = gated_product_backward(dp.to(device), *on_device, name, identity, *scales)
            theirs = gated_product_backward_reference(
                dp.double(), gate.double(), up.double(), name, identity, *scales
            )
            # Ratios and derivatives are at most 1.13; each factor and product is rounded at most 8 times.
            for mine, exact, other in zip(ours, theirs, (up, gate), strict=True):
                bound = 8 * torch.finfo(dtype).eps * (dp.double() * other.double()).abs() + 1e-7
                assert mine.dtype == dtype
                assert mine.shape == gate.shape
                assert ((mine.cpu().double() - exact).abs() <= bound).all()


def by_autograd(x, dy, name, identity):
    """(f(x), dx) as plain torch has it: the identity rule multiplies x by the constant f(x) / x."""
    leaf = x.clone().requires_grad_()
    y = FUNCTIONS[name](leaf)
    y = leaf * (y / leaf).detach() if identity else y
    return y.detach(), *torch.autograd.grad(y, leaf, dy)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RATIO)
def test_16_bit_activation_is_as_good_as_torch(fused, device, name, dtype, identity):
    x, dy = (4 * torch.randn(2, 2047, generator=torch.Generator().manual_seed(5))).to(dtype)
    ours = activation_backward(dy.to(device), x.to(device), name, identity)
    theirs, exact = (
        by_autograd(x.to(device), dy.to(device), name, identity),
        by_autograd(x.double(), dy.double(), name, identity),
    )
    assert_as_good_as_torch([ours], theirs[1:], exact[1:])


# AttnLRP, whose halves of the product are one half of both gradients, and the gradient.
@pytest.mark.parametrize(("identity", "scales"), [(True, (0.5, 0.5)), (False, (1.0, 1.0))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_16_bit_gated_product_is_as_good_as_torch(fused, device, name, dtype, identity, scales):
    tensors = (2 * torch.randn(3, 5, 401, generator=torch.Generator().manual_seed(6))).to(dtype)

    def differentiated(dp, gate, up):
        leaves = [x.clone().requires_grad_() for x in (gate, up)]
        activated = FUNCTIONS[name](leaves[0])
        product = activated * leaves[1]
        explained = product
        if identity:
            explained = share(leaves[0] * (activated / leaves[0]).detach() * leaves[1], scales[0])
        return product, *torch.autograd.grad(explained, leaves, dp)

    dp, gate, up = tensors.to(device)
    ours = gated_product(gate, up, name), *gated_product_backward(dp, gate, up, name, identity, *scales)
    assert all(x.dtype == dtype for x in ours)
    assert_as_good_as_torch(ours, differentiated(dp, gate, up), differentiated(*tensors.double()))


def test_nothing_in_nothing_out(fused, device):
    empty = torch.zeros(0, 8, device=device)
    assert activation_backward(empty, empty, "silu", True).shape == (0, 8)
    assert gated_product(empty, empty, "gelu").shape == (0, 8)
    assert gated_product_backward(empty, empty, empty, "gelu", True, 0.5, 0.5)[1].shape == (0, 8)


def test_ops_are_registered(fused, device):
    dp, gate, up = torch.randn(3, 5, 47, generator=torch.Generator().manual_seed(2)).to(device)
    ops = torch.ops.sparc3
    torch.library.opcheck(ops.activation_backward.default, (dp, gate, "gelu", True))
    torch.library.opcheck(ops.gated_product.default, (gate, up, "silu"))
    for identity in (True, False):
        torch.library.opcheck(
            ops.gated_product_backward.default, (dp, gate, up, "gelu_tanh", identity, 0.5, 0.5)
        )
