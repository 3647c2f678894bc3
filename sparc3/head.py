"""The explained scalar and its gradient where the blocks end: through the final norm, the LM head and the target.

The logits of all positions are never there at once. A plain head and the usual targets run in one op of
sparc3_kernels; for others, and on the reference backend, a chunk of positions goes through the model's own code at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from sparc3_kernels.backend import forced
from sparc3_kernels.lm_head import TARGETS as FUSED_TARGETS
from sparc3_kernels.lm_head import lm_head_target
from sparc3_kernels.triton_support import fused
from torch import nn

from sparc3.autograd import Unscored, linear_forward
from sparc3.targets import Batch, TargetFunction, explained, next_tokens

if TYPE_CHECKING:
    from sparc3.engine import Blocks

# Logits in flight, in elements: 64 MiB in fp32, small beside a block and large enough to fill a GEMM.
LOGITS_IN_FLIGHT = 1 << 24


def target_gradient(
    blocks: Blocks, hidden: torch.Tensor, batch: Batch, target: str | TargetFunction, positions: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(explained scalar [B], its gradient [B, T, D]) at the last block's output ``hidden`` [B, T, D]."""
    leaf = hidden.detach().requires_grad_()
    samples, length = batch["input_ids"].shape
    if not isinstance(target, str):
        everything = torch.arange(length, device=hidden.device)
        with torch.enable_grad():
            value = target(blocks.logits(leaf, batch, everything), batch)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient
    labels = next_tokens(batch, positions)
    wanted = torch.nonzero((labels >= 0).any(0)).squeeze(1)
    head = blocks.model.get_output_embeddings()
    scored = "forward" in vars(head)
    if not scored and (found := _fused(blocks, leaf, batch, wanted, labels[:, wanted], target)) is not None:
        return found
    chunk = max(1, LOGITS_IN_FLIGHT // (samples * blocks.model.config.vocab_size))
    if scored:
        # The head's own relevance is wanted (see sparc3.wrap), and it is reduced over whole samples.
        wanted, chunk = torch.arange(length, device=hidden.device), length
    value = hidden.new_zeros(samples, dtype=torch.promote_types(hidden.dtype, torch.float32))
    with nullcontext() if scored else _unscored(head):
        for some in wanted.split(chunk):
            with torch.enable_grad():
                part = explained(blocks.logits(leaf, batch, some), labels[:, some], target)
                part.sum().backward()
            value += part.detach()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return value, gradient


def _fused(
    blocks: Blocks,
    leaf: torch.Tensor,
    batch: Batch,
    wanted: torch.Tensor,
    labels: torch.Tensor,
    target: str,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``target_gradient`` in one op at positions ``wanted`` [C] with labels [B, C]; None where it does not fit."""
    head: Any = blocks.model.get_output_embeddings()
    if target not in FUSED_TARGETS or type(head) is not nn.Linear or head.bias is not None:
        return None
    # Whoever watches the head, as sparc3.conservation does, is to see its logits and their gradients.
    if any((head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)):
        return None
    on_cpu = head.weight.device.type == "cpu" and forced() != "reference"
    if not (len(wanted) and (on_cpu or fused(head.weight))):
        return None
    received: list[torch.Tensor] = []
    # What this model does to its logits (nothing, a soft-cap, a factor) shows in what it does to these.
    probe = torch.tensor([[[-30.0, 0.0, 1.0, 20.0]]], dtype=leaf.dtype, device=leaf.device)

    def receive(x: torch.Tensor) -> torch.Tensor:
        received.append(x)
        return probe

    with torch.enable_grad(), _replaced(head, receive):
        found = blocks.logits(leaf, batch, wanted)
    softcap = getattr(blocks.model.config, "final_logit_softcapping", None) or 0.0
    expected = softcap * torch.tanh(probe / softcap) if softcap else probe
    if not torch.allclose(found.to(probe.dtype), expected, rtol=4 * torch.finfo(probe.dtype).eps):
        return None
    (x,) = received  # [B, C, D]
    value, gradient = lm_head_target(
        x.detach().flatten(0, 1), head.weight.detach(), labels.flatten(), target, softcap
    )
    (gradient,) = torch.autograd.grad(x, leaf, gradient.view_as(x))
    return value.view_as(labels).sum(1), gradient


def _unscored(head: Any) -> Any:
    """Within the context the backward of the LM head is autograd.Unscored."""
    forward = linear_forward(head, head.forward)
    return _replaced(head, lambda hidden: Unscored.apply(hidden, forward, head.weight))


@contextmanager
def _replaced(head: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the context the LM head runs ``forward``."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
