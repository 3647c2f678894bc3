"""Scores of components and weights against plain autograd and ablation by hand; faithfulness by hand."""

import math
from copy import deepcopy

import letters
import pytest
import scipy.stats
import torch
import words
from oracle import reference_rules
from tiny import build, state

import sparc3
from sparc3.ablation import ablated_differences, differences, replacement
from sparc3.circuit import (
    GOAL,
    Point,
    Search,
    _sparsest,
    agreement,
    areas,
    check_circuit_settings,
    faithfulness,
)
from sparc3.errors import InputError
from sparc3.families import blocks_of, family_of, find, prunable
from sparc3.ranking import COMPONENT_METHODS, WEIGHT_METHODS, score_components, score_weights
from sparc3.rules import Rule
from sparc3.tasks import load_task, task_batches
from sparc3.units import components

# fp32 against fp64: sums of some hundred terms that partly cancel, relative to the largest score.
TOLERANCE = 1e-4
STEPS = 5


def model_of(name):
    return build(name, vocab_size=words.VOCABULARY)


def examples_of(model):
    return letters.task(model).ranking


def reference(model, example, rule="gradient", corrupted=False, share=1.0):
    """One example alone in fp64, with plain autograd: (d, {site: (x, gradient) [T, channels]}, {weight: gradient}).

    With a share below 1 the embeddings lie between those of the corrupted (0) and the clean prompt.
    """
    copy = deepcopy(model).double()
    for parameter in copy.parameters():
        parameter.requires_grad_(True)
    family, sites = family_of(copy), {}

    def keep(name, x):
        x.retain_grad()
        sites[name] = x

    for layer, block in enumerate(blocks_of(copy)):
        for path in (family.attention_output, family.mlp_output):
            module, name = find(block, path), f"{family.blocks}.{layer}.{path}"
            if module is not None:
                module.register_forward_pre_hook(lambda m, args, name=name: keep(name, args[0]))
    clean, other = (
        torch.tensor([[words.BOS, *words.ids(text)]]) for text in (example.prompt, example.corrupted)
    )
    embed = copy.get_input_embeddings()
    table = embed.weight.detach()
    if share < 1:
        mixed = (1 - share) * table[other] + share * table[clean]
        embed.register_forward_hook(lambda m, args, output: mixed.requires_grad_())
    with reference_rules(copy, Rule.parse(rule)):
        logits = copy(other if corrupted else clean, use_cache=False).logits[0, -1]
        (right,), (wrong,) = example.right_ids, example.wrong_ids
        value = logits[right] - logits[wrong]
        value.backward()
    seen = {name: (x.detach().flatten(0, -2), x.grad.flatten(0, -2)) for name, x in sites.items()}
    return value.item(), seen, {name: p.grad for name, p in copy.named_parameters() if p.grad is not None}


