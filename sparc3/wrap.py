"""Put LRP rules on one model instance, and take them off again.

Everything is set on instances (their ``forward``) or under names of our own (an attention function
``sparc3_sdpa`` that calls ``sdpa``); no class and no existing registry entry is touched. On the reference
backend the forward runs the model's own code, so logits are unchanged to the last bit; elsewhere they agree to
rounding: on the CPU large fp32 linears run in kernels and short attention of 16 bit in fp32, on a GPU norms, gated
products and attention (sparc3.fused) run in kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from sparc3_kernels.backend import forced
from sparc3_kernels.gated_mlp import gated_product
from sparc3_kernels.norm import layer_norm_backward, rms_norm_backward
from sparc3_kernels.triton_support import fused
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparc3 import autograd
from sparc3 import fused as fused_parts
from sparc3.autograd import Recomputed, WeightSink, scale_gradient
from sparc3.families import Family, Prunable, activation_name, blocks_of, family_of, find
from sparc3.rules import Rule

_ATTENTION_PREFIX = "sparc3_"
# Tokens up to which sdpa goes forward and back faster in fp32 than in bf16 on a CPU: 1.9 times as fast at 128, 1.6 at
# 160, level at 192, 0.9 times at 256 (9 heads of 64, two cores of a Xeon with AMX).
_SHORT = 160


@contextmanager
def wrap(
    model: PreTrainedModel,
    rule: Rule,
    weights: Mapping[str, Prunable] | None = None,
    sink: WeightSink | None = None,
) -> Iterator[None]:
    """Within the context, the backward through ``model`` follows ``rule``.

    Parameters need no gradient inside, and the model is in eval mode; both are restored.

    Args:
        model: a causal language model of a declared family.
        rule: the rules.
        weights: the weights whose (g, x) go to ``sink``, by name. None: none.
        sink: where they go.

    Raises:
        InputError: the architecture or its activation is not known.
    """
    family = family_of(model)
    names = {id(weight.module): weight for weight in (weights or {}).values()}
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        in_triton = fused(next(model.parameters()))
        stack.enter_context(_attention(model, family, rule, in_triton))
        replace = partial(_replace_forward, stack)
        for path, module in model.named_modules():
            if path.endswith(("q_norm", "k_norm")) or is_norm(module):
                inner = path.endswith(("q_norm", "k_norm"))
                share = rule.qknorm_scale_gradient if inner else rule.norm_scale_gradient
                if in_triton:
                    replace(module, partial(_fused_norm, fused_parts.norm(module, family, share)))
                else:
                    replace(module, partial(_norm, _norm_backward(module, family, share)))
            elif id(module) in names and names[id(module)].attribute == "weight":
                assert sink is not None
                replace(module, partial(_linear, module, names[id(module)], sink))
        for index, block in enumerate(blocks_of(model)):
            experts = find(block, family.experts)
            if experts is not None:
                prefix = f"{family.blocks}.{index}.{family.experts}"
                replace(experts, partial(_experts, experts, rule, prefix, weights or {}, sink))
            elif (mlp := find(block, family.mlp)) is not None:
                replace(mlp, partial(_gated_mlp, mlp, family, rule, in_triton))
            else:
                activation: Any = find(block, family.activation)
                kind = activation_name(activation)
                replace(activation, partial(_activation, kind, rule.activation_identity))
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode and no parameter needs a gradient; both are restored."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if training:
        model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


def _replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """module(*args) becomes forward(original, *args) until the stack closes."""
    # Past nn.Module's __setattr__, which looks for parameters first: half of what wrapping a small model takes.
    own = vars(module)
    previous = own.get("forward")
    own["forward"] = partial(forward, module.forward)
    if previous is None:
        stack.callback(own.pop, "forward")
    else:
        stack.callback(own.__setitem__, "forward", previous)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm of some family or a LayerNorm."""
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")


