"""The LM head's target and gradient against autograd through all logits in float64, on every backend."""

import pytest
import torch
from precision import assert_as_good_as_torch
from sparc3_kernels import lm_head
from sparc3_kernels.lm_head import TARGETS, lm_head_target


def inputs(tokens, width, words, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(tokens + words)
    hidden = torch.randn(tokens, width, generator=generator) * scale
    weight = torch.randn(words, width, generator=generator)
    labels = torch.randint(0, words, (tokens,), generator=generator)
    labels[tokens // 2] = -100
    return hidden.to(dtype), weight.to(dtype), labels


def by_autograd(hidden, weight, labels, target, softcap):
    """Of float64; of 16 bit, as models compute it: the logits' product in 16 bit, what follows in fp32."""
    leaf = hidden.clone().requires_grad_()
    z = leaf @ weight.T
    z = z if z.dtype == torch.float64 else z.float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    value = z.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    if target == "logit-mean":
        value = value - z.mean(1)
    elif target == "logprob":
        value = value - torch.logsumexp(z, 1)
    value = torch.where(labels >= 0, value, 0.0)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


# Fewer words than a block of 4096, and more; chunks of one row, of two and a rest.
@pytest.mark.parametrize(("tokens", "words", "chunk"), [(1, 5, 1), (5, 1000, 2000), (3, 4101, 1 << 26)])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("target", TARGETS)
def test_value_and_gradient(fused, device, monkeypatch, target, softcap, tokens, words, chunk):
    monkeypatch.setattr(lm_head, "_CHUNK", chunk)
    monkeypatch.setattr(lm_head, "_CHUNK_ON_CPU", chunk)
    hidden, weight, labels = inputs(tokens, 16, words, torch.float32)
    expected = by_autograd(hidden.double(), weight.double(), labels, target, softcap)
    ours = lm_head_target(hidden.to(device), weight.to(device), labels.to(device), target, softcap)
    for mine, exact in zip(ours, expected, strict=True):
        # fp32 sums over words and channels, against the largest entry
        assert (mine.cpu().double() - exact).abs().max() <= 1e-5 * max(1.0, exact.abs().max())
    assert (ours[1][tokens // 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_16_bit(fused, device, target, dtype):
    hidden, weight, labels = inputs(4, 32, 600, dtype)
    value, gradient = (
        x.cpu() for x in lm_head_target(hidden.to(device), weight.to(device), labels.to(device), target)
    )
    assert gradient.dtype == dtype
    exact_value, exact = by_autograd(hidden.double(), weight.double(), labels, target, 0.0)
    # Logits of up to 25 are rounded to dtype, and so are probabilities: relative 25 eps of a probability, and each of
    # the weights they multiply, of up to 4.
    eps = torch.finfo(dtype).eps
    assert (value.double() - exact_value).abs().max() <= 2 * 25 * eps
    assert (gradient.double() - exact).abs().max() <= 25 * 4 * eps


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", TARGETS)
def test_16_bit_is_as_good_as_torch(fused, device, target, dtype, softcap):
    hidden, weight, labels = inputs(64, 32, 600, dtype)
    there = [x.to(device) for x in (hidden, weight, labels)]
    theirs = by_autograd(*there, target, softcap)
    exact = by_autograd(hidden.double(), weight.double(), labels, target, softcap)
    assert_as_good_as_torch(lm_head_target(*there, target, softcap), theirs, exact)


def test_huge_logits_stay_finite(fused, device):
    hidden, weight, labels = (x.to(device) for x in inputs(3, 8, 50, torch.float32, 1e4))
    for target in TARGETS:
        for softcap in (0.0, 30.0):
            value, gradient = lm_head_target(hidden, weight, labels, target, softcap)
            assert value.isfinite().all()
            assert gradient.isfinite().all()


def test_bad_arguments():
    hidden, weight, labels = inputs(3, 8, 50, torch.float32)
    for arguments, message in (
        ((hidden, weight, labels, "max"), "target is one of"),
        ((hidden, weight[:, :4], labels, "logit"), "shapes must be"),
        ((hidden, weight, labels[:2], "logit"), "shapes must be"),
        ((hidden.half(), weight, labels, "logit"), "share a dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            lm_head_target(*arguments)


def test_op_is_registered(fused, device):
    hidden, weight, labels = (x.to(device) for x in inputs(3, 8, 50, torch.float32))
    for target in TARGETS:
        torch.library.opcheck(torch.ops.sparc3.lm_head_target.default, (hidden, weight, labels, target, 0.0))
