"""Norms and gated MLPs for bench/gpu.py: bound by memory bandwidth, so their floor is the bytes that they move.

Liger-Kernel takes part in the forwards alone. Its backwards follow no relevance rule, and those of gated products
write into their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_case import Case, Implementation, Made, compiled, normal
from sparc3_kernels.gated_mlp import gated_product, gated_product_backward, gated_product_backward_reference
from sparc3_kernels.norm import layer_norm, rms_norm, rms_norm_backward
from torch.nn import functional as F


def _with_peers(ours: Implementation, eager: Implementation, dry: bool) -> dict[str, Implementation]:
    """Ours, the same by hand, and that by torch.compile."""
    return {"sparc3": ours, "eager": eager, "torch.compile": lambda *inputs: compiled(eager, dry)(*inputs)}


def _norm_backward(tokens: int, width: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        dy, x, weight = normal(device, rows, d), normal(device, rows, d), normal(device, d)
        _, _, scale = rms_norm(x, weight, 1e-6)

        def ours(dy: Any, x: Any, weight: Any, scale: Any) -> tuple[torch.Tensor, ...]:
            return (rms_norm_backward(dy, x, weight, 1e-6, 0.0, 0.0, scale),)

        def eager(dy: Any, x: Any, weight: Any, scale: Any) -> tuple[torch.Tensor, ...]:
            return ((dy.float() * weight.float() * scale[:, None]).to(dy.dtype),)

        implementations = _with_peers(ours, eager, dry)
        return Made([dy, x, weight, scale], eager, implementations, bytes=4 * rows * d, short=True)

    return Case(f"RMSNorm backward, scale constant, {tokens}x{width}", make)


def _rms_norm(tokens: int, width: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        x, weight = normal(device, rows, d), normal(device, d)

        def eager(x: Any, weight: Any) -> tuple[torch.Tensor, ...]:
            return (F.rms_norm(x.float(), (d,), weight.float(), 1e-6).to(x.dtype),)

        def liger(x: Any, weight: Any) -> tuple[torch.Tensor, ...]:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            return (LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False),)

        implementations = _with_peers(lambda x, weight: rms_norm(x, weight, 1e-6)[:1], eager, dry)
        implementations["Liger-Kernel"] = liger
        return Made([x, weight], eager, implementations, bytes=4 * rows * d, short=True)

    return Case(f"RMSNorm forward {tokens}x{width}", make)


def _residual_norm(tokens: int, width: int) -> Case:
    """The norm after a residual addition, and their sum, which goes on beside it."""

    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        x, residual, weight = normal(device, rows, d), normal(device, rows, d), normal(device, d)

        def ours(x: Any, residual: Any, weight: Any) -> tuple[torch.Tensor, ...]:
            return rms_norm(x, weight, 1e-6, residual=residual)[:2]

        def eager(x: Any, residual: Any, weight: Any) -> tuple[torch.Tensor, ...]:
            total = x + residual
            return F.rms_norm(total.float(), (d,), weight.float(), 1e-6).to(x.dtype), total

        def liger(x: Any, residual: Any, weight: Any) -> tuple[torch.Tensor, ...]:
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

            return LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6, 0.0, "llama", False)

        implementations = _with_peers(ours, eager, dry)
        implementations["Liger-Kernel"] = liger
        return Made([x, residual, weight], eager, implementations, bytes=8 * rows * d, short=True)

    return Case(f"residual addition and RMSNorm forward {tokens}x{width}", make)


def _layer_norm(tokens: int, width: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        x, weight, bias = normal(device, rows, d), normal(device, d), normal(device, d)

        def eager(x: Any, weight: Any, bias: Any) -> tuple[torch.Tensor, ...]:
            return (F.layer_norm(x, (d,), weight, bias, 1e-5),)

        def liger(x: Any, weight: Any, bias: Any) -> tuple[torch.Tensor, ...]:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return (LigerLayerNormFunction.apply(x, weight, bias, 1e-5),)

        implementations = _with_peers(lambda *inputs: layer_norm(*inputs, 1e-5)[:1], eager, dry)
        implementations["Liger-Kernel"] = liger
        return Made([x, weight, bias], eager, implementations, bytes=4 * rows * d, short=True)

    return Case(f"LayerNorm forward {tokens}x{width}", make)


_ACTIVATIONS = {"SwiGLU": ("silu", F.silu), "GeGLU": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))}


def _gated(name: str, tokens: int, width: int) -> Case:
    activation, function = _ACTIVATIONS[name]

    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        gate, up = (normal(device, rows, d) for _ in range(2))

        def reference(gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            return (function(gate.float()) * up.float(),)

        def eager(gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            return (function(gate) * up,)

        def liger(gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            if activation == "silu":
                from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Product
            else:
                from liger_kernel.ops.geglu import LigerGELUMulFunction as Product
            return (Product.apply(gate, up),)

        implementations = _with_peers(lambda gate, up: (gated_product(gate, up, activation),), eager, dry)
        implementations["Liger-Kernel"] = liger
        return Made([gate, up], reference, implementations, bytes=6 * rows * d, short=True)

    return Case(f"{name} forward {tokens}x{width}", make)


def _gated_backward(name: str, tokens: int, width: int) -> Case:
    activation = _ACTIVATIONS[name][0]

    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        dp, gate, up = (normal(device, rows, d) for _ in range(3))

        def reference(dp: Any, gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            wide = (x.float() for x in (dp, gate, up))
            return gated_product_backward_reference(*wide, activation, True, 0.5, 0.5)

        def eager(dp: Any, gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            return gated_product_backward_reference(dp, gate, up, activation, True, 0.5, 0.5)

        def ours(dp: Any, gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            return gated_product_backward(dp, gate, up, activation, True, 0.5, 0.5)

        implementations = _with_peers(ours, eager, dry)
        return Made([dp, gate, up], reference, implementations, bytes=10 * rows * d, short=True)

    return Case(f"{name} backward, identity and half rule, {tokens}x{width}", make)


def norm_cases() -> list[Case]:
    """The smallest and the largest width of the models of today."""
    return [
        _norm_backward(2048, 4096),
        _norm_backward(8192, 8192),
        _rms_norm(2048, 4096),
        _rms_norm(8192, 8192),
        _residual_norm(8192, 4096),
        _layer_norm(8192, 4096),
    ]


def gated_mlp_cases() -> list[Case]:
    """Likewise."""
    return [
        _gated_backward("SwiGLU", 2048, 11008),
        _gated_backward("SwiGLU", 8192, 28672),
        _gated_backward("GeGLU", 4096, 14336),
        _gated("SwiGLU", 2048, 11008),
        _gated("SwiGLU", 8192, 28672),
        _gated("GeGLU", 4096, 14336),
    ]
