"""Reductions against autograd sample by sample and token by token, and `attribute` with what it refuses.

Models of the reductions: llama (linears), gpt2 (a transposed weight, learned positions), mixtral (experts
see some tokens of some samples). The padded batch makes the first real token of a sample another column in
each row.
"""

from functools import cache, partial

import pytest
import torch
from oracle import token_gradients, weight_gradients
from tiny import VOCABULARY, batch, build, singles, state

import sparc3.scores
from sparc3 import head
from sparc3.errors import InputError
from sparc3.families import prunable
from sparc3.rules import Rule
from sparc3.scores import Accumulators, Scores, accumulate, attribute
from sparc3.targets import target_value

TOLERANCE = 1e-5  # see test_families.py
LOGPROB = partial(target_value, target="logprob")
REDUCE = {"signed": lambda g: g, "abs": torch.abs, "square": torch.square}
FACTOR = {
    "signed": lambda w: w,
    "abs": torch.abs,
    "square": torch.square,
    "token-square": torch.square,
}


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def scores_of(model, reduce, weights=None, inputs=None, **options):
    weights = prunable(model) if weights is None else weights
    sink = Accumulators(weights, reduce, **options)
    accumulate(model, [batch()] if inputs is None else inputs, Rule(), "logprob", "all", weights, sink)
    return sink.scores()


@cache
def sample_gradients(name):
    model = build(name)
    return [weight_gradients(model, sample, Rule(), LOGPROB)[1] for sample in singles(batch())]


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_reductions_over_samples(name, reduce):
    model = build(name)
    weights = prunable(model)
    for key, ours in scores_of(model, reduce).items():
        total = sum(REDUCE[reduce](gradients[key]) for gradients in sample_gradients(name))
        expected = FACTOR[reduce](weights[key].weight.detach().double()) * total
        # A square doubles the relative error.
        assert relative_error(ours, weights[key].canonical(expected)) <= 2 * TOLERANCE, key


TOKENS = {
    "llama": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    ],
    "mixtral": ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"],
}


@cache
def gradients_by_token(name):
    """For each sample {name: [T, ..., N, K]}."""
    model = build(name)
    return [token_gradients(model, sample, Rule(), LOGPROB, TOKENS[name]) for sample in singles(batch())]


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("reduce", FACTOR)
@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name, reduce, skip_first):
    """Every token its own sample, and the share of the first token left out."""
    model = build(name)
    weights = prunable(model, include=TOKENS[name])
    for key, ours in scores_of(model, reduce, weights, skip_first=skip_first).items():
        total = 0
        for gradients in gradients_by_token(name):
            tokens = gradients[key][1:] if skip_first else gradients[key]
            if reduce == "token-square":
                total = total + tokens.square().sum(0)
            else:
                total = total + REDUCE[reduce](tokens.sum(0))
        expected = FACTOR[reduce](weights[key].weight.detach().double()) * total
        assert relative_error(ours, expected) <= 2 * TOLERANCE, key


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("skip_first", [False, True])
def test_the_head_is_reduced_over_a_sample_whatever_the_chunks(monkeypatch, positions, skip_first):
    model = build("llama")
    weights = prunable(model, include=["lm_head.weight"])
    monkeypatch.setattr(head, "LOGITS_IN_FLIGHT", 3 * 2 * VOCABULARY)  # 2 positions at a time
    sink = Accumulators(weights, "abs", skip_first)
    accumulate(model, [batch()], Rule(), "logprob", positions, weights, sink)
    target = partial(target_value, target="logprob", positions=positions)
    total = 0
    for sample in singles(batch()):
        tokens = token_gradients(model, sample, Rule(), target, list(weights))["lm_head.weight"]
        total = total + tokens[int(skip_first) :].sum(0).abs()
    assert relative_error(sink.sums["lm_head.weight"], total) <= TOLERANCE


def test_weights_that_are_zero_score_minus_infinity():
    model = build("gpt2")
    weights = prunable(model)
    for weight in weights.values():
        weight.weight.data[::3, ::2] = 0.0
        weight.weight.data[1, 1] = -0.0
    for reduce in FACTOR:
        for name, scores in scores_of(model, reduce).items():
            zero = weights[name].canonical(weights[name].weight) == 0
            assert torch.equal(scores.isneginf(), zero)
            assert scores.is_contiguous()


# attribute()


def test_attribute_is_accumulate_and_the_settings():
    model = build("gpt2").train()
    windows = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(7))
    before, steps = state(model), []
    scores = attribute(
        model, windows, reduce="square", target="logit", positions="last", progress=steps.append, memory=0
    )
    assert state(model) == before
    assert sum(steps) == 5
    assert isinstance(scores, Scores)
    assert scores.settings == {
        "method": "lrp",
        "rule": "attnlrp",
        "target": "logit",
        "positions": "last",
        "reduce": "square",
        "skip_first": False,
    }
    weights = prunable(model)
    assert scores.transposed == set(weights)  # all of GPT-2's
    assert list(dict(scores)) == list(weights)
    sink = Accumulators(weights, "square")
    inputs = {"input_ids": windows, "attention_mask": torch.ones_like(windows)}
    accumulate(model, [inputs], Rule(), "logit", "last", weights, sink)
    for name, tensor in sink.scores().items():
        assert torch.equal(scores.tensors[name], tensor)


def test_windows_are_cut_into_batches(monkeypatch):
    model = build("llama")
    windows = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(7))
    whole = attribute(model, windows)
    monkeypatch.setattr(sparc3.scores, "TOKENS_ON_CPU", 30)
    steps = []
    split = attribute(model, windows, progress=steps.append)
    assert steps == [2, 2, 1]
    for name, tensor in whole:
        assert relative_error(split.tensors[name], tensor) <= TOLERANCE


