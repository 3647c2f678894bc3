"""Activations and gated products with the identity and half rules, in closed form.

For y = f(x) the identity rule passes relevance on unchanged, dx = dy * f(x)/x, and f(x)/x has a closed form for
every activation in use, so nothing is divided, nothing extra is saved, and fp16 is safe:

========== ==============================================
f          f(x)/x
========== ==============================================
relu       1[x > 0]
silu       sigmoid(x)
gelu       Phi(x)
gelu_tanh  (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2
quick_gelu sigmoid(1.702 x)
========== ==============================================

For p = f(gate) * up: dup = s_up * dp * f(gate), dgate = s_gate * dp * up * f(gate)/gate (or f'(gate)).
Source: AttnLRP (arXiv 2402.05602), identity rule and uniform rule.

Triton: f(gate) is recomputed, so the backward reads dp, gate and up once and writes both gradients in one pass (10
bytes an element in bf16). fp32 arithmetic; Phi is right to 2^-24 absolute, not in its tail relative to itself. Not
yet measured on a GPU.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparc3_kernels import triton_support as support
from sparc3_kernels.backend import choose
from sparc3_kernels.triton_support import jit, tl

_ROOT = math.sqrt(2.0 / math.pi)
_BLOCK = 1024  # elements a program: 16 bytes a thread and tensor in bf16


# ---- reference


def _normal_cdf(x: Tensor) -> Tensor:
    # erfc keeps the tail that 1 + erf loses to cancellation.
    return torch.erfc(x * -math.sqrt(0.5)).mul_(0.5)


def _tanh_cdf(x: Tensor) -> Tensor:
    # (1 + tanh(z)) / 2 = sigmoid(2 z), which does not cancel for negative z.
    return torch.sigmoid((2.0 * _ROOT) * (x + 0.044715 * x * x * x))


RATIO: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: (x > 0).to(x.dtype),
    "silu": torch.sigmoid,
    "gelu": _normal_cdf,
    "gelu_tanh": _tanh_cdf,
    "quick_gelu": lambda x: torch.sigmoid(1.702 * x),
}


def _quick_gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    # In this order nothing overflows in fp16: s (1 - s) is 0 where 1.702 x is infinite.
    return dy * (s + 1.702 * (x * (s * (1.0 - s))))


_DERIVATIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
    "silu": lambda dy, x: torch.ops.aten.silu_backward(dy, x),
    "gelu": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="none"),
    "gelu_tanh": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "quick_gelu": _quick_gelu_backward,
}
_FUNCTION: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def activation_backward_reference(dy: Tensor, x: Tensor, activation: str, identity: bool) -> Tensor:
    """dx in plain torch."""
    if identity:
        return dy * RATIO[activation](x)
    return _DERIVATIVE[activation](dy, x)


def gated_product_backward_reference(
    dp: Tensor, gate: Tensor, up: Tensor, activation: str, identity: bool, gate_scale: float, up_scale: float
) -> tuple[Tensor, Tensor]:
    """(dgate, dup) in plain torch."""
    dup = dp * _FUNCTION[activation](gate)
    if up_scale != 1.0:
        dup *= up_scale
    if gate_scale == 0.0:
        return torch.zeros_like(gate), dup
    product = dp * up
    if gate_scale != 1.0:
        product *= gate_scale
    return activation_backward_reference(product, gate, activation, identity), dup


# ---- Triton


@jit
def _ratio(x, ACTIVATION: tl.constexpr):
    """f(x)/x."""
    if ACTIVATION == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        return tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    elif ACTIVATION == "gelu_tanh":
        return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return tl.sigmoid(1.702 * x)


@jit
def _derivative(x, ACTIVATION: tl.constexpr):
    """f'(x) = r + x r'(x) with r = f(x)/x; sigmoid(-z) for 1 - sigmoid(z), which cancels."""
    r = _ratio(x, ACTIVATION)
    if ACTIVATION == "relu":
        return r
    elif ACTIVATION == "silu":
        return r + x * (r * tl.sigmoid(-x))
    elif ACTIVATION == "gelu":
        return r + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif ACTIVATION == "gelu_tanh":
        return r + x * (r * _ratio(-x, ACTIVATION)) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        return r + 1.702 * (x * (r * tl.sigmoid(-1.702 * x)))


@jit
def _activation_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, count, ACTIVATION: tl.constexpr, IDENTITY: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
    factor = _ratio(x, ACTIVATION) if IDENTITY else _derivative(x, ACTIVATION)
    tl.store(dx_ptr + place, (dy * factor).to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def _gated_product_kernel(
    gate_ptr,
    up_ptr,
    product_ptr,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    product = gate * _ratio(gate, ACTIVATION) * up
    tl.store(product_ptr + row * width + column, product.to(product_ptr.dtype.element_ty), mask=inside)


@jit
def _gated_product_backward_kernel(
    dp_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, width, gate_stride, up_stride, gate_scale, up_scale,
    ACTIVATION: tl.constexpr, IDENTITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dp = tl.load(dp_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    factor = _ratio(gate, ACTIVATION)
    dup = up_scale * dp * (gate * factor)
    if not IDENTITY:
        factor = _derivative(gate, ACTIVATION)
    dgate = gate_scale * dp * (up * factor)
    tl.store(dgate_ptr + row * width + column, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + row * width + column, dup.to(dup_ptr.dtype.element_ty), mask=inside)


def _activation_backward_triton(dy: Tensor, x: Tensor, activation: str, identity: bool) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        grid = (support.ceil_div(x.numel(), _BLOCK),)
        support.launch(
            _activation_backward_kernel, grid, dy, x, dx, x.numel(),
            ACTIVATION=activation, IDENTITY=identity, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return dx


def _rows(x: Tensor) -> Tensor:
    """[rows, I] view, or copy, whose last dimension is contiguous; halves of one tensor keep their stride."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _gated_product_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    product = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _rows(gate), _rows(up)
    if product.numel():
        rows, width = gate.shape
        grid = (rows, support.ceil_div(width, _BLOCK))
        support.launch(
            _gated_product_kernel, grid, gate, up, product, width, gate.stride(0), up.stride(0),
            ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return product


def _gated_product_backward_triton(
    dp: Tensor, gate: Tensor, up: Tensor, activation: str, identity: bool, gate_scale: float, up_scale: float
) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    dp, gate, up = dp.contiguous(), _rows(gate), _rows(up)
    if dgate.numel():
        rows, width = gate.shape
        grid = (rows, support.ceil_div(width, _BLOCK))
        support.launch(
            _gated_product_backward_kernel, grid, dp, gate, up, dgate, dup, width, gate.stride(0), up.stride(0),
            gate_scale, up_scale, ACTIVATION=activation, IDENTITY=identity, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return dgate, dup


# ---- ops

torch.library.define(
    "sparc3::activation_backward", "(Tensor dy, Tensor x, str activation, bool identity) -> Tensor"
)
torch.library.define("sparc3::gated_product", "(Tensor gate, Tensor up, str activation) -> Tensor")
torch.library.define(
    "sparc3::gated_product_backward",
    "(Tensor dp, Tensor gate, Tensor up, str activation, bool identity, float gate_scale, float up_scale) "
    "-> (Tensor, Tensor)",
)


@torch.library.impl("sparc3::activation_backward", "default")
def _activation_backward(dy: Tensor, x: Tensor, activation: str, identity: bool) -> Tensor:
    if choose("activation_backward", {"triton": support.unfit(dy, x)}) == "triton":
        return _activation_backward_triton(dy, x, activation, identity)
    return activation_backward_reference(dy, x, activation, identity).contiguous()


@torch.library.register_fake("sparc3::activation_backward")
def _activation_backward_fake(dy: Tensor, x: Tensor, activation: str, identity: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("sparc3::gated_product", "default")
def _gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if choose("gated_product", {"triton": support.unfit(gate, up)}) == "triton":
        return _gated_product_triton(gate, up, activation)
    return (_FUNCTION[activation](gate) * up).contiguous()


@torch.library.register_fake("sparc3::gated_product")
def _gated_product_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.impl("sparc3::gated_product_backward", "default")
def _gated_product_backward(
    dp: Tensor, gate: Tensor, up: Tensor, activation: str, identity: bool, gate_scale: float, up_scale: float
) -> tuple[Tensor, Tensor]:
    arguments = (dp, gate, up, activation, identity, gate_scale, up_scale)
    if choose("gated_product_backward", {"triton": support.unfit(dp, gate, up)}) == "triton":
        return _gated_product_backward_triton(*arguments)
    dgate, dup = gated_product_backward_reference(*arguments)
    return dgate.contiguous(), dup.contiguous()


@torch.library.register_fake("sparc3::gated_product_backward")
def _gated_product_backward_fake(
    dp: Tensor, gate: Tensor, up: Tensor, activation: str, identity: bool, gate_scale: float, up_scale: float
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def activation_backward(dy: Tensor, x: Tensor, activation: str, identity: bool) -> Tensor:
    """dx of y = f(x), by the identity rule or by the plain derivative.

    Args:
        dy, x: [...] of one dtype.
        activation: a key of ``RATIO``.
        identity: True for dx = dy f(x)/x, False for dx = dy f'(x).
    """
    return torch.ops.sparc3.activation_backward(dy, x, activation, identity)


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up, rounded once where Triton runs it.

    Args:
        gate, up: [..., I]; the last dimension is read best where it is contiguous.
        activation: a key of ``RATIO``.
    """
    return torch.ops.sparc3.gated_product(gate, up, activation)


def gated_product_backward(
    dp: Tensor, gate: Tensor, up: Tensor, activation: str, identity: bool, gate_scale: float, up_scale: float
) -> tuple[Tensor, Tensor]:
    """(dgate, dup) of p = f(gate) * up.

    Args:
        dp, gate, up: [..., I].
        activation, identity: as in ``activation_backward``.
        gate_scale, up_scale: shares of the two factors: 1/2 each for the uniform rule, 1 each for the gradient.
    """
    return torch.ops.sparc3.gated_product_backward(dp, gate, up, activation, identity, gate_scale, up_scale)
