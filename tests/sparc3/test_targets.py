"""Which token is explained where, and the explained scalar, against loops over samples and positions."""

import math

import pytest
import torch
from tiny import VOCABULARY, batch

from sparc3.errors import InputError
from sparc3.targets import TARGETS, check_target, explained, next_tokens, target_value

INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10], [11, 12, 0, 0], [0, 13, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 0]]),
}
X = -100


def test_next_tokens_of_real_positions_only():
    expected = [[6, 7, 8, X], [X, X, 10, X], [12, X, X, X], [X, X, X, X]]
    assert next_tokens(INPUTS).tolist() == expected
    assert next_tokens({"input_ids": INPUTS["input_ids"][:1]}).tolist() == expected[:1]


def test_the_last_position_is_the_last_that_has_a_next_token():
    expected = [[X, X, 8, X], [X, X, 10, X], [12, X, X, X], [X, X, X, X]]
    assert next_tokens(INPUTS, "last").tolist() == expected


def test_labels_are_taken_as_they_are():
    labels = torch.tensor([[X, 3, X, 4], [X, X, X, 0], [1, 2, X, X], [X, X, X, X]])
    assert next_tokens({**INPUTS, "labels": labels}).equal(labels)
    expected = [[X, X, X, 4], [X, X, X, 0], [X, 2, X, X], [X, X, X, X]]
    assert next_tokens({**INPUTS, "labels": labels}, "last").tolist() == expected


def scalar(row, token, target):
    """Of one position, from a list of logits."""
    if target == "logit":
        return row[token]
    if target == "logit-mean":
        return row[token] - math.fsum(row) / len(row)
    if target == "logprob":
        return row[token] - max(row) - math.log(math.fsum(math.exp(x - max(row)) for x in row))
    if target == "lead":
        return row[token] - max(row[:token] + row[token + 1 :])
    return max(row)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("target", TARGETS)
def test_values(target, positions):
    inputs = batch()
    logits = 30 * torch.randn(3, 12, VOCABULARY, generator=torch.Generator().manual_seed(0))
    labels = next_tokens(inputs, positions)
    expected = [
        math.fsum(
            scalar(logits[b, t].tolist(), labels[b, t].item(), target) for t in range(12) if labels[b, t] >= 0
        )
        for b in range(3)
    ]
    # fp32: sums of 12 positions, each off by a rounding of logits of size 100
    ours = target_value(logits, inputs, target, positions)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-6, atol=12 * 100 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_logits_are_reduced_in_fp32(dtype):
    logits = torch.randn(1, 3, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([[1, X, 2]])
    value = explained(logits, labels, "logprob")
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = explained(logits.double(), labels, "logprob")
    torch.testing.assert_close(value.double(), wide, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_gradient_is_zero_where_nothing_is_explained(target):
    logits = torch.randn(2, 4, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[X, 3, X, 4], [X, X, X, X]])
    explained(logits, labels, target).sum().backward()
    explained_at = logits.grad.abs().sum(-1) > 0
    assert explained_at.tolist() == (labels >= 0).tolist()


def test_a_callable_gets_all_logits_and_the_batch():
    logits, inputs = torch.randn(3, 12, VOCABULARY), batch()
    seen = target_value(logits, inputs, lambda *given: given)
    assert seen[0] is logits
    assert seen[1] is inputs


def test_unknown_names():
    check_target("logit", "all")
    check_target(lambda logits, batch: logits[:, -1, 0], "last")
    with pytest.raises(InputError, match=r"'perplexity' is not known; use logit \| .* or a callable"):
        check_target("perplexity", "all")
    with pytest.raises(InputError, match=r"'first' are not known; use all \| last"):
        check_target("logit", "first")
