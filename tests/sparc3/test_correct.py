"""Corrections: a planted neuron is found and removed, exactly so many go, and everything comes back."""

from dataclasses import replace

import pytest
import tiny
import torch
import words

import sparc3
from sparc3 import behaviours
from sparc3.continuations import continuations
from sparc3.contrast import mean_relevance
from sparc3.correct import Correction
from sparc3.errors import InputError
from sparc3.evaluate import perplexity
from sparc3.scores import as_batches
from sparc3.sweep import SHARES, Measured, halvings, within_budget
from sparc3.undesired import explained_batches

PROMPTS = [f"{a}{b}" for a in "abcdefgh" for b in "xyz"]
PLANTED = 17


def windows(seed=3, count=8, length=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 40, (count, length), generator=generator)


def shouting():
    """A Llama whose neuron m1.n17 pushes the sign @ wherever a small letter is read."""
    model = tiny.build("llama", vocab_size=words.VOCABULARY)
    last = model.model.layers[1]
    with torch.no_grad():
        direction = model.lm_head.weight[words.ids("@")[0]]
        direction = direction / direction.norm()
        letters = torch.cat([model.model.embed_tokens.weight[words.ids(letter)] for letter in "abcdefghxyz@"])
        last.mlp.gate_proj.weight[PLANTED] = letters.mean(0) / letters.mean(0).norm() ** 2
        last.mlp.up_proj.weight[PLANTED] = last.mlp.gate_proj.weight[PLANTED]
        last.mlp.down_proj.weight[:, PLANTED] = direction * 60
    return model


def correction(model=None, behaviour=None, **options):
    asked = {"unit": "neuron", "tokens": 5, "seed": 0, **options}
    undesired = behaviours.answers(dict.fromkeys(PROMPTS, ("@",)))
    return Correction(
        model or shouting(), words.tokenizer(), behaviour or undesired, PROMPTS, windows(), **asked
    )


@pytest.mark.parametrize("method", ["lrp", "gradient"])
@pytest.mark.parametrize("contrast", ["difference", "set-difference"])
def test_the_neuron_behind_a_behaviour_is_removed(method, contrast):
    model = shouting()
    found = correction(model).find(method, contrast=contrast, counts=[1], budget=None)
    assert found.chosen.count == 1
    before, after = correction(model).before, found.chosen
    assert (before.shown, after.shown) == (1.0, 0.0)
    row = ~found.mask.kept("model.layers.1.mlp.down_proj.weight")
    assert row[:, PLANTED].all()
    assert row.sum() == 32
    # The measurement is of the model under the mask, on the prompts that were not explained.
    found.mask.apply(model, keep=True)
    said = continuations(model, words.tokenizer(), [one.prompt for one in before.said], 5)
    assert [one.ids for one in said] == [one.ids for one in after.said]
    assert after.perplexity == pytest.approx(perplexity(model, windows()[1::2]).value)
    found.mask.undo(model)


@pytest.mark.parametrize("unit", ["neuron", "weight"])
@pytest.mark.parametrize("method", ["lrp", "gradient"])
def test_the_absolute_contrast_sets_loss_at_each_token_against_the_lead(unit, method):
    search = correction(unit=unit)
    undesired = explained_batches(search.model, search.tokenizer, search.behaviour, search.ranking)
    general, bad = (
        mean_relevance(
            search.model,
            batches,
            unit,
            method,
            rule="gradient,activation=identity",
            skip_first=True,
            **options,
        )
        for batches, options in (
            (as_batches(search.model, windows()[::2]), {"target": "logprob", "absolute": True}),
            (undesired, {"target": "lead"}),
        )
    )
    found = search.find(method, contrast="absolute", counts=[2], budget=None)
    assert found.settings["target"] == "lead"
    expected = {name: 4 * general[name] - bad[name] for name in general}
    assert set(found.scores) == set(expected)
    for name, scores in expected.items():
        torch.testing.assert_close(found.scores[name], scores)
    if unit == "neuron":
        two = expected["neuron"].argsort()[:2].tolist()
        assert {*search.names(found.scores, 2)} == {f"m{index // 48}.n{index % 48}" for index in two}
    else:
        second = torch.cat([scores.flatten() for scores in expected.values()]).kthvalue(2).values
        for name, scores in expected.items():
            assert torch.equal(found.mask.kept(name), scores > second)


