"""Relevance of tokens, heads, neurons, residual streams and weights against one graph of plain autograd in fp64.

The reference (oracle.py) runs every sample alone, without its padding; so each comparison is one of padding too.
"""

import weakref
from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from oracle import reference_rules
from tiny import CONFIGS, VOCABULARY, batch, build, singles, state

from sparc3 import head
from sparc3.errors import InputError
from sparc3.explain import relevance
from sparc3.families import blocks_of, family_of, find, prunable
from sparc3.rules import Rule
from sparc3.targets import target_value

TOLERANCE = 1e-5  # see test_families.py
LAST_LOGIT = partial(target_value, target="logit", positions="last")
KINDS = ("residual", "heads", "neurons")


def reference(model, sample, rule, target, dtype=torch.float64):
    """(value, {kind: {layer: x * gradient [T, width]}}, {weight: W * gradient}) of one sample, in ``dtype``."""
    copy = deepcopy(model).to(dtype).eval()
    for parameter in copy.parameters():
        parameter.requires_grad_(True)
    family, seen = family_of(copy), {kind: {} for kind in KINDS}

    def keep(kind, layer, tensor):
        tensor = tensor[0] if isinstance(tensor, tuple) else tensor
        tensor.retain_grad()
        seen[kind][layer] = tensor

    for layer, block in enumerate(blocks_of(copy)):
        for kind, module in (
            ("residual", block),
            ("heads", find(block, family.attention_output)),
            ("neurons", find(block, family.mlp_output)),
        ):
            if module is not None:
                module.register_forward_pre_hook(lambda m, args, k=kind, n=layer: keep(k, n, args[0]))
    block.register_forward_hook(lambda m, args, output: keep("residual", layer + 1, output))
    with reference_rules(copy, rule):
        inputs = {name: sample[name] for name in ("input_ids", "attention_mask")}
        value = target(copy(**inputs, use_cache=False).logits, sample)
        value.sum().backward()
    found = {
        kind: {layer: (x * x.grad).detach().flatten(0, -2) for layer, x in of_kind.items()}
        for kind, of_kind in seen.items()
    }
    weights = {name: p.detach() * p.grad for name, p in copy.named_parameters() if p.grad is not None}
    return value.item(), found, weights


@cache
def references(name, rule):
    """Of each sample of ``batch()``; the last next-token logit is explained."""
    model = build(name, "eager")
    return [reference(model, sample, Rule.parse(rule), LAST_LOGIT) for sample in singles(batch())]


def error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def check_sums(ours, parts, groups):
    """ours [T, groups] against parts [T, groups * n] summed over n; the terms may cancel, so relative to them."""
    parts = parts.unflatten(-1, (groups, -1))
    assert ours.shape == parts.shape[:-1]
    assert ((ours - parts.sum(-1)).norm() / parts.abs().sum(-1).norm()).item() <= TOLERANCE


def check(r, model, expected, inputs):
    """All of ``r`` against one reference a sample."""
    heads = model.config.num_attention_heads
    mask = inputs["attention_mask"].bool()
    layers = len(blocks_of(model))
    assert set(r.residual) == set(range(layers + 1))
    assert set(r.heads) == set(range(layers))
    for row, (value, found, _) in enumerate(expected):
        real = mask[row]
        assert r.value[row].item() == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)
        check_sums(r.tokens[row, real, None], found["residual"][0], 1)
        assert not r.tokens[row, ~real].any()
        assert set(r.neurons) == set(found["neurons"])
        for layer, theirs in found["residual"].items():
            assert error(r.residual[layer][row, real], theirs) <= TOLERANCE
            assert not r.residual[layer][row, ~real].any()
        for layer, theirs in found["neurons"].items():
            assert error(r.neurons[layer][row, real], theirs) <= TOLERANCE
            assert not r.neurons[layer][row, ~real].any()
        for layer, theirs in found["heads"].items():
            check_sums(r.heads[layer][row, real], theirs, heads)
            assert not r.heads[layer][row, ~real].any()


def check_weights(found, model, expected):
    weights = prunable(model)
    assert list(found) == list(weights)
    for name, ours in found.items():
        assert error(weights[name].canonical(ours), sum(one[2][name] for one in expected)) <= TOLERANCE, name


@pytest.mark.parametrize("rule", ["attnlrp", "gradient"])
@pytest.mark.parametrize("name", CONFIGS)
def test_everything_equals_plain_autograd_on_single_samples(name, rule):
    model = build(name, "eager" if name == "gemma2" else "sdpa").train()  # dropout must not matter
    before = state(model)
    with relevance(model, rule) as r:
        value = r.backward(batch())
    assert state(model) == before
    assert value is r.value
    assert r.shape == (3, 12)
    check(r, model, references(name, rule), batch())
    check_weights(r.weights, model, references(name, rule))


