"""Which weights a mask keeps, against a plain Python sort of (score, index) pairs, one group at a time."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build

from sparc3.errors import InputError
from sparc3.scores import Scores, attribute
from sparc3.select import check_sparsity, parse_pattern, pruned_count, select

INF = float("inf")
# Few values, so that every group has ties; both zeros and infinities, subnormals, and neighbours in fp32.
POOL = (0.0, -0.0, 1.0, -1.0, 1.0000001, 2.5, -2.5, 1e-40, -1e-40, INF, -INF, 3e38)


def pruned_of(values, count):
    """The set of indices that go: lowest first, among equals the highest index first."""
    order = sorted(range(len(values)), key=lambda index: (values[index], -index))
    return set(order[:count])


def rank(score, by):
    """-inf marks a weight that is already zero, whatever the ranking."""
    return score if by == "value" or score == -INF else abs(score)


def reference(tensors, sparsity, pattern, by="magnitude"):
    """{name: kept [..., out, in]} by sorting each group's Python floats."""
    flat = {
        name: [rank(score, by) for score in tensor.flatten().tolist()] for name, tensor in tensors.items()
    }
    if pattern == "global":
        everything = [value for values in flat.values() for value in values]
        gone = pruned_of(everything, math.floor(sparsity * len(everything) + 0.5))
        kept, start = {}, 0
        for name, tensor in tensors.items():
            inside = [index not in gone for index in range(start, start + tensor.numel())]
            kept[name], start = torch.tensor(inside).view(tensor.shape), start + tensor.numel()
        return kept
    kept = {}
    for name, tensor in tensors.items():
        width = tensor.shape[-1]
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            size, count = m, m - n
        else:
            size = width if pattern == "row" else tensor.numel()
            count = math.floor(sparsity * size + 0.5)
        inside = []
        for start in range(0, tensor.numel(), size):
            gone = pruned_of(flat[name][start : start + size], count)
            inside += [index not in gone for index in range(size)]
        kept[name] = torch.tensor(inside, dtype=torch.bool).view(tensor.shape)
    return kept


def check(tensors, sparsity, pattern, by="magnitude", transposed=()):
    mask = select(Scores(tensors, frozenset(transposed)), sparsity, pattern, by)
    for name, expected in reference(tensors, sparsity, pattern, by).items():
        stored = expected.mT if name in transposed else expected
        assert mask.shapes[name] == tuple(stored.shape)
        assert torch.equal(mask.kept(name), stored), name
    return mask


@st.composite
def score_tensors(draw, multiple=1):
    """One to three tensors [out, in] or [experts, out, in] with values from a pool, and which are transposed."""
    tensors, transposed = {}, set()
    for name in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
        shape.append(multiple * draw(st.integers(1, 7)))
        count = math.prod(shape)
        pool = draw(st.lists(st.sampled_from(POOL) | st.floats(-4, 4, width=16), min_size=1, max_size=6))
        values = draw(st.lists(st.sampled_from(pool), min_size=count, max_size=count))
        tensors[name] = torch.tensor(values).view(shape)
        if draw(st.booleans()):
            transposed.add(name)
    return tensors, transposed


@settings(max_examples=120, deadline=None)
@given(
    given=score_tensors(),
    sparsity=st.floats(0, 1, exclude_max=True),
    pattern=st.sampled_from(["row", "layer", "global"]),
    by=st.sampled_from(["magnitude", "value"]),
)
def test_equals_a_sort_of_each_group(given, sparsity, pattern, by):
    tensors, transposed = given
    check(tensors, sparsity, pattern, by, transposed)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), m=st.sampled_from([2, 3, 4, 8, 32]), by=st.sampled_from(["magnitude", "value"]))
def test_n_of_m_equals_a_sort_of_each_group(data, m, by):
    n = data.draw(st.integers(1, m - 1))
    tensors, transposed = data.draw(score_tensors(multiple=m))
    mask = check(tensors, None, f"{n}:{m}", by, transposed)
    assert mask.sparsity == pytest.approx(1 - n / m)