def test_random_removal_does_not_find_it():
    assert correction().find("random", counts=[1], budget=None).chosen.shown == 1.0


@pytest.mark.parametrize(
    ("unit", "count", "weights"),
    [("weight", 37, 37), ("neuron", 3, 3 * 3 * 32), ("head", 2, 2 * 8 * 32)],
)
@pytest.mark.parametrize("method", ["lrp", "random"])
def test_exactly_so_many_are_removed_and_come_back(unit, count, weights, method):
    model = shouting()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:4] = 0  # zeros that are there already do not count
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    search = correction(model, unit=unit)
    found = search.find(method, counts=[count], budget=None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found.mask.apply(model, keep=True)
    lost = sum(
        int(((model.state_dict()[name] == 0) & (tensor != 0)).sum()) for name, tensor in before.items()
    )
    zeros = (
        0
        if unit != "neuron"
        else sum(32 for name in search.names(found.scores, count) if name in {f"m0.n{n}" for n in range(4)})
    )
    assert lost == weights - zeros
    found.mask.undo(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_general_text_needs_is_spared():
    """Here general text has the sign after each letter, so the neuron that is behind it must stay."""
    model = shouting()
    sign, letters = words.ids("@")[0], [words.ids(letter)[0] for letter in "abcdefgh"]
    general = torch.tensor(
        [[token for letter in letters[turn:] for token in (letter, sign)] for turn in [0] * 6]
    )
    undesired = behaviours.answers(dict.fromkeys(PROMPTS, ("@",)))
    search = Correction(model, words.tokenizer(), undesired, PROMPTS, general, unit="neuron", tokens=5)
    scores = {"neuron": torch.arange(96.0).roll(48 + PLANTED)}
    assert search.names(scores, 1) == [f"m1.n{PLANTED}"]
    spared, count = search._spared(scores, 4, 0.05)
    names = search.names(spared, count)
    assert 1 <= len(names) <= 4
    assert f"m1.n{PLANTED}" not in names
    # Where little can be afforded the sweep ends there.
    found = search.find("lrp", counts=[1, 40], budget=None, spare=0.05)
    assert [point.count for point in found.sweep] == sorted({1, found.chosen.count})
    assert f"m1.n{PLANTED}" not in search.names(found.scores, found.chosen.count)


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_what_is_tried_is_what_a_mask_removes(unit):
    model = shouting()
    search = correction(model, unit=unit)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = search.score("random")
    flat = torch.cat([tensor.flatten() for tensor in scores.values()])
    with search._without(flat.argsort()[:20]):
        tried = perplexity(model, windows()).value
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    search.mask(scores, 20).apply(model)
    assert perplexity(model, windows()).value == pytest.approx(tried, rel=1e-6)


def test_prompts_explain_or_judge_and_never_both():
    first, second = correction(examples=4), correction(examples=4, seed=1)
    for one in (first, second):
        ranking, judging = ({said.prompt for said in side} for side in (one.ranking, one.judging))
        assert (len(ranking), len(judging)) == (4, 4)
        assert not ranking & judging
    assert {said.prompt for said in first.ranking} != {said.prompt for said in second.ranking}
    # Enough were found in the first round.
    assert first.run == len(PROMPTS)


def test_labels_are_the_undesired_tokens_after_their_positions():
    search = correction()
    batches = explained_batches(search.model, search.tokenizer, search.behaviour, search.ranking)
    batch = batches[0]
    for row, one in enumerate(search.ranking[: len(batch["input_ids"])]):
        real = int(batch["attention_mask"][row].sum())
        ids = [words.BOS, *words.ids(one.prompt), *one.ids]
        assert batch["input_ids"][row, :real].tolist() == ids
        following = [*ids[1:], -100]
        labels = batch["labels"][row, :real].tolist()
        shout = words.ids("@")[0]
        expected = [
            token if token == shout and place >= len(one.prompt) else -100
            for place, token in enumerate(following)
        ]
        assert labels == expected
        assert (batch["labels"][row, real:] == -100).all()


def test_a_correction_combines_with_a_compression():
    model = shouting()
    search = correction(model)
    found = search.find("lrp", counts=[1], budget=None)
    compressed = sparc3.prune(model, windows(), "magnitude", 0.3, "layer")
    both = found.mask.combine(compressed)
    measured = search.measure(both, 1)
    found.mask.apply(model, keep=True)
    for name in both.shapes:
        assert torch.equal(both.kept(name), found.mask.kept(name) & compressed.kept(name))
    found.mask.undo(model)
    assert measured.shown == 0.0
    assert search.measure(compressed, 1).perplexity != search.before.perplexity


def test_what_the_model_does_not_show_is_not_corrected():
    with pytest.raises(InputError, match=r"does not show answers: 0 of 24 prompts .* Nothing is pruned"):
        correction(behaviour=behaviours.answers(dict.fromkeys(PROMPTS, ("never said",))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "layer"}, "unit 'layer' is not known"),
        ({"include": ["*mlp*"]}, "do not fit unit neuron"),
        ({"judged": torch.ones(2, 99, dtype=torch.int64)}, "the model has 64 positions"),
    ],
)
def test_refused(options, message):
    with pytest.raises(InputError, match=message):
        correction(**options)
    with pytest.raises(InputError, match="96 neurons cannot be removed"):
        correction().find("lrp", counts=[96])


