"""attention and its LRP backward, against a softmax written out and differentiated by autograd in float64.

Cases: one token; less and more tokens than the blocks of 32, 64 and 128, and a multiple; one head, shared heads, 64
heads over 8; every head dimension of a model in use; windows of one key, of less and of more than a block; padding on
either side, a sample without a token, packed sequences; queries and keys whose strides have any order.
"""

import math

import pytest
import torch
from precision import assert_as_good_as_torch
from sparc3_kernels import backend
from sparc3_kernels.attention import attention
from sparc3_kernels.attention_backward import attention_backward
from sparc3_kernels.backend import forced

ATTNLRP = {"q_scale": 0.25, "k_scale": 0.25, "v_scale": 0.5}


def share(x, part):
    return x * part + (x * (1 - part)).detach()


def inputs(batch, heads, kv_heads, tokens, width, dtype):
    """q, k, v, dO as a model has them: q and k are views whose heads stand between tokens and D."""
    generator = torch.Generator().manual_seed(tokens + width)
    q = torch.randn(batch, tokens, heads, width, generator=generator).transpose(1, 2)
    k = torch.randn(batch, tokens, kv_heads, width, generator=generator).transpose(1, 2)
    v = torch.randn(batch, kv_heads, tokens, width, generator=generator)
    d_out = torch.randn(batch, tokens, heads, width, generator=generator)
    return [x.to(dtype) for x in (q, k, v, d_out)]


def visible(tokens, causal, window, bounds, packed):
    """[B or 1, T, T]: the pairs that `attention` says a query sees, by its words."""
    seen = torch.zeros(1 if packed else max(1, len(bounds)), tokens, tokens, dtype=torch.bool)
    for sequence, (begin, end) in enumerate(bounds or [(0, tokens)]):
        for i in range(begin, end):
            first = max(begin, i - window + 1) if window else begin
            seen[0 if packed else sequence, i, first : i + 1 if causal else end] = True
    return seen


def by_autograd(q, k, v, d_out, seen, scale, softcap=0.0, scales=(1.0, 1.0, 1.0), temperature=1.0):
    """(O, lse, dq, dk, dv, head relevance) in float64 through the definition."""
    q, k, v, d_out = (x.detach().double() for x in (q, k, v, d_out))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    shared_q, shared_k, shared_v = (share(x, part) for x, part in zip(leaves, scales, strict=True))
    group = q.shape[1] // k.shape[1]
    s = scale * (shared_q @ shared_k.repeat_interleave(group, 1).transpose(-1, -2))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = torch.where(seen[:, None], s, -torch.inf)
    alive = seen.any(-1)[:, None, :, None]
    p = torch.where(alive, torch.softmax(torch.where(alive, s, 0.0), -1), 0.0)
    if temperature != 1.0:
        # P forward, the Jacobian of the softer one backward; dividing by t would be the caller's.
        soft = temperature * torch.softmax(torch.where(alive, s, 0.0) / temperature, -1)
        p = torch.where(alive, soft - soft.detach() + p.detach(), 0.0)
    out = (p @ shared_v.repeat_interleave(group, 1)).transpose(1, 2)
    lse = torch.where(alive.squeeze(-1), torch.logsumexp(torch.where(alive, s, 0.0), -1), 0.0)
    gradients = torch.autograd.grad(out, leaves, d_out)
    return out.detach(), lse.detach(), *gradients, (out.detach() * d_out).sum(-1).transpose(1, 2)


def error(mine, exact):
    """Relative to the largest entry: what is summed is of that size."""
    scale = exact.abs().max().item()
    difference = (mine.cpu().double() - exact).abs().max().item() if exact.numel() else 0.0
    return difference / scale if scale else difference


def ours(q, k, v, d_out, device, bounds=(), numbers=None, **settings):
    """The six tensors of `by_autograd` from the ops; dq and dk None for values only."""
    if device == "cuda" and q.dtype == torch.float32 and forced() == "triton":
        pytest.skip("on a GPU the kernels take 16-bit heads")
    q, k, v, d_out = (x.to(device) for x in (q, k, v, d_out))
    if bounds:
        begin, end = torch.tensor(bounds, dtype=torch.int32, device=device).T.contiguous()
        settings = settings | {"begin": begin, "end": end}
    out, lse = attention(q, k, v, **settings)
    dq, dk, dv, head = attention_backward(d_out, q, k, v, out, lse, **settings, **(numbers or {}))
    return out, lse, dq, dk, dv, head


