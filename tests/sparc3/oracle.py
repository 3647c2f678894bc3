"""An independent reference: LRP by plain autograd through the model's eager code, `.grad` and all.

The rules are written as value-preserving expressions (`half(x) = x/2 + (x/2).detach()` and the like), not as
custom backwards, and the whole model is one graph, so nothing is shared with sparc3.wrap or sparc3.engine.
"""

import sys
from contextlib import contextmanager
from copy import deepcopy
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from sparc3.families import family_of


def share(x, part):
    return x * part + (x * (1 - part)).detach()


def rms_norm(x, weight, eps, offset, constant):
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (scale.detach() if constant else scale) * (offset + weight.to(wide.dtype))).to(x.dtype)


def layer_norm(x, weight, bias, eps, constant):
    centred = x - x.mean(-1, keepdim=True)
    std = torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    y = centred / (std.detach() if constant else std)
    return y if weight is None else y * weight + bias


def activation(function, x, identity):
    if not identity:
        return function(x)
    # Away from 0 the quotient is exact enough; at 0 every f has f(0) = 0 and the limit does not matter here.
    y = function(x)
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return x * (y / safe).detach()


def _own_linear(module, name, x, expert):
    """x [t, K] times an expert's weight, plus what each token owns of it (see token_gradients)."""
    y = F.linear(x, getattr(module, name)[expert])
    own = vars(module).get("own", {}).get(name)
    return y if own is None else y + torch.einsum("tk,tnk->tn", x, own[:, expert])


@contextmanager
def reference_rules(model, rule):
    family = family_of(model)
    q, k, v = rule.attention_scales
    first, second = rule.product_scales
    patches = []

    def replace(module, forward):
        patches.append(patch.object(module, "forward", forward))

    for path, module in model.named_modules():
        inner = path.endswith(("q_norm", "k_norm"))
        constant = (rule.qknorm if inner else rule.norm) == "constant"
        if isinstance(module, nn.LayerNorm):
            replace(
                module,
                lambda x, m=module, c=constant: layer_norm(x, m.weight, m.bias, m.eps, c),
            )
        elif type(module).__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", None) or module.eps
            offset = 1.0 if family.norm == "rms+1" else 0.0
            replace(module, lambda x, m=module, e=eps, o=offset, c=constant: rms_norm(x, m.weight, e, o, c))
        elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and path.endswith("experts"):

            def experts(x, index, router, m=module):
                y = torch.zeros_like(x)
                for e in range(m.gate_up_proj.shape[0]):
                    picked = (index == e).to(x.dtype) * router
                    gate, up = _own_linear(m, "gate_up_proj", x, e).chunk(2, -1)
                    gate = share(activation(m.act_fn, gate, rule.activation_identity), first)
                    out = _own_linear(m, "down_proj", gate * share(up, second), e)
                    y = y + share(picked.sum(-1, keepdim=True), first) * share(out, second)
                return y

            replace(module, experts)
        elif type(module).__name__.endswith("MLP") and family.mlp is not None:

            def gated(x, m=module):
                act = getattr(m, "act_fn", None) or m.activation_fn
                if hasattr(m, "gate_up_proj"):
                    gate, up = m.gate_up_proj(x).chunk(2, -1)
                else:
                    gate, up = m.gate_proj(x), m.up_proj(x)
                gate = share(activation(act, gate, rule.activation_identity), first)
                return m.down_proj(gate * share(up, second))

            replace(module, gated)
        elif family.mlp is None and path.endswith(family.activation):
            function = module.forward
            replace(module, lambda x, f=function: activation(f, x, rule.activation_identity))
    modeling = sys.modules[type(model).__module__]
    eager = modeling.eager_attention_forward
    patches.append(
        patch.object(
            modeling,
            "eager_attention_forward",
            lambda m, a, b, c, mask, **kw: eager(m, share(a, q), share(b, k), share(c, v), mask, **kw),
        )
    )
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    for item in patches:
        item.start()
    try:
        yield
    finally:
        for item in patches:
            item.stop()
        model.config._attn_implementation = implementation


def weight_gradients(model, batch, rule, target, dtype=torch.float64):
    """(values [B], {name: gradient as stored}) of target(logits, batch), from a copy in ``dtype``."""
    copy = deepcopy(model).to(dtype)
    for parameter in copy.parameters():
        parameter.requires_grad_(True)
    with reference_rules(copy, rule):
        value = target(_logits(copy, batch), batch)
        value.sum().backward()
    return value.detach(), {name: p.grad for name, p in copy.named_parameters() if p.grad is not None}


def residual_gradients(model, batch, rule, target, dtype=torch.float64):
    """[(stream, gradient)] of what enters each block and, last, leaves the last one; all [B, T, D]."""
    copy = deepcopy(model).to(dtype)
    streams = []

    def keep(stream):
        stream = stream[0] if isinstance(stream, tuple) else stream
        if not stream.requires_grad:  # OPT and GPT-2 add positions: the first stream is no parameter's own
            stream.requires_grad_()
        stream.retain_grad()
        streams.append(stream)

    blocks = copy.get_submodule(family_of(copy).blocks)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: keep(args[0]))
    blocks[-1].register_forward_hook(lambda module, args, output: keep(output))
    with reference_rules(copy, rule):
        target(_logits(copy, batch), batch).sum().backward()
    return [(stream.detach(), stream.grad) for stream in streams]


def token_gradients(model, sample, rule, target, names, dtype=torch.float64):
    """{name: [T, ..., N, K]} of one sample [1, T]: a weight's gradient with every token given one of its
    own."""
    copy = deepcopy(model).to(dtype)
    own = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        module, parameter = copy.get_submodule(path), copy.get_parameter(name)
        shape = (sample["input_ids"].shape[1], *parameter.shape)
        own[name] = torch.zeros(shape, dtype=dtype, requires_grad=True)
        if attribute == "weight":
            module.register_forward_hook(
                lambda module, args, y, extra=own[name]: y + torch.einsum("btk,tnk->btn", args[0], extra)
            )
        else:
            vars(module).setdefault("own", {})[attribute] = own[name]
    with reference_rules(copy, rule):
        value = target(_logits(copy, sample), sample)
        return dict(zip(own, torch.autograd.grad(value.sum(), own.values()), strict=True))


def _logits(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return model(**inputs, use_cache=False).logits