@pytest.mark.parametrize("pattern", ["row", "layer", "global"])
def test_rounds_half_up_and_counts_exactly(pattern):
    # 7 columns at 1/2: 3.5 rounds to 4 a row, 21 x 0.5 = 10.5 to 11 a tensor, 21 + 35 = 56 to 28 a model.
    tensors = {"a": torch.randn(3, 7), "b": torch.randn(5, 7)}
    mask = select(Scores(tensors), 0.5, pattern)
    pruned = {name: int((~mask.kept(name)).sum()) for name in tensors}
    if pattern == "row":
        for name in tensors:
            assert (~mask.kept(name)).sum(1).unique().tolist() == [4]
    elif pattern == "layer":
        assert pruned == {"a": 11, "b": 18}
    else:
        assert sum(pruned.values()) == 28
    assert mask.settings == {"sparsity": 0.5, "pattern": pattern, "by": "magnitude"}


def test_pruned_count_is_the_floor_of_s_n_and_a_half():
    # Shares that are exact in binary, so that the rule can be checked in integers.
    for eighths in range(8):
        for n in range(70):
            assert pruned_count(eighths / 8, n) == (2 * eighths * n + 8) // 16


@pytest.mark.parametrize("pattern", ["row", "layer", "global", "2:4"])
def test_among_equal_scores_the_lower_index_is_kept(pattern):
    mask = select(Scores({"a": torch.full((2, 3, 4), 0.25)}), None if ":" in pattern else 0.5, pattern)
    kept = mask.kept("a").flatten().tolist()
    if pattern in ("row", "2:4"):
        assert kept == [True, True, False, False] * 6
    else:
        assert kept == [True] * 12 + [False] * 12


def test_ties_of_the_whole_model_go_by_the_order_of_its_tensors():
    mask = select(Scores({"first": torch.ones(2, 4), "second": torch.ones(2, 4)}), 0.25, "global")
    assert mask.kept("first").all()
    assert mask.kept("second").flatten().tolist() == [True] * 4 + [False] * 4


def test_both_zeros_are_equal():
    mask = select(Scores({"a": torch.tensor([[-0.0, 0.0, -0.0, 0.0]])}), 0.5, "row", by="value")
    assert mask.kept("a").tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("by", ["magnitude", "value"])
def test_minus_infinity_goes_first_and_infinity_last(by):
    scores = torch.tensor([[INF, -INF, 0.0, 5.0], [-INF, -INF, 1.0, INF]])
    assert select(Scores({"a": scores}), 0.25, "row", by).kept("a").tolist() == [
        [True, False, True, True],
        [True, False, True, True],
    ]
    assert select(Scores({"a": scores}), 0.75, "row", by).kept("a").tolist() == [
        [True, False, False, False],
        [False, False, False, True],
    ]


def test_by_value_and_by_magnitude_differ_in_the_sign():
    scores = Scores({"a": torch.tensor([[-3.0, -1.0, 2.0, 4.0]])})
    assert scores.select(0.5).kept("a").tolist() == [[True, False, False, True]]
    assert scores.select(0.5, by="value").kept("a").tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("pattern", ["row", "layer", "global"])
def test_sparsity_zero_keeps_everything_even_what_is_zero(pattern):
    mask = select(Scores({"a": torch.tensor([[-INF, 0.0, 1.0]])}), 0, pattern)
    assert mask.kept("a").all()
    assert mask.sparsity == 0


def test_the_largest_share_prunes_all():
    scores = Scores({"a": torch.randn(3, 5)})
    assert not select(scores, math.nextafter(1, 0), "row").kept("a").any()


