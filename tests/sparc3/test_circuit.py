"""Circuits measured by ablation against runs by hand; faithfulness by hand."""

import math
from copy import deepcopy
from dataclasses import replace

import letters
import pytest
import scipy.stats
import torch
import words
from by_hand import examples_of, expected_means, model_of, reference
from tiny import state

import sparc3
from sparc3 import circuit as circuits
from sparc3.ablation import ablated_differences, differences, replacement
from sparc3.agreement import agreement
from sparc3.circuit import Search
from sparc3.circuit_settings import check_circuit_settings, default_rules, default_settings
from sparc3.errors import InputError
from sparc3.faithfulness import GOAL, Point, areas, faithfulness, sparsest
from sparc3.families import prunable
from sparc3.ranking import COMPONENT_METHODS, WEIGHT_METHODS, score_components
from sparc3.tasks import Task, load_task, task_batches
from sparc3.units import components

# Measuring


@pytest.mark.parametrize("ablation", ["zero", "mean", "patch"])
def test_ablating_is_overwriting_in_a_run_of_the_whole_model(ablation):
    model = model_of("llama")
    examples, found = examples_of(model), components(model, "node")
    batches = task_batches(model, words.tokenizer(), examples)
    replace = replacement(model, found, ablation, batches)
    keeps = [torch.tensor([index != gone for index in range(10)]) for gone in (0, 4, 7, 9, 10)]
    ours = ablated_differences(model, found, batches, keeps, replace)
    means = expected_means(model, examples)
    for keep, row in zip(keeps, ours, strict=True):
        for example, value in zip(examples, row, strict=True):
            other = reference(model, example, corrupted=True)[1]
            handles = []
            for site in found.sites:
                x = {"zero": torch.zeros(1), "mean": means[site.name], "patch": other[site.name][0]}[ablation]
                kept = keep[site.component]

                def overwrite(module, args, x=x, kept=kept):
                    return (torch.where(kept, args[0], x.float()),)

                handles.append(site.module.register_forward_pre_hook(overwrite))
            with torch.no_grad():
                ids = torch.tensor([[words.BOS, *words.ids(example.prompt)]])
                logits = model(ids, use_cache=False).logits[0, -1]
            for handle in handles:
                handle.remove()
            expected = logits[example.right_ids[0]] - logits[example.wrong_ids[0]]
            # fp32 sums in another order where the batch is padded.
            assert value.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("unit", ["weight", "head", "neuron", "layer"])
def test_measures_of_the_whole_and_the_empty_model(unit):
    model = model_of("llama")
    task = letters.task(model)
    before = state(model)
    search = Search(model, words.tokenizer(), task, unit)
    values = [reference(model, one)[0] for one in task.judging]
    assert search.full.logit_difference == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert search.full.accuracy == sum(value > 0 for value in values) / len(values) == 1
    assert (search.full.faithfulness, search.empty.faithfulness) == (1, 0)
    copy = deepcopy(model)
    for name, weight in prunable(copy).items():
        if unit in ("weight", "layer") or ("mlp" in name) == (unit == "neuron"):
            weight.weight.data.zero_()
    empty = [reference(copy, one)[0] for one in task.judging]
    assert search.empty.logit_difference == pytest.approx(sum(empty) / len(empty), abs=1e-5)
    assert search.empty.accuracy == sum(value > 0 for value in empty) / len(empty)
    search.find("lrp")
    assert state(model) == before


@pytest.mark.parametrize(("unit", "ablation"), [("weight", "zero"), ("neuron", "zero"), ("neuron", "patch")])
def test_a_point_is_what_the_kept_circuit_measures(unit, ablation):
    model = model_of("llama")
    task = letters.task(model)
    search = Search(model, words.tokenizer(), task, unit, ablation)
    circuit = search.find("gradient")
    batches = task_batches(model, words.tokenizer(), task.judging)
    for point in circuit.curve:
        keep = search.kept(circuit.scores, circuit.settings, point.fraction)
        assert point.kept == search.total - math.floor((1 - point.fraction) * search.total + 0.5)
        if unit == "weight":
            scores = torch.cat([tensor.flatten() for tensor in circuit.scores.tensors.values()]).abs()
            kept = torch.cat([keep.kept(name).flatten() for name in keep.bits])
            pruned = deepcopy(model)
            keep.apply(pruned)
            values = differences(pruned, batches)
        else:
            scores, kept = circuit.scores.abs(), keep
            found = components(model, unit)
            replace = replacement(model, found, ablation, [])
            (values,) = ablated_differences(model, found, batches, [keep], replace)
        assert int(kept.sum()) == point.kept
        if 0 < point.kept < search.total:
            assert scores[kept].min() >= scores[~kept].max()
        mean = values.double().mean().item()
        assert point.logit_difference == pytest.approx(mean, abs=1e-5)
        whole, empty = search.full.logit_difference, search.empty.logit_difference
        assert point.faithfulness == pytest.approx((mean - empty) / (whole - empty), abs=1e-5)
    assert circuit.curve[-1].faithfulness == pytest.approx(1, abs=1e-6)
    assert circuit.sparsest.accuracy >= GOAL


