"""Parsing of rules, the numbers they stand for, and AttnLRP's identities in a model without biases.

The identities (Achtibat et al. 2024) hold exactly where every part conserves relevance: linears without bias,
residual sums, the gated product, norms with a constant scale. Only softmax leaks, by a known amount.
"""

from functools import partial

import pytest
import torch
from tiny import batch, build

from sparc3.engine import Blocks
from sparc3.errors import InputError
from sparc3.families import prunable
from sparc3.head import target_gradient
from sparc3.rules import PRESETS, Rule
from sparc3.scores import Accumulators
from sparc3.wrap import wrap


def test_presets_and_parts():
    assert Rule.parse("attnlrp") == Rule() == PRESETS["attnlrp"]
    assert Rule.parse("norm=constant,activation=identity,gate=half,attention=half") == Rule()
    assert Rule.parse(" cp ") == Rule(gate="up", attention="value")
    assert Rule.parse("gradient, attention=half") == Rule(
        "gradient", "gradient", "gradient", "gradient", "half"
    )
    assert Rule.parse("cp,gate=half") == Rule(attention="value")
    assert Rule.parse(Rule(gate="up")) == Rule(gate="up")


def test_qknorm_follows_norm_unless_given():
    assert Rule.parse("norm=gradient").qknorm == "gradient"
    assert Rule.parse("gradient,norm=constant").qknorm == "constant"
    assert Rule.parse("norm=gradient,qknorm=constant") == Rule.parse("qknorm=constant,norm=gradient")
    assert Rule.parse("qknorm=gradient") == Rule(qknorm="gradient")


@pytest.mark.parametrize(
    "text",
    ["", "lrp", "norm", "norm=", "norm=half", "gate=constant", "attnlrp,cp", "cp;gate=half", "NORM=constant"],
)
def test_unknown_rules_are_refused_with_the_choices(text):
    with pytest.raises(
        InputError, match=r"not known; use attnlrp \| cp \| gradient or norm=constant\|gradient"
    ):
        Rule.parse(text)


def test_text_of_a_rule_parses_to_the_rule():
    assert [str(rule) for rule in PRESETS.values()] == list(PRESETS)
    mixed = Rule(norm="gradient", gate="up")
    assert Rule.parse(str(mixed)) == mixed


def test_numbers():
    rule = Rule()
    assert (rule.norm_scale_gradient, rule.qknorm_scale_gradient) == (0.0, 0.0)
    assert rule.activation_identity
    assert (rule.product_scales, rule.attention_scales) == ((0.5, 0.5), (0.25, 0.25, 0.5))
    rule = Rule.parse("gradient")
    assert (rule.norm_scale_gradient, rule.qknorm_scale_gradient) == (1.0, 1.0)
    assert not rule.activation_identity
    assert (rule.product_scales, rule.attention_scales) == ((1.0, 1.0), (1.0, 1.0, 1.0))
    rule = Rule.parse("cp")
    assert (rule.product_scales, rule.attention_scales) == ((0.0, 1.0), (0.0, 0.0, 1.0))


def test_zero_parts_name_what_gets_nothing():
    assert Rule().zero_parts() == Rule.parse("gradient").zero_parts() == []
    assert len(Rule.parse("cp").zero_parts()) == 2
    assert "query and key" in Rule.parse("attention=value").zero_parts()[0]
    assert "gate projections" in Rule.parse("gate=up").zero_parts()[0]