def test_existing_zeros_of_a_model_go_first_in_every_family_of_storage():
    """GPT-2 stores [in, out], Mixtral [experts, out, in]; a row is an output in both."""
    for name in ("gpt2", "mixtral"):
        model = build(name)
        scores = attribute(model, [], "magnitude")
        key = next(iter(scores.tensors))
        weight = model.get_parameter(key)
        across = (slice(None), 3) if name == "gpt2" else (..., 3, slice(None))
        weight.data[across][..., ::2] = 0.0
        scores = attribute(model, [], "magnitude")
        mask = scores.select(0.5, "row")
        assert mask.shapes[key] == tuple(weight.shape)
        zeros = weight.data == 0
        assert zeros.sum() * 2 == zeros[across].numel()
        assert not mask.kept(key)[zeros].any()
        assert mask.kept(key)[across][~zeros[across]].all()
        assert mask.fingerprint == scores.fingerprint
        assert mask.settings["method"] == "magnitude"


def test_scores_are_not_changed():
    tensors = {"a": torch.randn(4, 8), "b": torch.randn(2, 4, 8)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for pattern in ("row", "layer", "global", "2:4"):
        select(Scores(tensors, frozenset("a")), None if ":" in pattern else 0.3, pattern)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_views_select_as_their_copies():
    base = torch.randn(12, 10)
    view, copy = base.mT[:, 2:10], base.mT[:, 2:10].contiguous()
    for pattern in ("row", "layer", "global", "2:4"):
        sparsity = None if ":" in pattern else 0.4
        one, two = (select(Scores({"a": tensor}), sparsity, pattern) for tensor in (view, copy))
        assert torch.equal(one.bits["a"], two.bits["a"])


# What is refused


@pytest.mark.parametrize("pattern", ["row", "layer", "global", "2:4"])
def test_nan_is_refused_by_name_and_count(pattern):
    tensors = {"good": torch.zeros(2, 4), "bad": torch.zeros(2, 4)}
    tensors["bad"][1, 2:] = math.nan
    with pytest.raises(InputError, match="bad has NaN scores: 2 of 8"):
        select(Scores(tensors), None if ":" in pattern else 0.5, pattern)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, math.nan, INF, -INF, None])
@pytest.mark.parametrize("pattern", ["row", "layer", "global"])
def test_a_share_outside_the_range_is_refused(pattern, sparsity):
    with pytest.raises(InputError, match=r"sparsity .* must be in \[0, 1\)"):
        select(Scores({"a": torch.zeros(2, 4)}), sparsity, pattern)


@pytest.mark.parametrize(
    "pattern",
    ["", "rows", "N:M", "0:4", "4:4", "5:4", "2:33", "2/4", "-1:4", "2:4:8", " 2:4", "1.5:4", "2:4\n"],
)
def test_patterns_that_are_not_known(pattern):
    with pytest.raises(InputError, match=f"pattern {re.escape(repr(pattern))} is not known; use row, layer"):
        parse_pattern(pattern)
    with pytest.raises(InputError):
        select(Scores({"a": torch.zeros(2, 4)}), 0.5, pattern)


def test_n_of_m_implies_its_sparsity():
    assert check_sparsity(None, "2:4") == check_sparsity(0.5, "2:4") == 0.5
    assert check_sparsity(0.75, "1:4") == 0.75
    assert check_sparsity(1 - 1 / 3, "1:3") == pytest.approx(2 / 3)
    for wrong in (0.4, 0, math.nan):
        with pytest.raises(InputError, match=r"contradicts 2:4, which prunes 0\.5; leave it out"):
            check_sparsity(wrong, "2:4")


def test_n_of_m_must_divide_the_inputs_not_the_outputs():
    tensors = {"fits": torch.zeros(3, 8), "does.not": torch.zeros(8, 6)}
    with pytest.raises(InputError, match=r"2:4 does not divide does\.not: its inputs are 6 wide"):
        select(Scores(tensors), None, "2:4")


def test_an_unknown_ranking_is_refused():
    with pytest.raises(InputError, match=r"ranking 'size' is not known; use magnitude \| value"):
        select(Scores({"a": torch.zeros(2, 4)}), 0.5, "row", by="size")
