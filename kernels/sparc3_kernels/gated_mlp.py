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
Source: AttnLRP (arXiv 2402.05602), identity rule and uniform rule. Runs on any device in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_ROOT = math.sqrt(2.0 / math.pi)


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    # erfc keeps the tail that 1 + erf loses to cancellation.
    return torch.erfc(x * -math.sqrt(0.5)).mul_(0.5)


def _tanh_cdf(x: torch.Tensor) -> torch.Tensor:
    # (1 + tanh(z)) / 2 = sigmoid(2 z), which does not cancel for negative z.
    return torch.sigmoid((2.0 * _ROOT) * (x + 0.044715 * x * x * x))


RATIO: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": lambda x: (x > 0).to(x.dtype),
    "silu": torch.sigmoid,
    "gelu": _normal_cdf,
    "gelu_tanh": _tanh_cdf,
    "quick_gelu": lambda x: torch.sigmoid(1.702 * x),
}


def _quick_gelu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(1.702 * x)
    # In this order nothing overflows in fp16: s (1 - s) is 0 where 1.702 x is infinite.
    return dy * (s + 1.702 * (x * (s * (1.0 - s))))


_DERIVATIVE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
    "silu": lambda dy, x: torch.ops.aten.silu_backward(dy, x),
    "gelu": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="none"),
    "gelu_tanh": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "quick_gelu": _quick_gelu_backward,
}


def activation_backward(dy: torch.Tensor, x: torch.Tensor, activation: str, identity: bool) -> torch.Tensor:
    """dx of y = f(x), by the identity rule or by the plain derivative.

    Args:
        dy, x: [...] of one dtype.
        activation: a key of ``RATIO``.
        identity: True for dx = dy f(x)/x, False for dx = dy f'(x).
    """
    if identity:
        return dy * RATIO[activation](x)
    return _DERIVATIVE[activation](dy, x)


def gated_product_backward(
    dp: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activated: torch.Tensor,
    activation: str,
    identity: bool,
    gate_scale: float,
    up_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) of p = f(gate) * up.

    Args:
        dp, gate, up: [..., I].
        activated: f(gate), [..., I].
        activation, identity: as in ``activation_backward``.
        gate_scale, up_scale: shares of the two factors: 1/2 each for the uniform rule, 1 each for the gradient.
    """
    dup = dp * activated
    if up_scale != 1.0:
        dup *= up_scale
    if gate_scale == 0.0:
        return torch.zeros_like(gate), dup
    product = dp * up
    if gate_scale != 1.0:
        product *= gate_scale
    return activation_backward(product, gate, activation, identity), dup
