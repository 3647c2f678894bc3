"""Every declared family: logits equal to the last bit on the reference backend, relevance equal to plain autograd's.

Grid: each configuration of tiny.py is there for a part that no other has; both attention implementations,
because they build masks differently; three rules for relevance, because each takes another branch of every
backward (AttnLRP: closed forms and constant scales; gradient: derivatives; CP: cut branches).
"""

import sys
from functools import cache, partial

import pytest
import torch
from oracle import weight_gradients
from sparc3_kernels import backend
from tiny import FAMILIES, batch, build, singles
from transformers import AutoConfig, AutoModelForCausalLM

from sparc3.engine import Blocks
from sparc3.errors import InputError
from sparc3.families import FAMILIES as DECLARED
from sparc3.families import Family, prunable
from sparc3.rules import Rule
from sparc3.scores import Accumulators, accumulate
from sparc3.targets import target_value
from sparc3.wrap import wrap

# fp32 against fp64: the forward and the backward are some 40 operations deep and sum up to 50 products of
# random sign each; 2^-24 * sqrt(40 * 50) = 2.7e-6 of the largest term. DESIGN.md promises 1e-5.
TOLERANCE = 1e-5


def logits(model, inputs):
    return model(**inputs, use_cache=False).logits


@cache
def reference(name, rule):
    """{weight: gradient} of the log-probability, every sample run alone and without its padding."""
    model = build(name, "eager")
    total = {}
    for sample in singles(batch()):
        value = partial(target_value, target="logprob")
        _, gradients = weight_gradients(model, sample, Rule.parse(rule), value)
        for key, gradient in gradients.items():
            total[key] = total.get(key, 0) + gradient
    return total


def gradients_of(model, inputs, rule, weights=None, **options):
    weights = prunable(model) if weights is None else weights
    sink = Accumulators(weights, "signed")
    accumulate(model, [inputs], Rule.parse(rule), "logprob", "all", weights, sink, **options)
    return sink.sums


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def check_against_reference(model, name, rule):
    weights = prunable(model)
    expected = reference(name, rule)
    for key, ours in gradients_of(model, batch(), rule).items():
        theirs = weights[key].canonical(expected[key])
        if theirs.norm() == 0:
            assert torch.count_nonzero(ours) == 0, key
        else:
            assert relative_error(ours, theirs) <= TOLERANCE, key


@pytest.fixture
def on_reference():
    with backend("reference"):
        yield


@pytest.fixture
def no_linear_is_small(monkeypatch):
    """These models' linears too would run in the CPU library, but for the reference backend."""
    monkeypatch.setattr(sys.modules["sparc3_kernels.linear"], "SMALL", 1)


@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_linears_of_the_library_agree(name, attention, no_linear_is_small):
    model = build(name, attention)
    inputs = batch()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    weights = prunable(model)
    with torch.no_grad():
        plain = logits(model, inputs)
    with wrap(model, Rule(), weights, Accumulators(weights, "signed")), torch.no_grad():
        assert relative_error(logits(model, inputs), plain) <= TOLERANCE
    check_against_reference(model, name, "attnlrp")