def test_ranking_by_value_puts_what_works_against_the_task_last():
    model = model_of("llama")
    search = Search(model, words.tokenizer(), letters.task(model), "head")
    scores = torch.tensor([0.5, -3.0, 2.0, 0.5, 0.0, -0.1, 1.0, 0.2])
    value = search.kept(scores, {"by": "value", "method": "lrp"}, 0.5)
    magnitude = search.kept(scores, {"by": "magnitude", "method": "lrp"}, 0.375)
    # Of the two at 0.5 the first one stays.
    assert value.tolist() == [True, False, True, True, False, False, True, False]
    assert magnitude.tolist() == [False, True, True, False, False, False, True, False]


def test_the_mask_of_kept_components_measures_the_same():
    model = model_of("llama")
    task = letters.task(model)
    search = Search(model, words.tokenizer(), task, "neuron")
    circuit = search.find("lrp")
    mask = search.mask(search.kept(circuit.scores, circuit.settings, 0.2))
    mask.apply(model)
    values = differences(model, task_batches(model, words.tokenizer(), task.judging)).double()
    point = next(point for point in circuit.curve if point.fraction == 0.2)
    assert values.mean().item() == pytest.approx(point.logit_difference, abs=1e-5)


@pytest.mark.parametrize(
    ("unit", "zero", "mean", "patch"),
    [("head", 1, 0, 1), ("kv-head", 1, 0, 1), ("neuron", 1, 0, 0), ("mlp", 0, 0, 0), ("layer", 0, 0, 0)],
)
def test_where_a_norm_is_no_constant(unit, zero, mean, patch):
    rules = [default_settings(unit, ablation)["rule"] for ablation in ("zero", "mean", "patch")]
    assert [sparc3.Rule.parse(rule).norm_scale_gradient for rule in rules] == [zero, mean, patch]


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_the_rule_is_the_one_whose_circuit_of_the_ranking_examples_is_the_smallest(unit, monkeypatch):
    model = model_of("llama")
    task = letters.task(model, 48)
    # More examples than are compared on: the others must not count.
    monkeypatch.setattr(circuits, "_COMPARED", 16)
    rules = default_rules(unit, "zero")
    # Every second of 24, as a file may have its groups one after another.
    known = Search(model, words.tokenizer(), Task(task.name, task.ranking, task.ranking[::2]), unit)
    shares = [known.find("lrp", rule=rule).sparsest.kept / known.total for rule in rules]
    assert len(set(shares)) == len(rules) == {"weight": 3, "neuron": 2}[unit]
    search, told = Search(model, words.tokenizer(), task, unit), []
    circuit = search.find("lrp", tell=told.append)
    names = [" + ".join(str(sparc3.Rule.parse(one)) for one in rule.split("+")) for rule in rules]
    assert circuit.settings["compared"] == dict(zip(names, shares, strict=True))
    best = rules[shares.index(min(shares))]
    expected = search.find("lrp", rule=best)
    assert "compared" not in expected.settings
    assert circuit.settings["rule"] == expected.settings["rule"]
    assert (circuit.curve, circuit.sparsest) == (expected.curve, expected.sparsest)
    assert told[0] == f"lrp: scoring by {len(rules)} rules"
    # The first of equals.
    assert rules[0] == default_settings(unit, "zero")["rule"]
    monkeypatch.setattr(circuits, "GOAL", 0.0)
    tied = Search(model, words.tokenizer(), task, unit).find("lrp").settings
    smallest = 1 - math.floor(0.999 * search.total + 0.5) / search.total
    assert list(tied["compared"].values()) == pytest.approx([smallest] * len(rules), abs=1e-12)
    assert tied["rule"] == names[0]