class Walk:
    """One sample, one logit, float64: relevance of weights, residual streams, linears' inputs and outputs."""

    def __init__(self, name, rule):
        model = build(name).double()
        model.set_experts_implementation("eager")  # the grouped GEMM has no float64
        inputs = batch(samples=1, length=9, padding=False)
        weights = prunable(model, include=["*"])
        sink = Accumulators(weights, "signed")
        # The relevance of linear inputs and outputs, seen from outside by hooks on tensors.
        self.inputs, self.outputs, handles = {}, {}, []

        def watch(store, name, tensor):
            if tensor.requires_grad:
                tensor.register_hook(lambda g: store.__setitem__(name, (tensor.detach() * g).flatten(0, -2)))

        for name, weight in weights.items():
            if weight.attribute == "weight":
                handles += [
                    weight.module.register_forward_pre_hook(
                        lambda module, args, name=name: watch(self.inputs, name, args[0])
                    ),
                    weight.module.register_forward_hook(
                        lambda module, args, y, name=name: watch(self.outputs, name, y)
                    ),
                ]
        sink.start(inputs)
        with wrap(model, Rule.parse(rule), weights, sink):
            blocks = Blocks(model)
            hidden, calls = blocks.record(inputs)
            streams = [hidden.requires_grad_()]
            for index, call in enumerate(calls):
                streams.append(blocks.run(index, streams[-1], call))
            value, gradient = target_gradient(blocks, streams[-1], inputs, "logit", "last")
            gradients = torch.autograd.grad(streams[-1], streams, gradient)
        for handle in handles:
            handle.remove()
        self.logit = value.double().item()
        self.residual = [(x * g).sum().item() for x, g in zip(streams, gradients, strict=True)]
        self.weights = {
            name: total.double() * weights[name].canonical(weights[name].weight).detach()
            for name, total in sink.sums.items()
        }

    def sum(self, layer, path):
        return self.weights[f"model.layers.{layer}.{path}"].sum().item()


# Accumulators and the explained scalar are fp32, the sums have up to 32 * 97 terms of random sign.
approx = partial(pytest.approx, rel=1e-5, abs=1e-5)


def test_cp_conserves_the_logit_in_every_residual_stream():
    walk = Walk("llama", "cp")
    assert abs(walk.logit) > 0.1
    assert walk.residual == [approx(walk.logit)] * 3


def test_attnlrp_halves_and_the_leak_of_softmax():
    walk = Walk("llama", "attnlrp")
    assert walk.weights["lm_head.weight"].sum().item() == approx(walk.logit)
    assert walk.residual[2] == approx(walk.logit)
    for layer in range(2):
        q, k, v, o = (walk.sum(layer, f"self_attn.{name}_proj.weight") for name in "qkvo")
        assert min(abs(q), abs(o)) > 1e-3
        assert q == approx(k)
        assert v == approx(o / 2)
        gate, up, down = (walk.sum(layer, f"mlp.{name}_proj.weight") for name in ("gate", "up", "down"))
        assert abs(down) > 1e-3
        assert gate == approx(up)
        assert gate == approx(down / 2)
        leak = walk.residual[layer + 1] - walk.residual[layer]
        assert leak == approx(o / 2 - (q + k))


def test_rows_and_columns_of_weight_relevance_are_relevances_of_neurons():
    walk = Walk("llama", "attnlrp")
    seen = 0
    for name, relevance in walk.weights.items():
        rows = walk.outputs[name].sum(0)
        torch.testing.assert_close(relevance.sum(1), rows, rtol=1e-5, atol=1e-5)
        # q, k and v (gate and up) share one input, so only their columns together are its relevance.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            columns = walk.inputs[name].sum(0)
            torch.testing.assert_close(relevance.sum(0), columns, rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen == 4
    shared = sum(walk.weights[f"model.layers.0.self_attn.{name}_proj.weight"].sum(0) for name in "qkv")
    columns = walk.inputs["model.layers.0.self_attn.q_proj.weight"].sum(0)
    torch.testing.assert_close(shared, columns, rtol=1e-5, atol=1e-5)


def test_gate_and_up_of_each_expert_take_half_of_its_down_projection():
    walk = Walk("mixtral", "attnlrp")
    for layer in range(2):
        gate, up = walk.weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        down = walk.weights[f"model.layers.{layer}.mlp.experts.down_proj"]
        assert (down.sum((1, 2)).abs() > 1e-3).sum() >= 2  # experts that the explained token reaches
        torch.testing.assert_close(gate.sum((1, 2)), down.sum((1, 2)) / 2, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(up.sum((1, 2)), down.sum((1, 2)) / 2, rtol=1e-5, atol=1e-5)
