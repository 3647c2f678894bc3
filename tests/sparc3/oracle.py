"""An independent reference: LRP by plain autograd through the model's eager code, `.grad` and all.

The rules are written as value-preserving expressions (`half(x) = x/2 + (x/2).detach()` and the like), not as
custom backwards, and the whole model is one graph, so nothing is shared with sparc3.wrap or sparc3.engine.
"""

import sys
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from sparc3.families import family_of


def share(x, part):
    return x * part + (x * (1 - part)).detach()


def rms_norm(x, weight, eps, offset, constant):
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (scale.detach() if constant else scale) * (offset + weight.float())).to(x.dtype)


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
                    gate, up = F.linear(x, m.gate_up_proj[e]).chunk(2, -1)
                    gate = share(activation(m.act_fn, gate, rule.activation_identity), first)
                    out = F.linear(gate * share(up, second), m.down_proj[e])
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


def weight_gradients(model, batch, rule, target):
    """{name: gradient as stored} and the embedded input's gradient, of the sum of target(logits, batch)."""
    model.zero_grad()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    with reference_rules(model, rule):
        value = target(model(**inputs, use_cache=False).logits, batch)
        value.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return value.detach(), gradients