def measured(count, increase):
    return Measured(count, count / 100, 1.0, 1.0, 1.0, 1.0, 1.0, increase, ())


def test_the_budget_chooses_the_largest_that_keeps_to_it():
    sweep = [measured(8, 0.02), measured(1, -0.01), measured(2, 0.01), measured(4, 0.011), measured(16, 0.0)]
    assert within_budget(sweep, 0.01).count == 2
    assert within_budget(sweep, 0.02).count == 16
    assert within_budget(sweep, -0.5) is None
    assert within_budget([measured(1, float("nan"))], 0.5) is None
    found = correction().find("lrp", counts=[1, 2], budget=-0.9)
    assert found.chosen is None
    assert found.mask.sparsity == 0


@pytest.mark.parametrize("spare", [None, 0.05])
@pytest.mark.parametrize(
    ("increases", "shown", "asked", "chosen"),
    [
        # 0.1 of 96 neurons is 10, and 1, 2, 5 come before; 2, 4 and 8 times as many are within all of them.
        ({80: 0.01}, {}, [20, 40, 80], 80),
        # Halfway to what costs too much, and on.
        ({40: 0.011, 80: 0.0}, {}, [20, 40, 30, 35, 37], 37),
        ({30: 0.011, 40: 0.011}, {}, [20, 40, 30, 25, 27], 27),
        ({7: 0.02, 10: 0.02}, {}, [7, 6], 6),
        ({10: float("nan")}, {}, [7, 8, 9], 9),
        # One that costs too much ends it, whatever is after it.
        ({3: float("nan"), 5: 0.02, 10: 0.0}, {}, [3], 2),
        ({1: 0.02}, {}, [], 0),
        ({}, {20: 0.0}, [20], 20),  # nothing is left to correct
        ({10: 0.02}, {5: 0.0}, [], 5),
    ],
)
def test_a_sweep_goes_on_while_the_budget_holds(monkeypatch, increases, shown, asked, chosen, spare):
    search, spared_counts = correction(), []
    monkeypatch.setitem(SHARES, "neuron", 0.1)

    def measure(mask, count):
        point = replace(measured(count, increases.get(count, 0.0)), shown=shown.get(count, 1.0))
        removed[count] = mask
        return point

    def spared(scores, last, budget, progress):
        spared_counts.append(last)
        # Each time other ones.
        return {"neuron": torch.arange(96.0).roll(last)}, last

    removed = {}
    monkeypatch.setattr(search, "measure", measure)
    monkeypatch.setattr(search, "_spared", spared)
    found = search.find("lrp", points=4, budget=0.01, spare=spare)
    assert [point.count for point in found.sweep] == sorted([1, 2, 5, 10, *asked])
    assert spared_counts == ([] if spare is None else [10, *asked])
    if not chosen:
        assert found.chosen is None
        return
    assert found.chosen.count == chosen
    # What is saved, and named, is what was measured of the chosen number.
    assert all(torch.equal(found.mask.bits[name], bits) for name, bits in removed[chosen].bits.items())
    if spare is not None:
        start = chosen if chosen in asked else 10
        assert set(search.names(found.scores, chosen)) == {
            f"m{index // 48}.n{index % 48}" for index in ((start + place) % 96 for place in range(chosen))
        }
    # Numbers that are told are measured and no others.
    monkeypatch.setattr(search, "measure", lambda mask, count: measured(count, 0.0))
    assert [point.count for point in search.find("lrp", counts=[3]).sweep] == [3]
    assert [point.count for point in search.find("lrp", points=1, budget=None).sweep] == [10]