def assert_agrees(mine, exact, tolerance):
    for name, one, other in zip(("O", "lse", "dq", "dk", "dv", "head"), mine, exact, strict=True):
        if one is not None:
            assert one.isfinite().all(), name
            assert error(one, other) <= tolerance, (name, error(one, other))


# batch, heads, key-value heads, tokens, width, causal, window, soft-cap, sequences, packed
CASES = {
    "one token": (1, 1, 1, 1, 64, True, 0, 0.0, (), False),
    "one head": (2, 1, 1, 33, 64, True, 0, 0.0, (), False),
    "a multiple of the blocks": (1, 2, 1, 128, 64, True, 0, 0.0, (), False),
    "more than a block, shared heads": (1, 2, 1, 150, 32, True, 0, 0.0, (), False),
    "64 heads over 8": (1, 64, 8, 3, 16, True, 0, 0.0, (), False),
    "width 80": (1, 2, 2, 40, 80, True, 0, 0.0, (), False),
    "width 80, soft-cap": (1, 2, 2, 40, 80, True, 0, 2.0, (), False),
    "width 96": (1, 2, 1, 40, 96, True, 0, 0.0, (), False),
    "width 128": (1, 2, 1, 70, 128, True, 0, 0.0, (), False),
    "width 256": (1, 1, 1, 70, 256, True, 0, 0.0, (), False),
    "full": (1, 2, 1, 90, 32, False, 0, 0.0, (), False),
    "window of one": (1, 2, 1, 70, 32, True, 1, 0.0, (), False),
    "window": (1, 2, 1, 150, 32, True, 37, 0.0, (), False),
    "window wider than the text": (1, 2, 1, 40, 32, True, 100, 0.0, (), False),
    "soft-cap": (1, 2, 1, 70, 32, True, 0, 0.7, (), False),
    "soft-cap, window, padded": (2, 2, 1, 70, 32, True, 9, 2.0, ((7, 70), (0, 44)), False),
    "padded, one sample empty": (3, 2, 1, 70, 32, True, 0, 0.0, ((11, 70), (0, 33), (0, 0)), False),
    "padded, full": (2, 2, 2, 45, 32, False, 0, 0.0, ((3, 45), (0, 40)), False),
    "packed": (1, 2, 1, 100, 32, True, 0, 0.0, ((0, 1), (1, 65), (65, 65), (70, 100)), True),
    "packed, window": (1, 2, 1, 100, 32, True, 5, 0.0, ((0, 40), (40, 100)), True),
}


def built(name, dtype):
    batch, heads, kv_heads, tokens, width, causal, window, softcap, bounds, packed = CASES[name]
    tensors = inputs(batch, heads, kv_heads, tokens, width, dtype)
    settings = {"causal": causal, "window": window, "softcap": softcap}
    return tensors, settings, bounds, visible(tokens, causal, window, bounds, packed)


@pytest.mark.parametrize("name", CASES)
def test_attnlrp(fused, device, name):
    tensors, settings, bounds, seen = built(name, torch.float32)
    scale = 1 / math.sqrt(tensors[0].shape[-1])
    exact = by_autograd(*tensors, seen, scale, settings["softcap"], (0.25, 0.25, 0.5))
    mine = ours(*tensors, device, bounds, ATTNLRP, **settings)
    # fp32: sums of up to 150 terms of either sign, each rounded some ten times.
    assert_agrees(mine, exact, 1e-5)


@pytest.mark.parametrize("name", ["more than a block, shared heads", "soft-cap, window, padded", "packed"])
def test_values_only_is_the_same_dv(fused, device, name):
    tensors, settings, bounds, _ = built(name, torch.float32)
    all_of_it = ours(*tensors, device, bounds, **settings)
    mine = ours(*tensors, device, bounds, {"need_qk": False}, **settings)
    assert mine[2] is None
    assert mine[3] is None
    assert torch.equal(mine[4], all_of_it[4])
    assert torch.equal(mine[5], all_of_it[5])


@pytest.mark.parametrize("name", ["more than a block, shared heads", "soft-cap, window, padded", "full"])
def test_temperature(fused, device, name):
    tensors, settings, bounds, seen = built(name, torch.float32)
    numbers = {"softmax_temperature": 2.0, "q_scale": 0.25, "k_scale": 1.0, "v_scale": 0.5}
    scale = 1 / math.sqrt(tensors[0].shape[-1])
    exact = by_autograd(*tensors, seen, scale, settings["softcap"], (0.25, 1.0, 0.5), 2.0)
    assert_agrees(ours(*tensors, device, bounds, numbers, **settings), exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["width 80", "width 128", "a multiple of the blocks"])
