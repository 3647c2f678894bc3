"""The model's own forward with an LRP backward, one autograd function a part.

Each calls the model's own code in its forward (a large fp32 linear on the CPU: our kernel), and saves as little as
its backward needs: norms and products are recomputed from their inputs instead of being kept as the inputs of the
linears that follow (see ``Recomputed``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from sparc3_kernels.attention import attention
from sparc3_kernels.attention_backward import attention_backward
from sparc3_kernels.gated_mlp import activation_backward, gated_product_backward
from sparc3_kernels.linear import input_gradient, linear
from sparc3_kernels.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from torch.nn import functional as F


class WeightSink(Protocol):
    """Takes what the relevance of a weight is made of, in the backward of its linear."""

    def linear(self, name: str, g: torch.Tensor, x: torch.Tensor) -> None:
        """g: [tokens, N] gradient of the output, x: [tokens, K] input; tokens are sample-major."""

    def expert(self, name: str, index: int, g: torch.Tensor, x: torch.Tensor, tokens: torch.Tensor) -> None:
        """The same for one expert; tokens: [t] ascending indices of the tokens that it saw."""


# Bytes below which keeping a tensor costs less than its recomputation.
_WORTH_RECOMPUTING = 1 << 22


class Recomputed:
    """A linear's input that is cheaper to recompute in the backward than to keep.

    It rides on the tensor (attribute ``_sparc3_recompute``) from the function that made it to the linears that
    use it, which keep it instead of the tensor; the value lives from the first to the last use in the backward.
    """

    def __init__(self, function: Callable[[], torch.Tensor]) -> None:
        self.function = function
        self.uses = 0
        self.value: torch.Tensor | None = None

    @classmethod
    def attach(cls, tensor: torch.Tensor, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        if tensor.requires_grad and tensor.nbytes >= _WORTH_RECOMPUTING:
            tensor._sparc3_recompute = cls(function)  # type: ignore[attr-defined]
        return tensor

    def take(self) -> torch.Tensor:
        value = self.function() if self.value is None else self.value
        self.uses -= 1
        self.value = value if self.uses > 0 else None
        return value


class Linear(torch.autograd.Function):
    """A linear whose backward hands (g, x) to a sink instead of forming a weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        recomputed: Recomputed | None,
        forward: Callable[[torch.Tensor], torch.Tensor],
        weight: torch.Tensor,
        name: str,
        sink: WeightSink,
    ) -> torch.Tensor:
        """weight: canonical [N, K] view."""
        ctx.name, ctx.sink, ctx.weight, ctx.recomputed = name, sink, weight, recomputed
        if recomputed is None:
            ctx.save_for_backward(x)
        else:
            recomputed.uses += 1
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (g,) = grads
        x = ctx.saved_tensors[0] if ctx.recomputed is None else ctx.recomputed.take()
        rows = g.reshape(-1, g.shape[-1])
        ctx.sink.linear(ctx.name, rows, x.reshape(-1, x.shape[-1]))
        dx = input_gradient(rows, ctx.weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None


class Unscored(torch.autograd.Function):
    """A linear whose weight is neither scored nor learns."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor
    ) -> torch.Tensor:
        """weight: [N, K]."""
        ctx.weight = weight
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (g,) = grads
        dx = input_gradient(g.reshape(-1, g.shape[-1]), ctx.weight)
        return dx.view(*g.shape[:-1], ctx.weight.shape[1]), None, None


def linear_forward(
    module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``forward``, or where it is nn.Linear's own, in fp32 on the CPU, the faster kernel for it."""
    weight, bias = module.weight, getattr(module, "bias", None)
    own = getattr(forward, "__func__", None) is torch.nn.Linear.forward
    if not own or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return forward

    def run(x: torch.Tensor) -> torch.Tensor:
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    return run


class Norm(torch.autograd.Function):
    """A norm with its scale held constant or not; saves its input alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        forward: Callable[[torch.Tensor], torch.Tensor],
        backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.norm_backward = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.norm_backward(grads[0], *ctx.saved_tensors), None, None


class FusedRMSNorm(torch.autograd.Function):
    """The same in one kernel each way; saves its scale, and its input only where the scale is differentiated."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, scale_gradient: float
    ) -> torch.Tensor:
        y, _, scale = rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(weight, scale, x if scale_gradient else None)
        ctx.numbers = eps, offset, scale_gradient
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        weight, scale, x = ctx.saved_tensors
        (dy,), (eps, offset, scale_gradient) = grads, ctx.numbers
        x = dy if x is None else x  # not read where the scale is constant
        return rms_norm_backward(dy, x, weight, eps, offset, scale_gradient, scale), None, None, None, None