@pytest.mark.parametrize("unit", ["weight", "head"])
def test_scores_of_several_rules_are_averaged_each_over_its_sum(unit):
    model = model_of("llama")
    zero = prunable(model)["model.layers.1.mlp.down_proj.weight"].weight
    zero.data[2, 5] = 0
    search = Search(model, words.tokenizer(), letters.task(model), unit)
    found = search.find("lrp", rule="attnlrp+gradient,norm=constant", reduce="signed")
    assert found.settings["rule"] == " + ".join(
        str(sparc3.Rule.parse(rule)) for rule in ("attnlrp", "gradient,norm=constant")
    )
    expected = 0.0
    for rule in ("attnlrp", "gradient,norm=constant"):
        scores = search.find("lrp", rule=rule, reduce="signed").scores
        if unit == "weight":
            scores = torch.cat([tensor.flatten() for tensor in scores.tensors.values()])
        scores = scores.double()
        expected = expected + scores / scores[scores.isfinite()].abs().sum() / 2
    ours = found.scores
    if unit == "weight":
        assert ours.tensors["model.layers.1.mlp.down_proj.weight"][2, 5] == -torch.inf
        assert ours.settings["rule"] == found.settings["rule"]
        ours = torch.cat([tensor.flatten() for tensor in ours.tensors.values()]).double()
    # fp32: two divisions, a sum and a half, each 2^-24 of a term, which may cancel: of the largest score.
    largest = expected[expected.isfinite()].abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=4 * 2.0**-24, atol=4 * 2.0**-24 * largest)


def test_rules_that_see_nothing_leave_their_mean_to_the_others():
    scores = [torch.tensor([0.0, 0.0, -0.0]), torch.tensor([1.0, -3.0, 0.0])]
    assert circuits._mean(scores).tolist() == [0.125, -0.375, 0.0]
    assert circuits._mean(scores[:1] * 2).tolist() == [0.0, 0.0, 0.0]


def test_ranking_examples_that_the_model_gets_wrong_compare_no_rules():
    model = model_of("llama")
    task = letters.task(model)
    wrong = [replace(one, right_ids=one.wrong_ids, wrong_ids=one.right_ids) for one in task.ranking]
    search = Search(model, words.tokenizer(), Task(task.name, tuple(wrong), task.judging), "neuron")
    found = search.find("lrp")
    assert found.settings["compared"] == {}
    expected = search.find("lrp", rule=default_settings("neuron", "zero")["rule"])
    assert (found.settings["rule"], found.curve) == (expected.settings["rule"], expected.curve)


@pytest.mark.parametrize("ablation", ["zero", "mean", "patch"])
def test_heads_and_mlps_are_each_shown_by_their_own_rule(ablation):
    model = model_of("llama")
    task = letters.task(model)
    found, values = Search(model, words.tokenizer(), task, "neuron", ablation).node_relevance()
    shown = dict(zip(found.names, values.tolist(), strict=True))
    batches = task_batches(model, words.tokenizer(), task.ranking)
    for unit in ("head", "mlp"):
        own, rule = components(model, unit), default_settings(unit, ablation)["rule"]
        expected = score_components(model, own, batches, "lrp", ablation=ablation, rule=rule)
        assert [shown.pop(name) for name in own.names] == expected.tolist()
    assert not shown


def test_faithfulness_and_areas_by_hand():
    assert faithfulness(2.0, 5.0, -1.0) == 0.5
    values = [(0.1, 0.0), (0.2, 0.5), (0.5, 1.5), (1.0, 1.0)]
    curve = [Point(fraction, 0, 0.0, 0.0, f) for fraction, f in values]
    cpr, cmd = areas(curve)
    assert cpr == pytest.approx(0.1 * 0.25 + 0.3 * 1.0 + 0.5 * 1.25)
    assert cmd == pytest.approx(0.1 * 0.75 + 0.3 * 0.5 + 0.5 * 0.25)


@pytest.mark.parametrize("empty", [5.0, 6.0, math.nan])
def test_faithfulness_is_undefined_where_the_empty_model_is_not_below_the_whole(empty):
    assert math.isnan(faithfulness(2.0, 5.0, empty))
    curve = [Point(fraction, 0, 0.0, 0.0, math.nan) for fraction in (0.1, 1.0)]
    assert all(map(math.isnan, areas(curve)))


def test_the_sparsest_circuit_is_the_one_from_which_on_accuracy_holds():
    def point(fraction, accuracy=None):
        # Accuracy holds from 0.3 on, and once, by chance, at 0.02.
        found = accuracy if accuracy is not None else float(fraction >= 0.3)
        return Point(fraction, round(1000 * fraction), 0.0, found, 0.0)

    curve = [point(0.01), point(0.02, 1.0), point(0.1), point(0.2), point(0.5), point(1.0)]
    found = sparsest(curve, 0.9, point)
    assert 0.3 <= found.fraction < 0.3 * 2.5 ** (1 / 32)
    # The grid's own where the next smaller circuit has one component less, or there is none smaller.
    few = [Point(0.5, 1, 0, 0.5, 0), Point(1.0, 2, 0, 1.0, 0)]
    assert sparsest(few, 0.9, None) == few[1]
    assert sparsest(few, 0.5, None) == few[0]


