"""The parts of a wrapped model that fused kernels run, forward and backward, where the backend is Triton.

Where a norm or attention is called in a way that the kernels do not know (a mask that is not causal, windowed or
padded), the model's own code runs, with the same rule on its backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from sparc3_kernels.attention import WIDEST, beats_sdpa
from sparc3_kernels.backend import forced
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparc3 import autograd
from sparc3.families import Family
from sparc3.rules import Rule

ATTENTION = "sparc3_fused"


def norm(module: Any, family: Family, scale_gradient: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A norm's forward, its scale held constant in the backward or not."""
    if family.norm == "layer":
        if len(module.normalized_shape) != 1:
            raise NotImplementedError(f"a LayerNorm over {module.normalized_shape} has no fused kernel")
        return lambda x: autograd.FusedLayerNorm.apply(
            x, module.weight, module.bias, module.eps, scale_gradient
        )
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    offset = 1.0 if family.norm == "rms+1" else 0.0
    return lambda x: autograd.FusedRMSNorm.apply(x, module.weight, eps, offset, scale_gradient)


def takes_attention(model: PreTrainedModel, rule: Rule) -> bool:
    """Whether this model's attention runs in our kernels: where they are faster, or where Triton is forced."""
    config: Any = model.config
    heads = getattr(config, "num_attention_heads", None) or config.n_head
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    parameter = next(model.parameters())
    if width > WIDEST or (parameter.is_cuda and parameter.dtype == torch.float32):
        return False  # see sparc3_kernels.attention
    softcap = getattr(config, "attn_logit_softcapping", None) or 0.0
    window = getattr(config, "sliding_window", None) or 0
    q_scale, k_scale, _ = rule.attention_scales
    return forced() == "triton" or beats_sdpa(width, softcap, window, q_scale != 0.0 or k_scale != 0.0)


def register_attention() -> str:
    """Register our attention and the masks that it reads, once a process; the name that selects them."""
    if ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, _mask)
    return ATTENTION


def _mask(
    *args: Any, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> torch.Tensor | None:
    """None where nothing is padded, bounds int32 [2, B] of what is not, or else sdpa's mask [B, 1, T, T].

    transformers says with ``allow_is_causal_skip=False`` that a mask is more than causal and padded; in a graph that
    torch.compile traces it says so of every mask that might be packed. What is padded is not known there either.
    """
    if allow_is_causal_skip and attention_mask is None:
        return None
    if allow_is_causal_skip and attention_mask is not None and not torch.compiler.is_compiling():
        if attention_mask.all():
            return None
        real = attention_mask.int()
        begin, end = real.argmax(1), attention_mask.shape[1] - real.flip(1).argmax(1)
        if torch.equal(end - begin, real.sum(1)):
            return torch.stack([begin, end]).int()
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        *args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    # Set by sparc3.conservation: nowhere else are queries and keys as they enter the scores.
    if (watch := getattr(module, "_sparc3_watch", None)) is not None:
        watch(query, key, value)
    scales = getattr(module, "_sparc3_scales", (1.0, 1.0, 1.0))
    if mask is None or mask.dim() == 2:
        begin, end = (None, None) if mask is None else (mask[0], mask[1])
        out = autograd.Attention.apply(
            query, key, value, begin, end, scaling, True, sliding_window or 0, softcap or 0.0, scales
        )
        return out, None
    scaled = (autograd.scale_gradient(x, scale) for x, scale in zip((query, key, value), scales, strict=True))
    if softcap:  # sdpa knows none
        added = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        return eager_attention(module)(module, *scaled, added, scaling=scaling, softcap=softcap, **kwargs)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *scaled, mask, scaling=scaling, **kwargs)


def eager_attention(module: nn.Module) -> Callable[..., Any]:
    """Attention written out in plain torch, of the file that defines the module: it knows all that its model has."""
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
