"""What the wrapper leaves behind (nothing), and what it does to anyone else (nothing)."""

import copy
from functools import partial

import pytest
import torch
from oracle import weight_gradients
from tiny import FAMILIES, batch, build, state
from transformers import AutoModelForCausalLM

from sparc3.engine import Blocks, attribute_batch
from sparc3.errors import InputError
from sparc3.families import prunable
from sparc3.rules import Rule
from sparc3.scores import Accumulators, accumulate
from sparc3.targets import target_value
from sparc3.wrap import wrap

LOGPROB = partial(target_value, target="logprob")


@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_nothing_is_left_behind(name, attention):
    model = build(name, attention)
    # As it comes out of training, with a part of it frozen and in eval mode.
    model.train()
    next(model.parameters()).requires_grad_(False)
    Blocks(model).blocks[1].eval()
    weights = prunable(model)
    before = state(model)
    accumulate(model, [batch()], Rule(), "logprob", "all", weights, Accumulators(weights, "signed"))
    assert state(model) == before


class Stop(Exception):
    pass


def stop(*args):
    raise Stop


def wrapped_alone(model):
    with wrap(model, Rule()):
        raise Stop


def in_the_target(model):
    weights = prunable(model)
    accumulate(model, [batch()], Rule(), stop, "all", weights, Accumulators(weights, "signed"))


def in_the_backward(model):
    weights = prunable(model)
    sink = Accumulators(weights, "signed")
    sink.linear = stop
    accumulate(model, [batch()], Rule(), "logprob", "all", weights, sink)


def in_a_block(model):
    def failing(module, args):
        if not Blocks(model).passing_through and module.training is False:
            raise Stop

    handle = Blocks(model).blocks[1].mlp.register_forward_pre_hook(failing)
    try:
        weights = prunable(model)
        accumulate(model, [batch()], Rule(), "logprob", "all", weights, Accumulators(weights, "signed"))
    finally:
        handle.remove()


@pytest.mark.parametrize("failure", [wrapped_alone, in_the_target, in_the_backward, in_a_block])
def test_nothing_is_left_behind_by_an_exception(failure):
    model = build("qwen3").train()
    before = state(model)
    with pytest.raises(Stop):
        failure(model)
    assert state(model) == before


def test_an_unknown_activation_is_named_and_leaves_nothing_behind():
    for name, changes in (("opt", {"activation_function": "mish"}), ("llama", {"hidden_act": "mish"})):
        model = build(name, **changes)
        before = state(model)
        with pytest.raises(InputError, match=r"activation Mish.* has no LRP rule; known: "):
            with wrap(model, Rule()):
                model(**batch())
        assert state(model) == before