class FusedLayerNorm(torch.autograd.Function):
    """The same of a LayerNorm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        scale_gradient: float,
    ) -> torch.Tensor:
        y, _, scale = layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(weight, scale, x if scale_gradient else None)
        ctx.numbers = eps, scale_gradient
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        weight, scale, x = ctx.saved_tensors
        (dy,), (eps, scale_gradient) = grads, ctx.numbers
        x = dy if x is None else x  # not read where the scale is constant
        return layer_norm_backward(dy, x, weight, eps, scale_gradient, scale), None, None, None, None


class Attention(torch.autograd.Function):
    """The attention of sparc3_kernels, factors on the gradients of q, k, v; saves these, its output and lse."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        begin: torch.Tensor | None,
        end: torch.Tensor | None,
        scale: float | None,
        causal: bool,
        window: int,
        softcap: float,
        scales: tuple[float, float, float],
    ) -> torch.Tensor:
        """[B, T, H, D] of q [B, H, T, D] and k, v [B, H_kv, T, D]; the rest as in sparc3_kernels.attention."""
        settings: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
        out, lse = attention(q, k, v, begin=begin, end=end, **settings)
        ctx.save_for_backward(q, k, v, out, lse, begin, end)
        ctx.settings, ctx.scales = settings, scales
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, out, lse, begin, end = ctx.saved_tensors
        q_scale, k_scale, v_scale = ctx.scales
        dq, dk, dv, _ = attention_backward(
            *(grads[0], q, k, v, out, lse),
            **ctx.settings,
            begin=begin,
            end=end,
            q_scale=q_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            need_qk=q_scale != 0.0 or k_scale != 0.0,
        )
        return dq, dk, dv, None, None, None, None, None, None, None


class Activation(torch.autograd.Function):
    """y = f(x) with the identity rule or the plain derivative; saves x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor], kind: str, identity: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.identity = kind, identity
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return activation_backward(grads[0], x, ctx.kind, ctx.identity), None, None, None


class GatedProduct(torch.autograd.Function):
    """p = f(gate) * up; saves gate and up alone."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        kind: str,
        identity: bool,
        scales: tuple[float, float],
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.identity, ctx.scales = kind, identity, scales
        return product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dgate, dup = gated_product_backward(grads[0], gate, up, ctx.kind, ctx.identity, *ctx.scales)
        return dgate, dup, None, None, None, None


class Experts(torch.autograd.Function):
    """Fused 3-D experts; the backward recomputes each expert's hidden neurons from the block's input.

    y_t = sum_k w_tk down_e(f(gate_e x_t) * up_e x_t). The product with the router weight takes the same shares
    as the gated product: (router weight, expert output) = ``scales``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        router_weights: torch.Tensor,
        index: torch.Tensor,
        module: torch.nn.Module,
        forward: Callable[..., torch.Tensor],
        kind: str,
        identity: bool,
        scales: tuple[float, float],
        names: tuple[str | None, str | None],
        sink: WeightSink | None,
    ) -> torch.Tensor:
        """x: [t, D]; router_weights, index: [t, k]; names: of gate_up_proj and down_proj, None where not scored."""
        ctx.save_for_backward(x, router_weights, index)
        ctx.module, ctx.kind, ctx.identity, ctx.scales = module, kind, identity, scales
        ctx.names, ctx.sink = names, sink
        return forward(x, index, router_weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, router_weights, index = ctx.saved_tensors
        (dy,) = grads
        gate_up_name, down_name = ctx.names
        router_scale, output_scale = ctx.scales
        dx, drouter = torch.zeros_like(x), torch.zeros_like(router_weights)
        for expert in torch.unique(index).tolist():
            if expert >= ctx.module.gate_up_proj.shape[0]:
                continue
            tokens, slots = torch.where(index == expert)
            inputs, g = x[tokens], dy[tokens]
            gate_up, down = ctx.module.gate_up_proj[expert], ctx.module.down_proj[expert]
            gate, up = F.linear(inputs, gate_up).chunk(2, dim=-1)
            product = ctx.module.act_fn(gate) * up
            if router_scale:
                output = F.linear(product, down)
                drouter[tokens, slots] = router_scale * (output * g).sum(-1).to(drouter.dtype)
            g = g * (output_scale * router_weights[tokens, slots, None]).to(g.dtype)
            if ctx.sink is not None and down_name is not None:
                ctx.sink.expert(down_name, expert, g, product, tokens)
            dgate, dup = gated_product_backward(g @ down, gate, up, ctx.kind, ctx.identity, *ctx.scales)
            g = torch.cat([dgate, dup], dim=-1)
            if ctx.sink is not None and gate_up_name is not None:
                ctx.sink.expert(gate_up_name, expert, g, inputs, tokens)
            dx.index_add_(0, tokens, g @ gate_up)
        return dx, drouter, None, None, None, None, None, None, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.scale, None


def scale_gradient(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x forward, ``scale`` times the gradient backward; cuts the graph where the scale is 0."""
    if scale == 1.0:
        return x
    return x.detach() if scale == 0.0 else _ScaleGradient.apply(x, scale)
