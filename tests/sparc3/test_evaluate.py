import math

import pytest
import tiny
import torch
from scipy import stats

from sparc3 import evaluate
from sparc3.errors import InputError
from sparc3.evaluate import Perplexity, paired_interval, perplexity


def text(samples=5, length=12, seed=0):
    return torch.randint(3, tiny.VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("in_flight", [1 << 24, 1, 7 * tiny.VOCABULARY])  # all at once, 1 and 3 positions
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_perplexity_is_that_of_the_labels_loss(monkeypatch, name, in_flight):
    monkeypatch.setattr(evaluate, "_LOGITS_IN_FLIGHT", in_flight)
    model = tiny.build(name, tiny.attentions(name)[0])
    windows = text()
    with torch.no_grad():
        losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    found = perplexity(model, windows, batch_size=2)
    # Both reduce fp32 logits of one forward; batches and chunks change the order of its sums alone: a few eps
    # of a loss near 5, so 1e-6 of the perplexity is 2 eps of the loss and 4e-6 leaves room for the logits.
    torch.testing.assert_close(found.nll, torch.stack(losses), rtol=4e-6, atol=0)
    assert found.value == pytest.approx(torch.stack(losses).mean().exp().item(), rel=4e-6)
    assert (found.tokens, found.context) == (5 * 11, 12)


def test_windows_keep_their_order_and_progress_is_told():
    model, windows, told = tiny.build("llama"), text(7), []
    found = perplexity(model, windows, 3, progress=lambda done, total: told.append((done, total)))
    assert told == [(3, 7), (6, 7), (7, 7)]
    alone = [perplexity(model, window[None]).nll for window in windows]
    torch.testing.assert_close(found.nll, torch.cat(alone), rtol=4e-6, atol=0)


def test_logits_never_hold_all_positions(monkeypatch):
    monkeypatch.setattr(evaluate, "_LOGITS_IN_FLIGHT", 2 * 5 * tiny.VOCABULARY)
    model, seen = tiny.build("gpt2"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    perplexity(model, text(2, 40), batch_size=2)
    assert max(seen) == 5


def test_a_hopeless_model_is_infinite_not_an_error():
    model = tiny.build("llama")
    model.lm_head.weight.data *= 1e6
    assert perplexity(model, text()).value == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_fp32(dtype):
    model, windows = tiny.build("llama").to(dtype), text()
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits.double()
    reference = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    # The same logits to the bit (a chunk may sum its GEMM in another order: one rounding of a logit, of which
    # 55 average out); reduced in the model's dtype the loss itself would be off by eps / 2.
    eps = torch.finfo(dtype).eps
    assert perplexity(model, windows).nll.mean().item() == pytest.approx(reference.item(), rel=eps / 8)


def test_what_does_not_fit_the_model_is_refused():
    model = tiny.build("opt")  # 64 positions
    assert perplexity(model, text(1, 64)).context == 64
    with pytest.raises(InputError, match=r"windows of 65 tokens .* 64 positions"):
        perplexity(model, text(1, 65))
    with pytest.raises(InputError, match="at least 2"):
        perplexity(model, text(3, 1))
    with pytest.raises(InputError, match="token 97 is outside"):
        perplexity(model, text() + tiny.VOCABULARY - text().max())
    with pytest.raises(InputError, match="batch size 0"):
        perplexity(model, text(), batch_size=0)


def measured(nll, context=12):
    nll = torch.tensor(nll, dtype=torch.float64)
    return Perplexity(nll.mean().exp().item(), len(nll) * (context - 1), context, nll)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 16, 39, 300])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_paired_interval_is_students(count, level):
    generator = torch.Generator().manual_seed(count)
    a, b = torch.randn(2, count, generator=generator, dtype=torch.float64)
    found = paired_interval(measured(a.tolist()), measured(b.tolist()), level)
    expected = stats.ttest_rel(a.numpy(), b.numpy())
    interval = expected.confidence_interval(level)
    assert found.mean == pytest.approx((a - b).mean().item(), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_equal_measurements_differ_by_exactly_nothing():
    assert paired_interval(measured([1.0, 2.0, 4.0]), measured([1.0, 2.0, 4.0])) == (0, 0, 0)


def test_an_interval_needs_the_same_windows():
    for a, b in [
        (measured([1.0, 2.0]), measured([1.0, 2.0, 3.0])),
        (measured([1.0, 2.0]), measured([1.0, 2.0], context=13)),
        (measured([1.0]), measured([2.0])),
    ]:
        with pytest.raises(InputError, match="same windows"):
            paired_interval(a, b)
    with pytest.raises(InputError, match="level"):
        paired_interval(measured([1.0, 2.0]), measured([1.0, 3.0]), 1.0)
