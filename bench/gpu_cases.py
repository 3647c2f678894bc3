"""What bench/gpu.py times: each op of sparc3_kernels beside its peers, on shapes of Llama, Gemma and Mistral models.

Peers are functions of the same inputs that return the same tensors; each imports what it needs when it is called, so
that one that is not installed is skipped with the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sparc3_kernels import accumulate_weight_relevance_
from sparc3_kernels.attention import attention
from sparc3_kernels.attention_backward import attention_backward
from sparc3_kernels.gated_mlp import gated_product, gated_product_backward, gated_product_backward_reference
from sparc3_kernels.lm_head import lm_head_target
from sparc3_kernels.norm import rms_norm, rms_norm_backward
from torch.nn import functional as F

Implementation = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class Made:
    """Inputs, what they must give, and who gives it.

    Attributes:
        bytes, flops: the least that any implementation moves and does.
        tolerance: largest relative error (norm over norm) that is timed; bf16 rounds at 2^-8.
        rates: timed without a check, because they do less: what ours is held against.
    """

    inputs: list[Any]
    reference: Implementation
    implementations: dict[str, Implementation]
    bytes: int = 0
    flops: int = 0
    tolerance: float = 2e-2
    rates: dict[str, Implementation] = field(default_factory=dict)


@dataclass
class Case:
    """A name and a function of (device, dry) that makes the inputs."""

    name: str
    make: Callable[[torch.device, bool], Made]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _normal(device: torch.device, *shape: int) -> torch.Tensor:
    # Triton's interpreter computes on the raw bits of bf16.
    return torch.randn(*shape, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def _attention(
    heads: int, kv_heads: int, tokens: int, width: int, rule: str, window: int = 0, softcap: float = 0.0
) -> Case:
    scales = {"attnlrp": (0.25, 0.25, 0.5), "cp": (0.0, 0.0, 1.0)}[rule]

    def make(device: torch.device, dry: bool) -> Made:
        length, many, few = (64, 2, 1) if dry else (tokens, heads, kv_heads)
        span = min(window, length // 2) if dry else window
        q = _normal(device, 1, many, length, width)
        k, v = _normal(device, 1, few, length, width), _normal(device, 1, few, length, width)
        d_out = _normal(device, 1, length, many, width)
        settings: dict[str, Any] = {"window": span, "softcap": softcap}
        out, lse = attention(q, k, v, **settings)
        need_qk = rule != "cp"
        numbers = {"q_scale": scales[0], "k_scale": scales[1], "v_scale": scales[2], "need_qk": need_qk}

        def ours(q: Any, k: Any, v: Any, d_out: Any, out: Any, lse: Any) -> tuple[torch.Tensor, ...]:
            found = attention_backward(d_out, q, k, v, out, lse, **settings, **numbers)
            return tuple(x for x in found[:3] if x is not None)

        graphs: dict[tuple[str, int], Any] = {}

        def backward(name: str, forward: Callable[..., torch.Tensor]) -> Implementation:
            """Time the backward alone: the forward is run once for each copy of the inputs."""

            def run(q: Any, k: Any, v: Any, d_out: Any, out: Any, lse: Any) -> tuple[torch.Tensor, ...]:
                if (key := (name, q.data_ptr())) not in graphs:
                    leaves = [x.detach().requires_grad_(need_qk or x is v) for x in (q, k, v)]
                    graphs[key] = leaves, forward(*leaves)
                leaves, output = graphs[key]
                wanted = leaves if need_qk else leaves[2:]
                found = torch.autograd.grad(output, wanted, d_out.transpose(1, 2), retain_graph=True)
                return tuple(g * scale for g, scale in zip(found, scales[-len(found) :], strict=True))

            return run

        def sdpa(kind: str) -> Callable[..., torch.Tensor]:
            def forward(q: Any, k: Any, v: Any) -> torch.Tensor:
                if span or softcap:
                    raise NotImplementedError("SDPA has no window or soft-cap")
                from torch.nn.attention import SDPBackend, sdpa_kernel

                with sdpa_kernel(getattr(SDPBackend, kind)):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            return forward

        def flex(q: Any, k: Any, v: Any) -> torch.Tensor:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
                return (i >= j) & (i - j < span) if span else i >= j

            def capped(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                return softcap * torch.tanh(score / softcap)

            mask = create_block_mask(seen, None, None, length, length, device=device)
            run = flex_attention if dry else _compiled(flex_attention)
            return run(q, k, v, score_mod=capped if softcap else None, block_mask=mask, enable_gqa=True)

        def reference(q: Any, k: Any, v: Any, d_out: Any, out: Any, lse: Any) -> tuple[torch.Tensor, ...]:
            # All scores in fp32, one key-value head at a time.
            group, parts = many // few, []
            for head in range(few):
                own = slice(head * group, (head + 1) * group)
                leaves = [
                    x.float().detach().requires_grad_()
                    for x in (q[:, own], k[:, head, None], v[:, head, None])
                ]
                s = leaves[0] @ leaves[1].transpose(-1, -2) * width**-0.5
                s = softcap * torch.tanh(s / softcap) if softcap else s
                i = torch.arange(length, device=device)
                distance = i[:, None] - i[None, :]
                seen = (distance >= 0) & (distance < (span or length))
                output = torch.softmax(s.masked_fill(~seen, -torch.inf), -1) @ leaves[2]
                parts.append(torch.autograd.grad(output, leaves, d_out[:, :, own].transpose(1, 2).float()))
            whole = [
                torch.cat(part, 1) * scale
                for part, scale in zip(zip(*parts, strict=True), scales, strict=True)
            ]
            return tuple(whole if need_qk else whole[2:])

        area = length * length / 2 if not span else span * length - span * span / 2
        kinds = ("MATH",) if dry else ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
        return Made(
            [q, k, v, d_out, out, lse],
            reference,
            {"sparc3": ours}
            | {f"sdpa {kind.lower()} + scalings": backward(kind, sdpa(kind)) for kind in kinds}
            | {"flex_attention compiled + scalings": backward("flex", flex)},
            flops=int((10 if need_qk else 4) * area * width * many),
        )

    extra = (f" window {window}" if window else "") + (f" soft-cap {softcap:g}" if softcap else "")
    return Case(f"attention backward {rule} H{heads}/{kv_heads} T{tokens} D{width}{extra}", make)


def _loop_over_samples(total: torch.Tensor, weight: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> None:
    for g_s, x_s in zip(g.unbind(0), x.unbind(0), strict=True):
        total.add_((weight * (g_s.T @ x_s)).abs_())


def _weight_relevance(samples: int, length: int, n: int, k: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        s, t, rows, columns = (2, 20, 40, 72) if dry else (samples, length, n, k)
        g, x = _normal(device, s, t, rows), _normal(device, s, t, columns)
        acc = torch.zeros(rows, columns, device=device)
        ones = torch.ones(rows, columns, dtype=g.dtype, device=device)

        def ours(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
            return (accumulate_weight_relevance_(acc.zero_(), g, x, "abs"),)

        def by_hand(compiled: bool) -> Implementation:
            def run(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
                (_compiled(_loop_over_samples) if compiled else _loop_over_samples)(acc.zero_(), ones, g, x)
                return (acc,)

            return run

        def reference(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
            total = torch.zeros_like(acc)
            for g_s, x_s in zip(g, x, strict=True):
                total += (g_s.float().T @ x_s.float()).abs_()
            return (total,)

        def product(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
            return (torch.mm(g.flatten(0, 1).T, x.flatten(0, 1)),)

        peers = {"eager loop": by_hand(False)}
        if not dry:
            peers["torch.compile loop"] = by_hand(True)
        return Made(
            [acc, g, x, ones],
            reference,
            {"sparc3": ours} | peers,
            flops=2 * s * t * rows * columns,
            rates={"the matrix product alone": product},
        )

    return Case(f"weight relevance abs {samples}x{length} {n}x{k}", make)


def _norm(tokens: int, width: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        dy, x, weight = _normal(device, rows, d), _normal(device, rows, d), _normal(device, d)
        _, _, scale = rms_norm(x, weight, 1e-6)

        def ours(dy: Any, x: Any, weight: Any, scale: Any) -> tuple[torch.Tensor, ...]:
            return (rms_norm_backward(dy, x, weight, 1e-6, 0.0, 0.0, scale),)

        def plain(dy: Any, x: Any, weight: Any, scale: Any) -> tuple[torch.Tensor, ...]:
            return ((dy.float() * weight.float() * scale[:, None]).to(dy.dtype),)

        peers = {"eager": plain}
        if not dry:
            peers["torch.compile"] = lambda *inputs: _compiled(plain)(*inputs)
        return Made([dy, x, weight, scale], plain, {"sparc3": ours} | peers, bytes=4 * rows * d)

    return Case(f"RMSNorm backward, scale constant, {tokens}x{width}", make)


def _norm_forward(tokens: int, width: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        x, weight = _normal(device, rows, d), _normal(device, d)

        def plain(x: Any, weight: Any) -> tuple[torch.Tensor, ...]:
            return (F.rms_norm(x.float(), (d,), weight.float(), 1e-6).to(x.dtype),)

        def liger(x: Any, weight: Any) -> tuple[torch.Tensor, ...]:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            return (LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False),)

        peers = {"eager": plain, "Liger-Kernel": liger}
        if not dry:
            peers["torch.compile"] = lambda *inputs: _compiled(plain)(*inputs)
        ours = {"sparc3": lambda x, weight: (rms_norm(x, weight, 1e-6)[0],)}
        return Made([x, weight], plain, ours | peers, bytes=4 * rows * d)

    return Case(f"RMSNorm forward {tokens}x{width}", make)


def _swiglu(tokens: int, width: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        dp, gate, up = (_normal(device, rows, d) for _ in range(3))

        def reference(dp: Any, gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            wide = (x.float() for x in (dp, gate, up))
            return gated_product_backward_reference(*wide, "silu", True, 0.5, 0.5)

        def plain(dp: Any, gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            half = 0.5 * dp
            ratio = torch.sigmoid(gate)
            return half * up * ratio, half * gate * ratio

        peers = {"eager": plain}
        if not dry:
            peers["torch.compile"] = lambda *inputs: _compiled(plain)(*inputs)
        ours = {"sparc3": lambda dp, gate, up: gated_product_backward(dp, gate, up, "silu", True, 0.5, 0.5)}
        return Made([dp, gate, up], reference, ours | peers, bytes=10 * rows * d)

    return Case(f"SwiGLU backward, identity and half rule, {tokens}x{width}", make)


def _swiglu_forward(tokens: int, width: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d = (8, 64) if dry else (tokens, width)
        gate, up = (_normal(device, rows, d) for _ in range(2))

        def reference(gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            return ((F.silu(gate.float()) * up.float()),)

        def liger(gate: Any, up: Any) -> tuple[torch.Tensor, ...]:
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            return (LigerSiLUMulFunction.apply(gate, up),)

        peers: dict[str, Implementation] = {
            "eager": lambda gate, up: (F.silu(gate) * up,),
            "Liger-Kernel": liger,
        }
        ours = {"sparc3": lambda gate, up: (gated_product(gate, up, "silu"),)}
        return Made([gate, up], reference, ours | peers, bytes=6 * rows * d)

    return Case(f"SwiGLU forward {tokens}x{width}", make)


def _lm_head(tokens: int, width: int, words: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d, v = (6, 32, 300) if dry else (tokens, width, words)
        hidden, weight = _normal(device, rows, d), _normal(device, v, d) * 0.05
        labels = torch.randint(0, v, (rows,), device=device)

        def plain(hidden: Any, weight: Any, labels: Any) -> tuple[torch.Tensor, ...]:
            leaf = hidden.detach().requires_grad_()
            F.cross_entropy((leaf @ weight.T).float(), labels, reduction="sum").neg().backward()
            assert leaf.grad is not None
            return (leaf.grad,)

        ours = {
            "sparc3": lambda hidden, weight, labels: lm_head_target(hidden, weight, labels, "logprob")[1:]
        }
        return Made(
            [hidden, weight, labels],
            plain,
            ours | {"all logits at once": plain},
            flops=4 * rows * d * v,
            tolerance=3e-2,
        )

    return Case(f"LM head log-probability T{tokens} D{width} V{words}", make)


def cases() -> list[Case]:
    """All cases, the most wanted first."""
    return [
        _attention(32, 32, 2048, 128, "attnlrp"),
        _attention(64, 8, 2048, 128, "attnlrp"),
        _attention(32, 32, 8192, 128, "attnlrp"),
        _attention(32, 32, 2048, 128, "cp"),
        _attention(32, 32, 8192, 128, "cp"),
        _attention(8, 4, 4096, 256, "attnlrp"),
        _attention(8, 4, 4096, 256, "attnlrp", softcap=50.0),
        _attention(8, 4, 4096, 256, "attnlrp", window=1024),
        _weight_relevance(1, 2048, 4096, 11008),
        _weight_relevance(16, 128, 4096, 11008),
        _weight_relevance(1, 2048, 8192, 28672),
        _weight_relevance(16, 128, 8192, 28672),
        _norm(2048, 4096),
        _norm(8192, 8192),
        _norm_forward(8192, 4096),
        _swiglu(2048, 11008),
        _swiglu(8192, 28672),
        _swiglu_forward(8192, 28672),
        _lm_head(2048, 2304, 262144),
    ]
