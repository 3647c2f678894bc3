"""Scores of components and weights against plain autograd and ablation by hand."""

from copy import deepcopy

import pytest
import torch
import words
from by_hand import STEPS, close, examples_of, expected_scores, model_of, reference
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from sparc3.families import blocks_of, family_of, find, prunable
from sparc3.ranking import score_components, score_weights, through_norm
from sparc3.tasks import task_batches
from sparc3.units import Site, components


@pytest.mark.parametrize("ablation", ["zero", "mean", "patch"])
@pytest.mark.parametrize("unit", ["head", "neuron", "layer", "node"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_relevance_of_components_is_activation_times_gradient_under_the_oracle(name, unit, ablation):
    model = model_of(name)
    examples, found = examples_of(model), components(model, unit)
    batches = task_batches(model, words.tokenizer(), examples)
    for method, rule in (("lrp", "attnlrp"), ("lrp", "gradient,norm=constant"), ("gradient", "gradient")):
        ours = score_components(model, found, batches, method, ablation=ablation, rule=rule)
        close(ours, expected_scores(model, found, examples, rule, ablation))


@pytest.mark.parametrize("ablation", ["zero", "mean", "patch"])
@pytest.mark.parametrize("unit", ["head", "kv-head", "node", "layer"])
def test_relevance_behind_a_norm_is_what_the_norm_puts_out_less_without_the_component(unit, ablation):
    model = model_of("gemma3_text")
    examples, found = examples_of(model), components(model, unit)
    behind = {site.name.split(".")[3]: site.norm for site in found.sites if site.layer == 1}
    block = blocks_of(model)[1]
    norms = {"self_attn": block.post_attention_layernorm, "mlp": block.post_feedforward_layernorm}
    assert behind == {name: norms[name] for name in behind}
    batches = task_batches(model, words.tokenizer(), examples)
    for rule, reduce in (("attnlrp", "signed"), ("gradient,activation=identity", "token-abs")):
        ours = score_components(model, found, batches, "lrp", ablation=ablation, rule=rule, reduce=reduce)
        expected = expected_scores(model, found, examples, rule, ablation, reduce=reduce, through_norms=True)
        close(ours, expected)


@pytest.mark.parametrize("ablation", ["zero", "mean", "patch"])
def test_behind_a_norm_attribution_patching_and_neurons_keep_the_derivative(ablation):
    model = model_of("gemma3_text")
    examples = examples_of(model)
    batches = task_batches(model, words.tokenizer(), examples)
    for unit, method, rule in (("head", "gradient", "gradient"), ("neuron", "lrp", "attnlrp")):
        found = components(model, unit)
        ours = score_components(model, found, batches, method, ablation=ablation, rule=rule)
        close(ours, expected_scores(model, found, examples, rule, ablation))


def test_zero_ablation_of_an_mlp_behind_a_norm_is_seen_by_relevance_and_not_by_the_derivative():
    model = model_of("gemma3_text")
    found = components(model, "mlp")
    batches = task_batches(model, words.tokenizer(), examples_of(model))
    exact = score_components(model, found, batches, "exact")
    norms = [block.post_feedforward_layernorm for block in blocks_of(model)]
    epsilon = norms[0].eps
    for norm in norms:
        norm.eps = 0.0
    derivative = score_components(model, found, batches, "gradient")
    for norm in norms:
        norm.eps = epsilon
    # Euler's theorem: zero but for fp32 sums of some hundred terms of the size of the gradient's.
    assert derivative.abs().max() < 1e-4 * exact.abs().max()
    relevance = score_components(model, found, batches, "lrp", rule="gradient")
    assert (relevance - exact).abs().max() < exact.abs().max() / 2


def test_a_component_far_below_the_rounding_of_its_site_in_16_bits_is_seen_through_the_norm():
    torch.manual_seed(0)
    linear, norm = torch.nn.Linear(24, 64).bfloat16(), Gemma3RMSNorm(64).bfloat16()
    torch.nn.init.normal_(norm.weight)
    own = torch.arange(24) // 8
    site = Site("o", 0, linear, own, (), norm)
    x = torch.randn(5, 24).bfloat16()
    x[:, own == 1] *= 2.0**-10
    gradient = torch.randn(5, 64)
    ours = through_norm(norm, site, x, x.float(), gradient)
    linear, x, gradient = linear.double(), x.double(), gradient.double()
    scale = 1 + norm.weight.double()

    def normed(y):
        return scale * y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt()

    for component in range(3):
        without = x * (own != component)
        expected = ((normed(linear(x)) - normed(linear(without))) * gradient).sum(-1)
        # What the component adds to the site is rounded to 8 bits, and so is the y that it is taken from.
        channels = (own == component).nonzero().flatten()
        added = (linear.weight[:, channels] @ x[:, channels].T).norm(dim=0) / linear(x).square().mean(
            -1
        ).sqrt()
        error = ours[:, channels[0]].double() - expected
        assert (error.abs() < 2.0**-7 * added * (scale * gradient).norm(dim=-1)).all()
        assert (ours[:, channels[1:]] == 0).all()


@pytest.mark.parametrize("reduce", ["abs", "square", "token-abs"])
def test_reductions_are_over_samples_or_tokens_of_whole_components(reduce):
    model = model_of("llama")
    examples, found = examples_of(model), components(model, "head")
    batches = task_batches(model, words.tokenizer(), examples)
    ours = score_components(model, found, batches, "lrp", rule="attnlrp", reduce=reduce)
    close(ours, expected_scores(model, found, examples, "attnlrp", reduce=reduce))


@pytest.mark.parametrize("ablation", ["zero", "patch"])
def test_integrated_gradients_average_along_the_path(ablation):
    model = model_of("llama")
    examples, found = examples_of(model), components(model, "head")
    batches = task_batches(model, words.tokenizer(), examples)
    ours = score_components(model, found, batches, "integrated-gradients", ablation=ablation)
    shares = [(step + 0.5) / STEPS for step in range(STEPS)]
    close(ours, expected_scores(model, found, examples, ablation=ablation, shares=shares))
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


@pytest.mark.parametrize("target", ["logit", "logprob"])
def test_other_targets_explain_the_right_answer_alone(target):
    model = model_of("llama")
    examples, found = examples_of(model), components(model, "head")
    batches = task_batches(model, words.tokenizer(), examples)
    ours = score_components(model, found, batches, "gradient", target=target)
    close(ours, expected_scores(model, found, examples, target=target))
    scores = score_weights(model, batches, "gradient", target=target)
    for name, weight in prunable(model).items():
        gradient = sum(reference(model, one, target=target)[2][name] for one in examples)
        close(scores.tensors[name].double(), weight.weight.detach().double() * gradient)


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