def expected_scores(model, found, examples, rule="gradient", patch=False, shares=(1.0,), reduce="signed"):
    rows = []
    for example in examples:
        _, clean, _ = reference(model, example)
        _, other, _ = reference(model, example, corrupted=True)
        gradients = [reference(model, example, rule, share=share)[1] for share in shares]
        row = torch.zeros(len(found.names), dtype=torch.float64)
        for site in found.sites:
            x = clean[site.name][0] - (other[site.name][0] if patch else 0)
            g = sum(one[site.name][1] for one in gradients) / len(shares)
            for channel, component in enumerate(site.component.tolist()):
                row[component] += (x[:, channel] * g[:, channel]).sum()
        rows.append(row)
    rows = torch.stack(rows)
    return {"signed": rows, "abs": rows.abs(), "square": rows.square()}[reduce].mean(0)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= TOLERANCE * theirs.abs().max().item()


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("unit", ["head", "neuron", "layer", "node"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_relevance_of_components_is_activation_times_gradient_under_the_oracle(name, unit, patch):
    model = model_of(name)
    examples, found = examples_of(model), components(model, unit)
    ablation = "patch" if patch else "zero"
    batches = task_batches(model, words.tokenizer(), examples)
    for method, rule in (("lrp", "attnlrp"), ("lrp", "gradient,norm=constant"), ("gradient", "gradient")):
        ours = score_components(model, found, batches, method, ablation=ablation, rule=rule)
        close(ours, expected_scores(model, found, examples, rule, patch))


@pytest.mark.parametrize("reduce", ["abs", "square"])
def test_reductions_are_over_samples_of_whole_components(reduce):
    model = model_of("llama")
    examples, found = examples_of(model), components(model, "head")
    batches = task_batches(model, words.tokenizer(), examples)
    ours = score_components(model, found, batches, "lrp", rule="attnlrp", reduce=reduce)
    close(ours, expected_scores(model, found, examples, "attnlrp", reduce=reduce))


@pytest.mark.parametrize("patch", [False, True])
def test_integrated_gradients_average_along_the_path(patch):
    model = model_of("llama")
    examples, found = examples_of(model), components(model, "head")
    batches = task_batches(model, words.tokenizer(), examples)
    ours = score_components(
        model, found, batches, "integrated-gradients", ablation="patch" if patch else "zero"
    )
    shares = [(step + 0.5) / STEPS for step in range(STEPS)]
    close(ours, expected_scores(model, found, examples, patch=patch, shares=shares))
    scores = score_weights(model, batches, "integrated-gradients")
    for name, weight in prunable(model).items():
        gradient = (
            sum(reference(model, one, share=share)[2][name] for one in examples for share in shares) / STEPS
        )
        close(scores.tensors[name].double(), weight.weight.detach().double() * gradient)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_weights_are_scored_for_the_logit_difference(name):
    model = model_of(name)
    examples = examples_of(model)
    batches = task_batches(model, words.tokenizer(), examples)
    scores = score_weights(model, batches, "lrp", rule="attnlrp")
    each = [reference(model, one, "attnlrp")[2] for one in examples]
    for key, weight in prunable(model).items():
        expected = weight.weight.detach().double() * sum(one[key] for one in each)
        close(scores.tensors[key].double(), weight.canonical(expected))


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_exact_scores_of_heads_are_what_zeroing_columns_costs(name):
    model = model_of(name)
    examples, found = examples_of(model), components(model, "head")
    ours = score_components(model, found, task_batches(model, words.tokenizer(), examples), "exact")
    whole = torch.tensor([reference(model, one)[0] for one in examples], dtype=torch.float64)
    for number in range(8):
        copy = deepcopy(model)
        weight = find(blocks_of(copy)[number // 4], family_of(copy).attention_output).weight.data
        channels = slice(8 * (number % 4), 8 * (number % 4) + 8)
        (weight if name == "gpt2" else weight.mT)[channels] = 0
        without = torch.tensor([reference(copy, one)[0] for one in examples], dtype=torch.float64)
        assert ours[number].item() == pytest.approx((whole - without).mean().item(), abs=1e-5)


def test_activation_magnitude_and_wanda_by_hand():
    model = model_of("llama")
    examples, found = examples_of(model), components(model, "neuron")
    batches = task_batches(model, words.tokenizer(), examples)
    size, square, moved = (torch.zeros(2, 48, dtype=torch.float64) for _ in range(3))
    for one in examples:
        _, clean, _ = reference(model, one)
        _, other, _ = reference(model, one, corrupted=True)
        for layer in range(2):
            x = clean[f"model.layers.{layer}.mlp.down_proj"][0]
            size[layer] += x.abs().sum(0) / len(examples)
            square[layer] += x.square().sum(0)
            moved[layer] += (x - other[f"model.layers.{layer}.mlp.down_proj"][0]).abs().sum(0) / len(examples)
    column, row = [], []
    for block in model.model.layers:
        column.append(block.mlp.down_proj.weight.double().abs().sum(0))
        row.append(
            (block.mlp.gate_proj.weight.double().abs() + block.mlp.up_proj.weight.double().abs()).sum(1)
        )
    column, row = torch.stack(column).detach(), torch.stack(row).detach()
    close(score_components(model, found, batches, "activation"), size.flatten())
    close(score_components(model, found, batches, "activation", ablation="patch"), moved.flatten())
    close(score_components(model, found, batches, "wanda"), (square.sqrt() * column).flatten())
    close(score_components(model, found, batches, "magnitude"), (column + row).flatten())


# Measuring


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


def test_faithfulness_and_areas_by_hand():
    assert faithfulness(2.0, 5.0, -1.0) == 0.5
    values = [(0.1, 0.0), (0.2, 0.5), (0.5, 1.5), (1.0, 1.0)]
    curve = [Point(fraction, 0, 0.0, 0.0, f) for fraction, f in values]
    cpr, cmd = areas(curve)
    assert cpr == pytest.approx(0.1 * 0.25 + 0.3 * 1.0 + 0.5 * 1.25)
    assert cmd == pytest.approx(0.1 * 0.75 + 0.3 * 0.5 + 0.5 * 0.25)


def test_the_sparsest_circuit_is_the_one_from_which_on_accuracy_holds():
    def point(fraction, accuracy=None):
        # Accuracy holds from 0.3 on, and once, by chance, at 0.02.
        found = accuracy if accuracy is not None else float(fraction >= 0.3)
        return Point(fraction, round(1000 * fraction), 0.0, found, 0.0)

    curve = [point(0.01), point(0.02, 1.0), point(0.1), point(0.2), point(0.5), point(1.0)]
    found = _sparsest(curve, 0.9, point)
    assert 0.3 <= found.fraction < 0.3 * 2.5 ** (1 / 32)
    # The grid's own where the next smaller circuit has one component less, or there is none smaller.
    few = [Point(0.5, 1, 0, 0.5, 0), Point(1.0, 2, 0, 1.0, 0)]
    assert _sparsest(few, 0.9, None) == few[1]
    assert _sparsest(few, 0.5, None) == few[0]


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