def test_a_sweep_ends_where_sparing_finds_no_more(monkeypatch):
    search = correction()
    monkeypatch.setitem(SHARES, "neuron", 0.1)
    monkeypatch.setattr(search, "measure", lambda mask, count: measured(count, 0.0))
    monkeypatch.setattr(search, "_spared", lambda scores, last, *rest: (scores, min(last, 13)))
    assert [point.count for point in search.find("lrp", points=1, spare=0.01).sweep] == [10, 13]
    monkeypatch.setattr(search, "_spared", lambda scores, last, *rest: (scores, 0))
    found = search.find("lrp", points=1, spare=0.01)
    assert (found.sweep, found.chosen, found.mask.sparsity) == ((), None, 0)


def test_a_number_that_is_asked_for_is_kept_even_where_the_model_breaks(monkeypatch):
    search = correction()
    monkeypatch.setattr(
        search, "measure", lambda mask, count: measured(count, [0.1, float("nan")][count - 1])
    )
    assert search.find("lrp", counts=[1, 2], budget=None).chosen.count == 2
    assert search.find("lrp", counts=[1, 2], budget=0.5).chosen.count == 1


def test_what_is_done_is_told_sample_by_sample_and_run_by_run():
    search, heard = correction(), []
    found = search.find(
        "lrp", counts=[2, 4], budget=None, spare=0.05, tell=lambda *words: heard.append(words)
    )
    steps = {words: of for words, _, of in heard}
    samples = 4 + len(search.ranking)  # every second window of general text explains
    counts = [point.count for point in found.sweep]
    assert steps == {
        "lrp: scoring": samples,
        "lrp: sparing": 4,
        **{f"lrp: {count} removed": len(counts) for count in counts},
    }
    for step, of in steps.items():
        done = [part for words, part, _ in heard if words == step]
        assert done == sorted(done)
        assert 0 <= done[0] <= done[-1] <= of
    scored = [part for words, part, _ in heard if words == "lrp: scoring"]
    assert (scored[0], scored[-1]) == (0, samples)
    assert sum(words == "lrp: sparing" for words, _, _ in heard) > 1


def test_halvings():
    assert halvings(100) == [3, 6, 12, 25, 50, 100]
    assert halvings(3) == [1, 2, 3]
    assert halvings(1) == [1]