def test_gradient_is_lrp_with_the_rule_gradient():
    model = build("qwen2")
    one = attribute(model, [batch()], "gradient", rule="attnlrp")
    two = attribute(model, [batch()], "lrp", rule="gradient")
    for name, tensor in one:
        assert torch.equal(tensor, two.tensors[name])
    assert one.settings["rule"] == "gradient"


def test_a_callable_target_is_named_in_the_settings():
    def first_logit(logits, inputs):
        return logits[:, 0, 0]

    model = build("llama")
    assert attribute(model, [batch()], target=first_logit).settings["target"] == "first_logit"
    assert attribute(model, [batch()], target=partial(first_logit)).settings["target"] == "callable"


def test_magnitude_reads_no_samples():
    model = build("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    model.get_parameter(name).data[2, 3, :5] = 0.0
    scores = attribute(model, [], "magnitude")
    weight = model.get_parameter(name).detach()
    assert scores.settings == {"method": "magnitude"}
    assert torch.equal(scores.tensors[name], weight.abs().masked_fill(weight == 0, -torch.inf))


def test_random_depends_on_the_seed_alone():
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0] = 0.0
    one, same, other = (attribute(model, [], "random", seed=seed) for seed in (1, 1, 2))
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    assert one.settings == {"method": "random", "seed": 1}
    assert torch.equal(one.tensors[up], same.tensors[up])
    assert not torch.equal(one.tensors[up], other.tensors[up])
    assert not torch.equal(one.tensors[up], one.tensors[gate])
    assert one.tensors[up][0].isneginf().all()
    rest = one.tensors[up][1:]
    # 47 * 32 uniform numbers: the mean is within 5 standard errors of 1/2
    assert abs(rest.mean().item() - 0.5) < 5 * 12**-0.5 * rest.numel() ** -0.5
    assert 0 <= rest.min() < 0.05 < 0.95 < rest.max() < 1


@pytest.mark.parametrize("method", ["wanda", "ria"])
def test_activation_methods_through_attribute(method):
    model = build("llama")
    weights = prunable(model)
    scores = attribute(model, [batch()], method)
    assert scores.settings == {"method": method}
    assert list(scores.tensors) == list(weights)


def test_include_and_exclude_reach_attribute():
    model = build("llama")
    scores = attribute(model, [batch()], include=["*_proj.weight", "lm_head*"], exclude=["*mlp*", "*.0.*"])
    assert len(scores.tensors) == 5
    assert "lm_head.weight" in scores.tensors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sparsegpt"}, r"method 'sparsegpt' is not known; use lrp \| "),
        ({"reduce": "mean"}, r"reduce 'mean' is not known; use signed \| "),
        ({"target": "loss"}, r"target 'loss' is not known"),
        ({"positions": "first"}, r"positions 'first' are not known"),
        ({"rule": "lxt"}, r"rule 'lxt' is not known"),
        ({"include": ["x"]}, r"no weight is left"),
        ({"rule": "cp"}, r"rule cp gives exactly zero relevance to query and key .* and gate .*another rule"),
        ({"rule": "attention=value"}, r"zero relevance to query and key projections \(attention=value\), so"),
        ({"rule": "gradient,gate=up"}, r"zero relevance to gate projections \(gate=up\), so"),
    ],
)
def test_refused(options, message):
    with pytest.raises(InputError, match=message):
        attribute(build("llama"), [batch()], **options)


@pytest.mark.parametrize("method", ["lrp", "wanda"])
@pytest.mark.parametrize("samples", [[], torch.empty(0, 12, dtype=torch.long)])
def test_no_samples_are_refused_by_methods_that_read_them(method, samples):
    with pytest.raises(InputError, match="no reference samples"):
        attribute(build("llama"), samples, method)


def test_the_gradient_method_does_not_read_the_rule():
    attribute(build("llama"), [batch()], "gradient", rule="cp")


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_a_score_that_is_not_finite_is_an_error_that_names_the_weight(monkeypatch, poison):
    # -inf too: only zero weights may have it. A zero weight keeps its -inf whatever its sum is.
    model = build("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    model.get_parameter(name).data[0, 0] = 0.0
    model.get_parameter(name).data[3, 4] = 1.0
    for place in ((0, 0), (3, 4)):

        def fill(*arguments, place=place):
            arguments[6].sums[name][place] = poison

        monkeypatch.setattr(sparc3.scores, "accumulate", fill)
        if place == (0, 0):
            assert attribute(model, [batch()], reduce="signed").tensors[name][place].isneginf()
        else:
            with pytest.raises(
                InputError, match=r"scores of model\.layers\.1\.mlp\.down_proj\.weight are not"
            ):
                attribute(model, [batch()], reduce="signed")


def test_an_overflow_in_half_precision_names_the_dtype():
    model = build("llama").half()

    def target(logits, inputs):
        return logits.float().sum((1, 2)) * 1e4

    with pytest.raises(InputError, match=r"overflows in float16: run it with --dtype float32 or bfloat16"):
        attribute(model, [batch()], target=target)


def test_activations_that_overflow_are_an_error():
    model = build("llama").half()
    model.model.layers[0].self_attn.v_proj.weight.data *= 5e4
    for method in ("lrp", "wanda"):
        with pytest.raises(InputError, match=r"is (nan|-?inf)|are not finite"):
            attribute(model, [batch()], method)