@pytest.mark.parametrize("name", ["llama", "opt", "qwen3_moe"])
def test_cp_is_welcome_here(name):
    model = build(name)
    with relevance(model, "cp") as r:
        r.backward(batch())
    check(r, model, references(name, "cp"), batch())
    zero = [weight for weight in r.weights if weight.endswith(("q_proj.weight", "k_proj.weight"))]
    assert zero
    assert not any(r.weights[weight].any() for weight in zero)


def test_layers_with_fused_experts_have_no_neurons():
    model = build("qwen3_moe")  # dense, then experts
    with relevance(model) as r:
        r.backward(batch())
    assert list(r.neurons) == [0]


# What is explained


def difference(logits, inputs):
    """Of two tokens' logits at the last real position, squared: not linear in the logits."""
    mask = inputs["attention_mask"]
    at = logits[torch.arange(len(logits)), (mask * torch.arange(mask.shape[1])).amax(1)]
    return (at[:, 3] - at[:, 4]) ** 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_callable_explains_what_it_likes(name):
    model = build(name)
    expected = [reference(model, sample, Rule(), difference) for sample in singles(batch())]
    with relevance(model, target=difference) as r:
        r.backward(batch())
    check(r, model, expected, batch())
    check_weights(r.weights, model, expected)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("target", ["logit-mean", "logprob", "max-logit"])
def test_named_targets(target, positions):
    model, scalar = build("llama"), partial(target_value, target=target, positions=positions)
    expected = [reference(model, sample, Rule(), scalar) for sample in singles(batch())]
    with relevance(model, target=target, positions=positions) as r:
        r.backward(batch())
    check(r, model, expected, batch())


def test_labels_name_a_token_that_is_not_in_the_text():
    model, inputs = build("opt"), batch()
    labels = torch.full((3, 12), -100)
    labels[:, 6] = torch.tensor([5, 6, 7])
    inputs["labels"] = labels
    expected = [reference(model, sample, Rule(), LAST_LOGIT) for sample in singles(inputs)]
    with relevance(model) as r:
        r.backward(inputs)
    check(r, model, expected, inputs)
    assert not r.tokens[0, 7:].any()  # what comes after the explained position cannot matter


def test_a_batch_without_a_mask_is_all_real():
    model, inputs = build("llama"), batch(padding=False)
    with relevance(model) as r:
        r.backward(inputs)
        masked = r.tokens
        r.backward({"input_ids": inputs["input_ids"]})
    assert torch.equal(r.tokens, masked)


# Conservation (AttnLRP and CP on models with RMSNorm and without biases)


