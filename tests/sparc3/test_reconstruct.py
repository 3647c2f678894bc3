"""SparseGPT and least squares against naive float64 implementations that take one row or one column at a time.

The naive SparseGPT is optimal brain surgery as the paper derives it: whenever a column is passed, its inputs leave
the problem, so the inverse of what is left of H is computed anew, and a row that loses its weight spreads the error
by it.
"""

import math

import numpy as np
import pytest
import torch

from sparc3 import reconstruct
from sparc3.inputs import Inputs
from sparc3.reconstruct import _SLACK, DAMPING, RIDGE, TOLERANCE, _steps, least_squares, sparsegpt


def problem(rows, columns, tokens=400, seed=0, dead=(), outlier=1.0):
    """(weight [rows, columns], inputs [tokens, columns]) fp32, inputs correlated."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / math.sqrt(columns) + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, 0] *= outlier
    x[:, list(dead)] = 0
    return weight, x


def gram_of(x):
    return x.T @ x


def inputs_of(x):
    return Inputs(x.square().sum(0), torch.tensor(float(len(x))), gram_of(x))


def damped(gram, damping=DAMPING):
    h = gram.numpy().astype(np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    return h + damping * np.diag(h).mean() * np.eye(len(h)), dead


def naive_sparsegpt(weight, gram, sparsity, pattern):
    """(kept, values) in float64, columns left to right."""
    w = weight.numpy().astype(np.float64).copy()
    zero = w == 0
    h, dead = damped(gram)
    rows, columns = w.shape
    keep_of, group = map(int, pattern.split(":")) if ":" in pattern else (0, 0)
    kept = np.ones_like(w, dtype=bool)

    def cut(n):
        return math.floor(sparsity * n + 0.5)

    for i in range(columns):
        left = np.linalg.inv(h[i:, i:])
        start = i % (group or 128) == 0
        if start:
            end = min(i + (group or 128), columns)
            # The diagonal that column j will have when it is reached, all those before it gone.
            scale = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(i, end)])
            saliency = w[:, i:end] ** 2 / scale
            saliency[:, dead[i:end]] = 0
            saliency[zero[:, i:end]] = -1
            # among equal scores the lower index is kept
            if group or pattern == "row":
                count = group - keep_of if group else cut(end) - cut(i)
                for row in range(rows):
                    order = sorted(range(end - i), key=lambda c, s=saliency[row]: (s[c], -c))
                    kept[row, [i + c for c in order[:count]]] = False
            else:
                flat = saliency.ravel()
                order = sorted(range(flat.size), key=lambda c, s=flat: (s[c], -c))
                for c in order[: cut(rows * end) - cut(rows * i)]:
                    kept[c // (end - i), i + c % (end - i)] = False
        for row in range(rows):
            if not kept[row, i]:
                w[row, i:] -= w[row, i] / left[0, 0] * left[0]
                w[row, i] = 0
    return kept, w


@pytest.mark.parametrize(
    ("shape", "pattern", "sparsity"),
    [
        ((7, 150), "layer", 0.5),
        ((7, 150), "row", 0.37),
        ((5, 24), "2:4", 0.5),
        ((5, 21), "1:3", 2 / 3),
        ((1, 1), "row", 0.5),
        ((3, 130), "layer", 0.0),
    ],
)
def test_sparsegpt(shape, pattern, sparsity):
    weight, x = problem(*shape, dead=(2, shape[1] - 1) if shape[1] > 2 else ())
    weight[0, : shape[1] // 3] = 0
    before = weight.clone()
    kept, values = sparsegpt(weight, gram_of(x), sparsity, pattern)
    assert torch.equal(weight, before)
    expected_kept, expected = naive_sparsegpt(weight, gram_of(x), sparsity, pattern)
    assert np.array_equal(kept.numpy(), expected_kept)
    # fp32 updates of up to 150 columns, each weighted by rows of the inverse's factor (condition below 1e4)
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=2e-4)
    assert not values[~kept].any()
    if pattern == "layer":
        assert int((~kept).sum()) == math.floor(sparsity * kept.numel() + 0.5)
    elif pattern == "row":
        assert (~kept).sum(1).tolist() == [math.floor(sparsity * shape[1] + 0.5)] * shape[0]


def test_sparsegpt_of_experts_is_that_of_each():
    weights, inputs = zip(*(problem(4, 12, seed=seed) for seed in (1, 2)), strict=True)
    grams = torch.stack([gram_of(inputs[0]), torch.zeros(12, 12)])  # the second saw no token
    kept, values = sparsegpt(torch.stack(weights), grams, 0.5, "row")
    for index in range(2):
        alone = sparsegpt(weights[index], grams[index], 0.5, "row")
        assert torch.equal(kept[index], alone[0])
        assert torch.equal(values[index], alone[1])
    assert torch.equal(values[1], weights[1] * kept[1])


def test_an_outlier_input_leaves_the_others_their_digits():
    weight, x = problem(4, 40, outlier=3000.0)
    kept, values = sparsegpt(weight, gram_of(x), 0.5, "row")
    expected_kept, expected = naive_sparsegpt(weight, gram_of(x), 0.5, "row")
    assert np.array_equal(kept.numpy(), expected_kept)
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=2e-4)


def naive_least_squares(weight, kept, x, damping):
    """Each row by itself, from the tokens: rows of x, and one row sqrt(lambda) for each kept weight."""
    w, x = (tensor.numpy().astype(np.float64) for tensor in (weight, x))
    values = np.zeros_like(w)
    ridge = damping * (x**2).sum(1).mean() or 1.0
    for row in range(len(w)):
        k = kept[row].numpy()
        system = np.vstack([x[:, k], math.sqrt(ridge) * np.eye(k.sum())])
        values[row, k] = np.linalg.lstsq(
            system, np.concatenate([x @ w[row], math.sqrt(ridge) * w[row, k]]), rcond=None
        )[0]
    return values


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(5, 33, 400), (3, 64, 20), (1, 1, 3), (2, 7, 1)])
def test_least_squares(rows, columns, tokens):
    weight, x = problem(rows, columns, tokens, dead=(3,) if columns > 3 else (), outlier=30.0)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    kept[0] = False  # a row that is gone
    before = weight.clone()
    values = least_squares(weight, kept, inputs_of(x), tolerance=1e-5)
    assert torch.equal(weight, before)
    assert not values[~kept].any()
    expected = naive_least_squares(weight, kept, x, RIDGE)
    # a residual of 1e-5 in the preconditioner's norm, whose condition the damping holds below the number of tokens
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=2e-3 * max(1, np.abs(expected).max()))
    if columns > 3:
        alive = kept[:, 3]
        torch.testing.assert_close(values[alive, 3], weight[alive, 3])


@pytest.mark.parametrize("damping", [RIDGE, 1e-6])
def test_what_is_solved_in_bf16_comes_as_close_as_was_asked_for(damping, monkeypatch):
    monkeypatch.setattr(reconstruct, "multiplies_bf16", lambda device: True)
    weight, x = problem(40, 300, tokens=3000, dead=(3,), outlier=30.0)
    # Inputs that say nearly the same: rounded to bf16, the least damped system has eigenvalues below zero.
    x[:, 100:] = x[:, :1] / 30 + 0.05 * x[:, 100:]
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    solved = {}

    def steps(system, kept, *rest):
        solved[system.dtype] = len(kept)
        return _steps(system, kept, *rest)

    monkeypatch.setattr(reconstruct, "_steps", steps)
    values = least_squares(weight, kept, inputs_of(x), damping).double()
    assert solved[torch.bfloat16] == 40
    assert solved.get(torch.float32, 0) <= 10  # what bf16 does not solve
    gram, ridge = gram_of(x).double(), damping * x.square().sum(1).mean().double()
    unit = (gram.diagonal() + ridge).rsqrt()
    system = (gram + ridge * torch.eye(300)) * unit * unit[:, None]
    if damping < RIDGE:
        assert torch.linalg.eigvalsh(system.bfloat16().double()).min() < 0
        assert solved[torch.float32] > 0
    w = weight.double() / unit
    residual, asked = (w - values / unit) @ system * kept, w @ system * kept
    # 1.02: the norm that the tolerance is relative to is of products in bf16, each off by up to 2^-8 of its terms.
    assert (residual.norm(dim=1) <= 1.02 * math.sqrt(_SLACK) * TOLERANCE * asked.norm(dim=1)).all()


def test_least_squares_of_experts_is_that_of_each():
    weights, inputs = zip(*(problem(4, 12, seed=seed) for seed in (1, 2)), strict=True)
    grams = torch.stack([gram_of(inputs[0]), torch.zeros(12, 12)])
    kept = torch.rand(2, 4, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    squares = grams.diagonal(dim1=1, dim2=2)
    tokens = torch.tensor([len(inputs[0]), 0.0])
    both = least_squares(torch.stack(weights), kept, Inputs(squares, tokens, grams), tolerance=1e-5)
    alone = least_squares(weights[0], kept[0], inputs_of(inputs[0]), tolerance=1e-5)
    # batched products round otherwise
    torch.testing.assert_close(both[0], alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(both[1], weights[1] * kept[1])


def test_what_least_squares_finds_is_closer_than_the_mask_alone_and_than_sparsegpt():
    weight, x = problem(16, 64)
    kept, updated = sparsegpt(weight, gram_of(x), 0.5, "row", damping=1e-4)
    best = least_squares(weight, kept, inputs_of(x), damping=1e-3, tolerance=1e-4)

    def error(values):
        return (x @ (values - weight).T).square().sum().item()

    assert error(best) < error(updated) < error(weight * kept)