def test_16_bit_is_as_good_as_torch(fused, device, name, dtype):
    tensors, settings, bounds, seen = built(name, dtype)
    scale = 1 / math.sqrt(tensors[0].shape[-1])
    exact = by_autograd(*tensors, seen, scale)
    mine = ours(*tensors, device, bounds, **settings)
    q, k, v, d_out = (x.to(device) for x in tensors)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    gradients = torch.autograd.grad(theirs, leaves, d_out.transpose(1, 2))

    assert all(one.dtype == dtype for one in (mine[0], *mine[2:5]))
    assert_as_good_as_torch(
        (mine[0], *mine[2:5]), (theirs.transpose(1, 2), *gradients), (exact[0], *exact[2:5])
    )


def test_layouts_do_not_matter(fused, device):
    q, k, v, d_out = inputs(2, 4, 2, 40, 32, torch.float32)
    plain = ours(q.contiguous(), k.contiguous(), v.contiguous(), d_out, device)
    strided = torch.stack([k, v], -1)
    mine = ours(q, strided[..., 0], strided[..., 1], d_out, device)
    for one, other in zip(plain, mine, strict=True):
        assert torch.equal(one, other)


def test_extreme_values(fused, device):
    q, k, v, d_out = inputs(1, 2, 1, 40, 32, torch.float32)
    # Scores of +-100: one key takes everything. Zero queries: all keys alike. Subnormal values and gradients.
    q[0, 0, :10] *= 30.0
    q[0, 0, 10:20] = 0.0
    q[0, 1, :5] = -0.0
    v[..., :4] = 1e-41
    d_out[:, 7] = 0.0
    exact = by_autograd(q, k, v, d_out, visible(40, True, 0, (), False), 32**-0.5)
    mine = ours(q, k, v, d_out, device)
    # Scores and lse of size 150 are rounded at 2^-24 of that, some four times in s - lse: so far is P off relatively.
    # ds = P (dP - delta) is the difference of two terms that may each be four times the largest result.
    assert_agrees(mine, exact, 4 * 4 * 150 * 2.0**-24)


def test_head_relevance_is_conserved_by_values(fused, device):
    q, k, v, d_out = inputs(1, 4, 4, 50, 32, torch.float32)
    _, _, _, _, dv, head = ours(q, k, v, d_out, device, numbers={"need_qk": False})
    # sum_j v_j dv_j = sum_i O_i dO_i of each head: sums of 1600 products in fp32
    torch.testing.assert_close((v.to(device) * dv).sum((2, 3)), head.sum(2), rtol=1e-4, atol=1e-4)


def test_double_precision_on_the_reference():
    for name in ("padded, one sample empty", "packed", "soft-cap, window, padded"):
        tensors, settings, bounds, seen = built(name, torch.float64)
        exact = by_autograd(*tensors, seen, 1 / math.sqrt(32), settings["softcap"], (0.25, 0.25, 0.5))
        with backend("reference"):
            assert_agrees(ours(*tensors, "cpu", bounds, ATTNLRP, **settings), exact, 1e-12)


def test_bad_arguments():
    q, k, v, d_out = inputs(2, 4, 2, 6, 16, torch.float32)
    bound = torch.zeros(3, dtype=torch.int32)
    for arguments, settings, message in (
        ((q[:, :3], k, v), {}, "shapes must be"),
        ((q, k, v[:1]), {}, "shapes must be"),
        ((q, k.half(), v), {}, "share a float dtype"),
        ((q, k, v), {"window": 3, "causal": False}, "needs causal=True"),
        ((q, k, v), {"softcap": -1.0}, "must not be negative"),
        ((q, k, v), {"begin": bound}, "both None or both"),
        ((q, k, v), {"begin": bound, "end": bound}, "S = B"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*arguments, **settings)
    out, lse = attention(q, k, v)
    with pytest.raises(ValueError, match="must be positive"):
        attention_backward(d_out, q, k, v, out, lse, softmax_temperature=0.0)


@pytest.mark.parametrize("need_qk", [True, False])
def test_ops_are_registered(fused, device, need_qk):
    q, k, v, d_out = (x.to(device) for x in inputs(1, 2, 1, 20, 16, torch.float32))
    ops = torch.ops.sparc3
    settings = (None, None, 0.25, True, 0, 0.0)
    torch.library.opcheck(ops.attention.default, (q, k, v, *settings))
    out, lse = ops.attention.default(q, k, v, *settings)
    numbers = (0.25, 0.25, 0.5, 1.0, need_qk)
    torch.library.opcheck(ops.attention_backward.default, (d_out, q, k, v, out, lse, *settings, *numbers))