def test_two_models_that_share_a_config_do_not_meet():
    wrapped = build("llama")
    other = AutoModelForCausalLM.from_config(wrapped.config)
    assert other.config is wrapped.config
    inputs = batch()

    def plain_gradients():
        other.zero_grad()
        LOGPROB(other(**inputs).logits, inputs).sum().backward()
        return [parameter.grad.clone() for parameter in other.parameters()]

    before = plain_gradients()
    with wrap(wrapped, Rule()):
        inside = plain_gradients()
    for one, two, three in zip(before, inside, plain_gradients(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_two_models_are_wrapped_at_once_each_by_its_rule():
    first = build("llama")
    second = copy.deepcopy(first)
    second.config = first.config  # the same object, so that the inner context sees the outer one's attention
    for module in second.modules():
        if hasattr(module, "config"):
            module.config = first.config
    inputs = batch(padding=False)
    alone = [
        relevance_of_embeddings(model, inputs, rule) for model, rule in ((first, "attnlrp"), (second, "cp"))
    ]
    with wrap(first, Rule.parse("attnlrp")), wrap(second, Rule.parse("cp")):
        both = [attribute_batch(Blocks(model), inputs, "logprob")[2] for model in (first, second)]
    for one, two in zip(alone, both, strict=True):
        assert torch.equal(one, two)
    assert not torch.allclose(*both)


def relevance_of_embeddings(model, inputs, rule):
    with wrap(model, Rule.parse(rule)):
        return attribute_batch(Blocks(model), inputs, "logprob")[2]


def test_an_inner_context_rules_until_it_ends():
    model = build("qwen3")
    inputs = batch()
    before = state(model)
    outer, inner = (relevance_of_embeddings(model, inputs, rule) for rule in ("attnlrp", "cp"))
    with wrap(model, Rule.parse("attnlrp")):
        assert torch.equal(relevance_of_embeddings(model, inputs, "cp"), inner)
        assert torch.equal(attribute_batch(Blocks(model), inputs, "logprob")[2], outer)
    assert state(model) == before


def test_dropout_and_training_do_not_matter():
    model = build("gpt2", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5)
    inputs = batch()
    evaluated = relevance_of_embeddings(model, inputs, "attnlrp")
    assert torch.equal(relevance_of_embeddings(model.train(), inputs, "attnlrp"), evaluated)


def test_gradient_checkpointing_does_not_matter():
    model = build("llama")
    inputs = batch()
    evaluated = relevance_of_embeddings(model, inputs, "attnlrp")
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    model.train()
    assert torch.equal(relevance_of_embeddings(model, inputs, "attnlrp"), evaluated)


def test_a_forward_that_is_already_on_the_instance_is_kept():
    # accelerate's device_map puts one there.
    model = build("llama")
    calls = []
    for module in (model.model.layers[0].mlp.down_proj, model.model.norm, model.model.layers[1]):
        original = module.forward

        def counted(*args, original=original, **kwargs):
            calls.append(original)
            return original(*args, **kwargs)

        module.forward = counted
    weights = prunable(model)
    before = state(model)
    accumulate(model, [batch()], Rule(), "logprob", "all", weights, Accumulators(weights, "signed"))
    assert state(model) == before
    assert len(set(calls)) == 3


def test_weights_left_out_do_not_change_the_others():
    # A linear that is left out is not wrapped: plain autograd takes the relevance through it.
    model = build("phi3")
    names, sums, embedded = ["*", "*.0.mlp.gate_up_proj*", "*.1.self_attn.*"], [], []
    for name in names:
        weights = prunable(model, include=[name])
        sink = Accumulators(weights, "signed")
        sink.start(batch())
        with wrap(model, Rule(), weights, sink):
            embedded.append(attribute_batch(Blocks(model), batch(), "logprob")[2])
        sums.append(sink.sums)
    for some, gradient in zip(sums[1:], embedded[1:], strict=True):
        torch.testing.assert_close(gradient, embedded[0], rtol=1e-5, atol=1e-6)
        for name, total in some.items():
            torch.testing.assert_close(total, sums[0][name], rtol=1e-5, atol=1e-6)


# Low precision. Relevance R in dtype d has the forward's roundings (the model's own) and one rounding an
# operation in the backward, as many as plain autograd has in d; AttnLRP's backward has fewer operations,
# and our sums over tokens are fp32 where .grad is d. So its relative error is of the size of plain
# autograd's. The two errors are different draws and the two gradients differ in how much cancels in them; a
# factor of 2 covers both.
FACTOR = 2.0


@pytest.mark.parametrize("rule", ["attnlrp", "gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_low_precision_is_no_worse_than_plain_autograd(name, dtype, rule):
    model = build(name, "eager").to(dtype)
    inputs = batch(padding=False)
    weights = prunable(model)
    sink = Accumulators(weights, "signed")
    accumulate(model, [inputs], Rule.parse(rule), "logprob", "all", weights, sink)
    _, expected = weight_gradients(model, inputs, Rule.parse(rule), LOGPROB)
    _, plain_expected = weight_gradients(model, inputs, Rule.parse("gradient"), LOGPROB)
    LOGPROB(model(**inputs, use_cache=False).logits, inputs).sum().backward()

    def error(mine, exact):
        return (mine.double() - exact).norm().item() ** 2

    ours = sum(
        error(weights[k].canonical(sink.sums[k]), expected[k]) / expected[k].norm() ** 2 for k in weights
    )
    plain = sum(
        error(weights[k].weight.grad, plain_expected[k]) / plain_expected[k].norm() ** 2 for k in weights
    )
    assert all(total.isfinite().all() for total in sink.sums.values())
    assert ours**0.5 <= FACTOR * plain**0.5
