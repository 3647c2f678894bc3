"""What bench/gpu.py times: each op of sparc3_kernels beside its peers, on shapes of Llama, Gemma and Mistral models.

Peers are functions of the same inputs that return the same tensors; each imports what it needs when it is called, so
that one that is not installed is skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_case import Case, Implementation, Made, compiled, normal
from gpu_decode_cases import decode_cases
from gpu_row_cases import gated_mlp_cases, norm_cases
from gpu_select_cases import select_cases
from sparc3_kernels import accumulate_weight_relevance_
from sparc3_kernels.attention import DISPATCH, attention, dispatch_row
from sparc3_kernels.attention_backward import attention_backward
from sparc3_kernels.lm_head import lm_head_target
from torch.nn import functional as F

from sparc3.autograd import scale_gradient


def _attention(
    heads: int, kv_heads: int, tokens: int, width: int, rule: str, window: int = 0, softcap: float = 0.0
) -> Case:
    scales = {"attnlrp": (0.25, 0.25, 0.5), "cp": (0.0, 0.0, 1.0)}[rule]

    def make(device: torch.device, dry: bool) -> Made:
        # Dry too, cases differ in length and in how many query heads share a key-value head.
        length, many, few = (tokens // 64, 2, 1 + (kv_heads == heads)) if dry else (tokens, heads, kv_heads)
        span = min(window, length // 2) if dry else window
        q = normal(device, 1, many, length, width)
        k, v = normal(device, 1, few, length, width), normal(device, 1, few, length, width)
        d_out = normal(device, 1, length, many, width)
        settings: dict[str, Any] = {"window": span, "softcap": softcap}
        out, lse = attention(q, k, v, **settings)
        need_qk = rule != "cp"
        numbers = {"q_scale": scales[0], "k_scale": scales[1], "v_scale": scales[2], "need_qk": need_qk}

        def ours(q: Any, k: Any, v: Any, d_out: Any, out: Any, lse: Any) -> tuple[torch.Tensor, ...]:
            found = attention_backward(d_out, q, k, v, out, lse, **settings, **numbers)
            return tuple(x for x in found[:3] if x is not None)

        graphs: dict[tuple[str, int], Any] = {}

        def backward(name: str, forward: Callable[..., torch.Tensor], scaled: bool = False) -> Implementation:
            """Time the backward alone: the forward, `scaled` or not, is run once for each copy of the inputs."""

            def run(q: Any, k: Any, v: Any, d_out: Any, out: Any, lse: Any) -> tuple[torch.Tensor, ...]:
                if (key := (name, q.data_ptr())) not in graphs:
                    leaves = [x.detach().requires_grad_(need_qk or x is v) for x in (q, k, v)]
                    graphs[key] = leaves, forward(*leaves)
                leaves, output = graphs[key]
                wanted = leaves if need_qk else leaves[2:]
                found = torch.autograd.grad(output, wanted, d_out.transpose(1, 2), retain_graph=True)
                if scaled:
                    return found
                return tuple(g * scale for g, scale in zip(found, scales[-len(found) :], strict=True))

            return run

        def dispatched(q: Any, k: Any, v: Any) -> torch.Tensor:
            parts = (scale_gradient(x, scale) for x, scale in zip((q, k, v), scales, strict=True))
            return F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)

        def lxt(q: Any, k: Any, v: Any) -> torch.Tensor:
            if span or softcap:
                raise NotImplementedError("LXT wraps SDPA, which has no window or soft-cap")
            from lxt.efficient import patches

            wrap = patches.wrap_attention_forward if need_qk else patches.cp_wrap_attention_forward
            forward = wrap(
                lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            )
            # The function is made for modules of transformers; none is read.
            return forward(None, q, k, v)

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
            run = compiled(flex_attention, dry)
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
        kinds = ("MATH",) * dry + ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
        implementations = {"sparc3": ours}
        row = dispatch_row(width, softcap, span, need_qk)
        if not DISPATCH[row]:
            implementations["sparc3 as dispatched"] = backward("dispatched", dispatched, scaled=True)
        implementations |= {f"sdpa {kind.lower()} + scalings": backward(kind, sdpa(kind)) for kind in kinds}
        implementations["flex_attention compiled + scalings"] = backward("flex", flex)
        implementations["LXT's wrapper of sdpa"] = backward("lxt", lxt, scaled=True)
        return Made(
            [q, k, v, d_out, out, lse],
            reference,
            implementations,
            flops=int((10 if need_qk else 4) * area * width * many),
            dispatch=row,
        )

    extra = (f" window {window}" if window else "") + (f" soft-cap {softcap:g}" if softcap else "")
    return Case(f"attention backward {rule} H{heads}/{kv_heads} T{tokens} D{width}{extra}", make)


def _loop_over_samples(total: torch.Tensor, weight: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> None:
    for g_s, x_s in zip(g.unbind(0), x.unbind(0), strict=True):
        total.add_((weight * (g_s.T @ x_s)).abs_())


def _weight_relevance(samples: int, length: int, n: int, k: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        s, t, rows, columns = (2, 20, 40, 72) if dry else (samples, length, n, k)
        g, x = normal(device, s, t, rows), normal(device, s, t, columns)
        acc = torch.zeros(rows, columns, device=device)
        ones = torch.ones(rows, columns, dtype=g.dtype, device=device)

        def ours(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
            return (accumulate_weight_relevance_(acc.zero_(), g, x, "abs"),)

        def by_hand(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
            _loop_over_samples(acc.zero_(), ones, g, x)
            return (acc,)

        def by_hand_compiled(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
            compiled(_loop_over_samples, dry)(acc.zero_(), ones, g, x)
            return (acc,)

        def reference(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
            total = torch.zeros_like(acc)
            for g_s, x_s in zip(g, x, strict=True):
                total += (g_s.float().T @ x_s.float()).abs_()
            return (total,)

        def product(acc: Any, g: Any, x: Any, ones: Any) -> tuple[torch.Tensor, ...]:
            return (torch.mm(g.flatten(0, 1).T, x.flatten(0, 1)),)

        peers = {"eager loop": by_hand, "torch.compile loop": by_hand_compiled}
        return Made(
            [acc, g, x, ones],
            reference,
            {"sparc3": ours} | peers,
            flops=2 * s * t * rows * columns,
            rates={"the matrix product alone": product},
        )

    return Case(f"weight relevance abs {samples}x{length} {n}x{k}", make)


def _lm_head(tokens: int, width: int, words: int) -> Case:
    def make(device: torch.device, dry: bool) -> Made:
        rows, d, v = (6, 32, 300) if dry else (tokens, width, words)
        hidden, weight = normal(device, rows, d), normal(device, v, d) * 0.05
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
        *norm_cases(),
        *gated_mlp_cases(),
        _lm_head(2048, 2304, 262144),
        *select_cases(),
        *decode_cases(),
    ]
