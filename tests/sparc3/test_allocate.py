"""Budgets against the published definitions, written out with numpy, and what selection makes of them."""

import numpy as np
import pytest
import torch

from sparc3.allocate import owl_budgets, relevance_budgets
from sparc3.errors import InputError
from sparc3.scores import Scores
from sparc3.select import pruned_count

# Two linears a block, three blocks of different size, and a head.
SHAPES = {
    "model.layers.0.a.weight": (4, 10),
    "model.layers.0.b.weight": (6, 8),
    "model.layers.1.a.weight": (4, 10),
    "model.layers.1.b.weight": (6, 8),
    "model.layers.10.a.weight": (7, 9),
    "lm_head.weight": (5, 6),
}


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.rand(shape, generator=generator) ** 6 for name, shape in SHAPES.items()}
    made["model.layers.0.a.weight"][0, :3] = -torch.inf  # zero weights
    return made


def test_owl():
    found = owl_budgets(scores(), 0.6, "model.layers")
    blocks = {
        "0": ["model.layers.0.a.weight", "model.layers.0.b.weight"],
        "1": ["model.layers.1.a.weight", "model.layers.1.b.weight"],
        "10": ["model.layers.10.a.weight"],
    }
    ratio, size = [], []
    for names in blocks.values():
        flat = np.concatenate([scores()[name].numpy().ravel() for name in names]).astype(np.float64)
        flat[np.isneginf(flat)] = 0
        ratio.append((flat > 5 * flat.mean()).mean())
        size.append(flat.size)
    ratio = np.array(ratio)
    keep = (ratio - ratio.min()) / (ratio.max() - ratio.min()) * 2 * 0.08
    keep = keep - np.average(keep, weights=size) + (1 - 0.6)
    assert ratio.max() > ratio.min()
    assert list(found) == list(SHAPES)
    for names, share in zip(blocks.values(), 1 - keep, strict=True):
        for name in names:
            assert found[name] == pytest.approx(share, abs=1e-12)
    assert found["lm_head.weight"] == 0.6
    pruned = sum(found[name] * np.prod(shape) for name, shape in SHAPES.items())
    assert pruned == pytest.approx(0.6 * sum(np.prod(shape) for shape in SHAPES.values()))


def test_owl_of_blocks_that_do_not_differ_is_uniform():
    same = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    assert owl_budgets(same, 0.6, "model.layers") == dict.fromkeys(SHAPES, 0.6)


def test_owl_is_refused_where_there_is_no_room():
    for sparsity in (0.01, 0.97):
        with pytest.raises(InputError, match="leaves no room"):
            owl_budgets(scores(), sparsity, "model.layers")


def test_relevance_budgets_are_what_one_threshold_prunes():
    made = Scores(scores())
    found = relevance_budgets(made, 0.4)
    everything = np.sort(np.concatenate([tensor.numpy().ravel() for tensor in made.tensors.values()]))
    threshold = everything[pruned_count(0.4, everything.size)]
    for name, tensor in made.tensors.items():
        assert found[name] == pytest.approx((tensor.numpy() < threshold).mean())
    assert max(found.values()) - min(found.values()) > 0.05
    # Where the same scores pick inside each tensor, the mask is the global one.
    inside, over_all = made.select(0.4, "layer", budgets=found), made.select(0.4, "global")
    for name in SHAPES:
        assert torch.equal(inside.kept(name), over_all.kept(name))


def test_rows_lose_their_tensors_share():
    made = Scores(scores())
    budgets = dict(zip(SHAPES, (0.0, 0.33, 0.5, 1.0, 0.71, 0.6), strict=True))
    mask = made.select(0.5, "row", budgets=budgets)
    for name, (_, width) in SHAPES.items():
        gone = (~mask.kept(name)).sum(1)
        assert set(gone.tolist()) == {pruned_count(budgets[name], width)}
    assert mask.settings["budgets"] == budgets
    assert mask.settings["sparsity"] == 0.5