def _norm_backward(
    module: Any, family: Family, scale_gradient: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    if family.norm == "layer":
        return lambda dy, x: layer_norm_backward(dy, x, module.weight, module.eps, scale_gradient)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    offset = 1.0 if family.norm == "rms+1" else 0.0
    return lambda dy, x: rms_norm_backward(dy, x, module.weight, eps, offset, scale_gradient)


def _norm(
    backward: Callable[..., torch.Tensor], forward: Callable[..., torch.Tensor], x: torch.Tensor
) -> Any:
    y = autograd.Norm.apply(x, forward, backward)
    return Recomputed.attach(y, lambda: forward(x.detach()))


def _fused_norm(
    norm: Callable[[torch.Tensor], torch.Tensor], _: Callable[..., torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    return Recomputed.attach(norm(x), lambda: norm(x.detach()))


def _linear(
    module: nn.Module,
    weight: Prunable,
    sink: WeightSink,
    forward: Callable[..., torch.Tensor],
    x: torch.Tensor,
) -> Any:
    recomputed = getattr(x, "_sparc3_recompute", None)
    forward = autograd.linear_forward(module, forward)
    return autograd.Linear.apply(x, recomputed, forward, weight.canonical(weight.weight), weight.name, sink)


def _activation(kind: str, identity: bool, forward: Callable[..., torch.Tensor], x: torch.Tensor) -> Any:
    y = autograd.Activation.apply(x, forward, kind, identity)
    return Recomputed.attach(y, lambda: forward(x.detach()))


def _gated_mlp(
    mlp: nn.Module, family: Family, rule: Rule, in_triton: bool, _: Callable[..., Any], x: torch.Tensor
) -> Any:
    activation = mlp.get_submodule(family.activation.removeprefix(f"{family.mlp}."))
    down = mlp.get_submodule(family.mlp_output.removeprefix(f"{family.mlp}."))
    if family.up is None:
        gate, up = mlp.get_submodule(family.gate)(x).chunk(2, dim=-1)
    else:
        gate, up = mlp.get_submodule(family.gate)(x), mlp.get_submodule(family.up)(x)
    kind = activation_name(activation)

    def multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gated_product(gate, up, kind) if in_triton else activation(gate) * up

    product = autograd.GatedProduct.apply(
        gate, up, multiply, kind, rule.activation_identity, rule.product_scales
    )
    return down(Recomputed.attach(product, lambda: multiply(gate.detach(), up.detach())))


def _experts(
    module: Any,
    rule: Rule,
    prefix: str,
    weights: Mapping[str, Prunable],
    sink: WeightSink | None,
    forward: Callable[..., torch.Tensor],
    x: torch.Tensor,
    index: torch.Tensor,
    router_weights: torch.Tensor,
) -> Any:
    names = tuple(
        name if (name := f"{prefix}.{attribute}") in weights else None
        for attribute in ("gate_up_proj", "down_proj")
    )
    kind = activation_name(module.act_fn)
    return autograd.Experts.apply(
        x,
        router_weights,
        index,
        module,
        forward,
        kind,
        rule.activation_identity,
        rule.product_scales,
        names,
        sink,
    )


@contextmanager
def _attention(model: PreTrainedModel, family: Family, rule: Rule, in_triton: bool) -> Iterator[None]:
    implementation = model.config._attn_implementation
    if in_triton and fused_parts.takes_attention(model, rule):
        name = fused_parts.register_attention()
    else:
        name = _register_attention(implementation)
    modules: list[Any] = [find(block, family.attention) for block in blocks_of(model)]
    outer = [vars(module).get("_sparc3_scales") for module in modules]
    for module in modules:
        module._sparc3_scales = rule.attention_scales
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = implementation
        for module, scales in zip(modules, outer, strict=True):
            if scales is None:
                del module._sparc3_scales
            else:
                module._sparc3_scales = scales


def _faster_in_fp32(query: torch.Tensor) -> bool:
    """Whether torch's sdpa for a CPU goes forward and back faster in fp32 than in its 16 bit.

    Whether there is a graph has no say: a block that is run again is to give the same bits.
    """
    sixteen_bit = query.dtype in (torch.bfloat16, torch.float16)
    short = query.shape[-2] <= _SHORT
    return query.device.type == "cpu" and sixteen_bit and short and forced() != "reference"


def _register_attention(implementation: str) -> str:
    """Register an attention function of our own that scales the gradients of q, k, v and calls the given one, in fp32
    where that is faster."""
    if implementation.startswith(_ATTENTION_PREFIX):
        return implementation
    name = _ATTENTION_PREFIX + implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> Any:
        if implementation == "eager":
            function = fused_parts.eager_attention(module)
        else:
            function = ALL_ATTENTION_FUNCTIONS[implementation]
        # Set by sparc3.conservation: nowhere else are queries and keys as they enter the scores.
        if (watch := getattr(module, "_sparc3_watch", None)) is not None:
            watch(query, key, value)
        scales = getattr(module, "_sparc3_scales", (1.0, 1.0, 1.0))
        scaled = (scale_gradient(x, scale) for x, scale in zip((query, key, value), scales, strict=True))
        if implementation == "sdpa" and _faster_in_fp32(query):
            wide = mask.float() if isinstance(mask, torch.Tensor) and mask.is_floating_point() else mask
            out, weights = function(module, *(x.float() for x in scaled), wide, **kwargs)
            return out.to(query.dtype), weights
        return function(module, *scaled, mask, **kwargs)

    AttentionInterface.register(name, attention)
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name