def near(ours, theirs, terms):
    """Equal up to the rounding of sums over ``terms``."""
    assert abs((ours - theirs).item()) <= TOLERANCE * terms.abs().sum().item()


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3"])
def test_cp_conserves_the_scalar_of_every_sample_in_every_stream(name):
    model = build(name)
    with relevance(model, "cp", weights=False) as r:
        r.backward(batch())
    for row in range(3):
        near(r.tokens[row].sum(), r.value[row], r.residual[0][row])
        for stream in r.residual.values():
            near(stream[row].sum(), r.value[row], stream[row])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_attnlrp_halves_each_product_and_leaks_in_the_softmax_alone(name):
    model = build(name)
    with relevance(model, include=["*"]) as r:
        r.backward(batch())
    weights = r.weights
    near(weights["lm_head.weight"].sum(), r.value.sum(), weights["lm_head.weight"])
    for layer in range(2):
        q, k, v, o = (weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkvo")
        gate, up, down = (
            weights[f"model.layers.{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        near(q.sum(), k.sum(), q)
        near(v.sum(), o.sum() / 2, o)
        near(gate.sum(), down.sum() / 2, down)
        near(up.sum(), down.sum() / 2, down)
        leak = o.sum() / 2 - (q.sum() + k.sum())
        near(r.residual[layer + 1].sum() - r.residual[layer].sum(), leak, r.residual[layer])
        assert leak.abs() > 100 * TOLERANCE  # there is one


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_columns_of_a_weight_sum_to_the_neurons_and_heads_that_enter_it(name):
    model = build(name)
    family, weights = family_of(model), prunable(model)
    with relevance(model) as r:
        r.backward(batch())
    for layer in range(2):
        prefix = f"{family.blocks}.{layer}"
        down, out = (
            r.weights[f"{prefix}.{path}.weight"] for path in (family.mlp_output, family.attention_output)
        )
        check_sums(r.neurons[layer].sum((0, 1)), down.mT.flatten(), down.shape[1])
        check_sums(r.heads[layer].sum((0, 1)), out.mT.flatten(), model.config.num_attention_heads)
    assert list(r.weights) == list(weights)


# Several batches, options, memory


def test_backwards_accumulate_weights_and_replace_the_rest():
    model = build("mixtral")
    other = batch(2, 7, padding=False, seed=9)
    with relevance(model) as alone:
        alone.backward(other)
    with relevance(model) as r:
        assert not any(total.any() for total in r.weights.values())
        r.backward(batch())
        first = r.weights
        r.backward(other)
    assert r.shape == (2, 7)
    assert torch.equal(r.tokens, alone.tokens)
    for kind in KINDS:
        assert getattr(r, kind).keys() == getattr(alone, kind).keys()
        for layer, ours in getattr(r, kind).items():
            assert torch.equal(ours, getattr(alone, kind)[layer])
    for name, total in r.weights.items():
        assert error(total, first[name] + alone.weights[name]) <= TOLERANCE
    with relevance(model) as again:
        again.backward(batch())
    for name, total in again.weights.items():
        assert torch.equal(total, first[name])  # a new context starts at zero; the old product did not change


def test_without_weights_the_rest_is_the_same():
    model = build("llama")
    with relevance(model) as whole:
        whole.backward(batch())
    with relevance(model, weights=False) as r:
        r.backward(batch())
    assert r.weights == {}
    assert torch.equal(r.tokens, whole.tokens)
    for kind in KINDS:
        for layer, ours in getattr(r, kind).items():
            assert torch.equal(ours, getattr(whole, kind)[layer])


def test_only_the_named_weights():
    model = build("llama")
    names = {"include": ["*_proj*", "lm_head*"], "exclude": ["*.0.*"]}
    with relevance(model, **names) as r:
        r.backward(batch())
    assert list(r.weights) == list(prunable(model, **names))
    assert len(r.weights) == 8


def test_recomputing_gives_the_same_bits_as_keeping(monkeypatch):
    model = build("opt")
    results = []
    for memory in (None, 0):
        with relevance(model, memory=memory) as r:
            r.backward(batch())
        results.append(r)
    kept, recomputed = results
    assert torch.equal(kept.tokens, recomputed.tokens)
    for kind in KINDS:
        for layer, ours in getattr(kept, kind).items():
            assert torch.equal(ours, getattr(recomputed, kind)[layer])
    monkeypatch.setattr(head, "LOGITS_IN_FLIGHT", 3 * 2 * VOCABULARY)  # 2 positions at a time
    with relevance(model, positions="all") as r:
        r.backward(batch())
    expected = [
        reference(model, sample, Rule(), partial(target_value, target="logit")) for sample in singles(batch())
    ]
    check(r, model, expected, batch())


def test_no_graph_outlives_its_backward():
    model, alive = build("llama"), []
    with relevance(model) as r:
        out = model.model.layers[0].self_attn.o_proj
        out.register_forward_pre_hook(lambda module, args: alive.append(weakref.ref(args[0])))
        r.backward(batch())
        assert alive
        assert not [tensor for tensor in alive if tensor() is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gives_fp32_no_worse_than_plain_autograd(dtype):
    model, inputs = build("llama").to(dtype), batch(1, padding=False)
    with relevance(model) as r:
        r.backward(inputs)
    found = [r.tokens, *r.weights.values(), *(x for kind in KINDS for x in getattr(r, kind).values())]
    assert all(tensor.dtype == torch.float32 for tensor in found)
    (_, exact, _), (_, plain, _) = (
        reference(model, inputs, Rule(), LAST_LOGIT, d) for d in (torch.float64, dtype)
    )
    for kind in ("residual", "neurons"):
        for layer, theirs in exact[kind].items():
            # The same roundings in another order: another draw of one error, so a factor of 2 (see test_wrap.py).
            bound = 2 * error(plain[kind][layer].double(), theirs)
            assert error(getattr(r, kind)[layer][0], theirs) <= bound


# Nothing is left behind


@pytest.mark.parametrize("weights", [True, False])
def test_an_exception_leaves_the_model_as_it_was(weights):
    model = build("llama").train()
    before = state(model)

    def broken(logits, inputs):
        raise ZeroDivisionError("of the target")

    options = {"target": broken, "weights": weights}
    with pytest.raises(ZeroDivisionError, match="of the target"), relevance(model, **options) as r:
        r.backward(batch())
    assert state(model) == before
    with pytest.raises(KeyError, match="of the caller"), relevance(model, weights=weights) as r:
        raise KeyError("of the caller")
    assert state(model) == before


def test_other_uses_of_the_model_are_not_recorded():
    model, inputs = build("llama"), batch()
    with torch.no_grad():
        plain = model(**inputs).logits
    with relevance(model) as r:
        r.backward(inputs)
        tokens, residual, weights = r.tokens, dict(r.residual), r.weights
        assert torch.equal(model(**inputs).logits, plain)
        assert r.tokens is tokens
        assert all(r.residual[layer] is stream for layer, stream in residual.items())
        assert all(torch.equal(r.weights[name], total) for name, total in weights.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "lxt"}, "rule 'lxt' is not known"),
        ({"target": "loss"}, "target 'loss' is not known"),
        ({"positions": "first"}, "positions 'first' are not known"),
        ({"include": ["nothing"]}, "no weight is left"),
    ],
)
def test_refused_on_entry(arguments, message):
    model = build("llama")
    before = state(model)
    with pytest.raises(InputError, match=message), relevance(model, **arguments):
        raise AssertionError("entered")
    assert state(model) == before