def test_agreement_is_scipys():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(30, generator=generator, dtype=torch.float64)
    exact[3], exact[9] = 50.0, -40.0
    scores = exact + torch.randn(30, generator=generator, dtype=torch.float64)
    scores[4:8] = 0.0  # ties
    found = agreement(scores, exact)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(scores, exact)[0])
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(scores, exact)[0])
    rest = [index for index in range(30) if index not in (3, 9)]
    assert found["pearson_without_two"] == pytest.approx(scipy.stats.pearsonr(scores[rest], exact[rest])[0])
    assert math.isnan(agreement(scores[:2], exact[:2])["pearson_without_two"])


def test_every_method_runs_and_repeats_itself():
    model = model_of("llama")
    for unit, methods in (("head", COMPONENT_METHODS), ("weight", WEIGHT_METHODS)):
        search = Search(model, words.tokenizer(), letters.task(model), unit)
        for method in methods:
            first, again = search.find(method, seed=3), search.find(method, seed=3)
            assert first.curve == again.curve
            assert first.settings == again.settings
            assert first.settings["method"] == method


def test_a_larger_difference_of_an_empty_model_that_does_not_do_the_task_is_no_refusal():
    model = model_of("llama")
    task = letters.task(model, rows=letters.misleading_lines(model))
    search = Search(model, words.tokenizer(), task, "weight")
    assert search.empty.logit_difference > search.full.logit_difference > 0
    assert (search.full.accuracy, search.empty.accuracy) == (1, 1 / 3)
    circuit = search.find("lrp")
    assert all(math.isnan(value) for value in (circuit.cpr, circuit.cmd))
    assert all(math.isnan(point.faithfulness) for point in (search.full, search.empty, *circuit.curve))
    assert circuit.sparsest.accuracy >= GOAL
    # Accuracy holds at every larger circuit of the curve, and not at the next smaller one.
    larger = [point.accuracy for point in circuit.curve if point.fraction > circuit.sparsest.fraction]
    smaller = [point.accuracy for point in circuit.curve if point.fraction < circuit.sparsest.fraction]
    assert all(accuracy >= GOAL for accuracy in larger)
    assert smaller[-1] < GOAL


# Refused


def test_a_model_that_does_not_do_the_task_is_said_so():
    model = model_of("llama")
    task = letters.task(model)
    swapped = [
        type(one)(one.prompt, one.corrupted, one.wrong, one.answer, one.wrong_ids, one.right_ids, one.group)
        for one in task.judging
    ]
    with pytest.raises(
        InputError, match=r"does not do task letters: .* on 6 examples\), so there is no circuit"
    ):
        Search(model, words.tokenizer(), type(task)("letters", task.ranking, tuple(swapped)), "head")


def test_a_unit_that_the_task_does_not_need_is_said_so():
    model = model_of("llama")
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
    with pytest.raises(InputError, match=r"with every head ablated the model does task letters no worse"):
        Search(model, words.tokenizer(), letters.task(model), "head")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edge", "lrp"), "unit 'edge' is not known; use weight | neuron"),
        (("head", "saliency"), "method 'saliency' is not known; use lrp"),
        (("weight", "saliency"), "method 'saliency' is not known; use lrp"),
        (("weight", "exact"), "method 'exact' scores components, not weights"),
        (("weight", "lrp", "patch"), "weights are ablated by zero alone, not by 'patch'"),
        (("weight", "lrp", "zero", "value", "cp"), "rule cp gives exactly zero relevance"),
        (("weight", "lrp", "zero", "value", "attnlrp", "mean"), "reduce 'mean' is not known"),
        (("neuron", "exact"), "exact ablation runs the model once for every component"),
        (("head", "lrp", "swap"), "ablation 'swap' is not known; use zero | mean | patch"),
        (("head", "lrp", "zero", "size"), "ranking 'size' is not known; use magnitude | value"),
        (("weight", "lrp", "zero", "value", "attnlrp + x"), "rule 'x' is not known"),
        (("head", "lrp", "zero", "value", "gradient", "signed", "loss"), "target 'loss' is not known"),
        (("head", "lrp", "zero", "value", "lxt"), "rule 'lxt' is not known"),
        (
            ("head", "lrp", "zero", "value", "cp", "token-square"),
            "reduce 'token-square' is not known for components",
        ),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(InputError) as caught:
        check_circuit_settings(*arguments)
    assert message in str(caught.value)


# The bundled model


def test_lrp_finds_sparser_circuits_of_the_bundled_model_than_magnitude_and_random():
    loaded = sparc3.load("tiny-llama")
    task = load_task("ioi", loaded.tokenizer, 64, bundled=True)
    for unit in ("weight", "neuron"):
        search = Search(loaded.model, loaded.tokenizer, task, unit)
        assert search.full.accuracy > 0.9
        found = {method: search.find(method).sparsest for method in ("lrp", "magnitude", "random")}
        assert all(point.accuracy >= GOAL * search.full.accuracy for point in found.values())
        assert found["lrp"].kept < found["magnitude"].kept
        assert found["lrp"].kept < found["random"].kept