@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_logits_are_equal_to_the_last_bit(name, attention, no_linear_is_small, on_reference):
    model = build(name, attention)
    inputs = batch()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    everywhere = torch.arange(inputs["input_ids"].shape[1])
    weights = prunable(model)
    with torch.no_grad():
        plain = logits(model, inputs)
    with wrap(model, Rule(), weights, Accumulators(weights, "signed")):
        blocks = Blocks(model)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(logits(model, inputs), plain)
                hidden, calls = blocks.record(inputs)
                hidden.requires_grad_(grad)
                for index, call in enumerate(calls):
                    hidden = blocks.run(index, hidden, call)
                assert torch.equal(blocks.logits(hidden, inputs, everywhere), plain)
                # A chunk of positions is another GEMM shape, so equal only up to the rounding of 32 products.
                some = blocks.logits(hidden, inputs, everywhere[3:7])
                torch.testing.assert_close(some, plain[:, 3:7], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(logits(model, inputs), plain)


@pytest.mark.parametrize("rule", ["attnlrp", "gradient", "cp"])
@pytest.mark.parametrize(("name", "attention"), FAMILIES)
def test_relevance_of_a_padded_batch_equals_autograd_on_single_samples(name, attention, rule):
    check_against_reference(build(name, attention), name, rule)


# Each part of the rule alone. Three models have every part among them: qwen3 (RMS and q/k-norms, gate),
# gpt_neox (LayerNorm, plain MLP) and mixtral (router weight x expert output).
@pytest.mark.parametrize(
    "part",
    [
        "norm=constant,qknorm=gradient",
        "qknorm=constant",
        "activation=identity",
        "gate=half",
        "attention=half",
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "gpt_neox", "mixtral"])
def test_each_part_of_the_rule_alone(name, part):
    check_against_reference(build(name), name, f"gradient,{part}")


@pytest.mark.parametrize("part", ["gate=up", "attention=value"])
def test_each_cut_of_cp_alone(part):
    check_against_reference(build("qwen3_moe"), "qwen3_moe", part)


def test_grouped_and_eager_experts_agree_with_the_reference():
    model = build("mixtral")
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        check_against_reference(model, "mixtral", "attnlrp")


@pytest.mark.parametrize(
    ("name", "linears"),
    [
        ("llama", "self_attn.q self_attn.k self_attn.v self_attn.o mlp.gate mlp.up mlp.down"),
        ("phi3", "self_attn.qkv self_attn.o mlp.gate_up mlp.down"),
    ],
)
def test_prunable_names_of_gated_models(name, linears):
    names = [f"model.layers.{layer}.{path}_proj.weight" for layer in range(2) for path in linears.split()]
    assert sorted(prunable(build(name))) == sorted(names)


def test_prunable_weights_are_the_2d_weights_of_blocks_without_routers():
    for name, attention in FAMILIES:
        model = build(name, attention)
        blocks = DECLARED[model.config.model_type].blocks
        expected = [
            path
            for path, parameter in model.named_parameters()
            if path.startswith(blocks + ".") and parameter.dim() > 1 and not path.endswith("mlp.gate.weight")
        ]
        found = prunable(model)
        assert sorted(found) == sorted(expected)
        state = model.state_dict()
        for path, weight in found.items():
            assert weight.name == path
            assert weight.weight.data_ptr() == state[path].data_ptr()


def test_canonical_is_a_view_of_out_by_in():
    weights = prunable(build("gpt2"))
    c_attn = weights["transformer.h.0.attn.c_attn.weight"]
    assert c_attn.transposed
    assert c_attn.canonical(c_attn.weight).shape == (96, 32)
    assert c_attn.canonical(c_attn.canonical(c_attn.weight)).equal(c_attn.weight)
    experts = prunable(build("mixtral"))["model.layers.1.mlp.experts.gate_up_proj"]
    assert experts.canonical(experts.weight).shape == (4, 96, 32)


def test_include_and_exclude_patterns():
    model = build("llama")
    q = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    assert set(prunable(model, include=["*q_proj*"])) == q
    assert set(prunable(model, include=["*.0.*", "*.1.*"], exclude=["*mlp*", "*[kvo]_proj*"])) == q
    assert set(prunable(model)) - set(prunable(model, exclude=["*q_proj*"])) == q
    with pytest.raises(InputError, match=r"no weight is left .*nothing.*model\.layers\.0\."):
        prunable(model, include=["nothing"])


def test_the_head_and_embeddings_are_taken_only_when_asked_for():
    model = build("llama")
    assert "lm_head.weight" not in prunable(model)
    assert list(prunable(model, include=["lm_head*"])) == ["lm_head.weight"]
    assert "lm_head.weight" in prunable(model, include=["*"])
    with pytest.raises(InputError, match="no weight is left"):
        prunable(model, include=["*embed*", "*norm*"])


def test_unknown_architecture_says_what_to_declare():
    config = AutoConfig.for_model(
        "olmo", vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"'olmo' is not declared; known: gemma2, .*FAMILIES\['olmo'\]"):
        prunable(model)


def test_declaring_a_family_is_all_it_takes(monkeypatch):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("stablelm", **size, **tokens, num_key_value_heads=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    monkeypatch.setitem(DECLARED, "stablelm", Family(norm="layer"))
    inputs = batch(padding=False)
    weights = prunable(model)
    _, expected = weight_gradients(model, inputs, Rule(), partial(target_value, target="logprob"))
    for key, ours in gradients_of(model, inputs, "attnlrp", weights).items():
        assert relative_error(ours, expected[key]) <= TOLERANCE, key
