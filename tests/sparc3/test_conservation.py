"""Where relevance goes, against the parameters' and streams' gradients of plain autograd in fp64 (oracle.py)."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from oracle import residual_gradients, weight_gradients
from tiny import CONFIGS, batch, build, singles, state

from sparc3 import families, wrap
from sparc3.conservation import PARTS, conservation
from sparc3.errors import InputError
from sparc3.families import family_of
from sparc3.rules import Rule
from sparc3.targets import target_value

BLOCKS = 2
HEAD = BLOCKS
# Row.rounding is the tolerance: 10 eps of fp32 times the sizes of the sums' terms, which cancel.
LAST = {name: partial(target_value, target=name, positions="last") for name in ("logit", "logprob")}


def block_of(model, name):
    below = name.removeprefix(f"{family_of(model).blocks}.")
    return HEAD if below == name else int(below.split(".")[0])


@cache
def reference(name, rule, target="logit"):
    """(value, [sum of each stream's relevance], {parameter: sum of its relevance}), over the samples of batch()."""
    model, value, streams, parameters = build(name, "eager"), 0.0, [0.0] * (BLOCKS + 1), {}
    for sample in singles(batch()):
        of_sample, gradients = weight_gradients(model, sample, Rule.parse(rule), LAST[target])
        value += of_sample.item()
        for path, gradient in gradients.items():
            relevance = (model.get_parameter(path).double() * gradient).sum().item()
            parameters[path] = parameters.get(path, 0.0) + relevance
            if family_of(model).norm == "rms+1" and "norm" in path:
                # The factor is 1 + weight.
                parameters[path] += gradient.sum().item()
        found = residual_gradients(model, sample, Rule.parse(rule), LAST[target])
        for index, (stream, gradient) in enumerate(found):
            streams[index] += (stream * gradient).sum().item()
    return value, streams, parameters


def of_parameters(name, rule, block, *endings):
    model = build(name, "eager")
    found = reference(name, rule)[2]
    return sum(
        value for path, value in found.items() if block_of(model, path) == block and path.endswith(endings)
    )


def found_rows(name, rule, target="logit"):
    model = build(name, "eager" if name == "gemma2" else "sdpa")
    _, flow = conservation(model, batch(), rule, target)
    assert [row.block for row in flow.rows] == list(range(BLOCKS, -1, -1))
    return flow, {row.block: row for row in flow.rows}


@pytest.mark.parametrize("rule", ["attnlrp", "cp", "gradient"])
@pytest.mark.parametrize("name", CONFIGS)
def test_sums_add_up_and_streams_and_biases_equal_plain_autograd(name, rule):
    value, streams, _ = reference(name, rule)
    flow, rows = found_rows(name, rule)
    rounding = sum(row.rounding for row in flow.rows)
    assert rounding < 1e-2  # the tolerance is one
    assert flow.value == pytest.approx(value, abs=rounding)
    assert flow.inputs == pytest.approx(streams[0], abs=rounding)
    assert flow.value == pytest.approx(flow.inputs + sum(flow.taken.values()), abs=1e-9)  # python floats
    for block, row in rows.items():
        assert tuple(row.taken) == PARTS
        assert row.below == pytest.approx(streams[block], abs=row.rounding)
        assert row.above == pytest.approx(value if block == HEAD else streams[block + 1], abs=row.rounding)
        assert row.above == pytest.approx(row.below + sum(row.taken.values()), abs=1e-9)
        biases = of_parameters(name, rule, block, "bias")
        assert row.taken["biases"] == pytest.approx(biases, abs=row.rounding)
    assert flow.broken == []


@pytest.mark.parametrize("rule", ["attnlrp", "cp", "norm=gradient", "gate=gradient", "attention=gradient"])
@pytest.mark.parametrize("name", ["llama", "opt", "gemma3_text", "qwen3_moe"])
def test_what_a_rule_conserves_takes_nothing(name, rule):
    flow, rows = found_rows(name, rule)
    conserves = {"attnlrp": {"norms", "products"}, "cp": {"norms", "products", "softmax"}}
    expected = conserves.get(rule, {"products"} if rule == "norm=gradient" else {"norms"})
    assert set(flow.zero) == expected | {"target", "unaccounted"}
    for row in rows.values():
        for part in flow.zero:
            assert abs(row.taken[part]) <= row.rounding
    taken = {"norms", "softmax", "products"} - expected
    for part in taken - (
        {"products"} if name == "opt" and rule == "gate=gradient" else set()
    ):  # it has no gate
        assert abs(flow.taken[part]) > 10 * sum(row.rounding for row in flow.rows)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_softmax_takes_half_the_output_less_queries_and_keys(name):
    _, rows = found_rows(name, "attnlrp")
    for block in range(BLOCKS):
        output = of_parameters(name, "attnlrp", block, "o_proj.weight")
        entered = of_parameters(name, "attnlrp", block, "q_proj.weight", "k_proj.weight")
        assert rows[block].taken["softmax"] == pytest.approx(output / 2 - entered, abs=rows[block].rounding)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_under_the_gradient_each_norm_takes_what_its_weight_has(name):
    # A norm does not change with its input's size, so none of its output's relevance reaches the input, but for
    # a share of eps / variance: 1e-6 of streams of unit size.
    _, rows = found_rows(name, "gradient")
    for block, row in rows.items():
        norms = of_parameters(name, "gradient", block, "norm.weight", "layernorm.weight")
        assert row.taken["norms"] == pytest.approx(norms, abs=10 * row.rounding)


def test_under_the_gradient_products_give_to_each_factor():
    _, rows = found_rows("llama", "gradient")
    _, streams, _ = reference("llama", "gradient")
    for block in range(BLOCKS):
        row = rows[block]
        query, output = (of_parameters("llama", "gradient", block, f"{part}_proj.weight") for part in "qo")
        # The pattern has all of the output's relevance, queries all of the scores'. No part is left but products.
        assert row.taken["softmax"] == pytest.approx(output - query, abs=10 * row.rounding)
        rest = streams[block + 1] - streams[block] - row.taken["norms"] - row.taken["softmax"]
        assert row.taken["products"] == pytest.approx(rest, abs=row.rounding)


@pytest.mark.parametrize(("name", "target"), [("llama", "logprob"), ("gemma2", "logit"), ("opt", "logprob")])
def test_the_target_takes_what_the_head_does_not_get(name, target):
    value, _, parameters = reference(name, "attnlrp", target)
    flow, _ = found_rows(name, "attnlrp", target)
    head = sum(of_head for path, of_head in parameters.items() if path.startswith(("lm_head", "embed_out")))
    assert flow.taken["target"] == pytest.approx(value - head, abs=flow.rows[0].rounding)
    assert abs(flow.taken["target"]) > flow.rows[0].rounding
    assert "target" not in flow.zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_conserves_to_its_own_rounding(dtype):
    _, flow = conservation(build("llama").to(dtype), batch())
    assert flow.broken == []


def test_recomputing_gives_the_same_figures():
    model = build("opt")
    kept, recomputed = (conservation(model, batch(), memory=memory)[1] for memory in (None, 0))
    assert kept == recomputed


# A declaration that does not fit


def test_a_norm_of_another_kind_is_found(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "llama", replace(families.FAMILIES["llama"], norm="rms+1"))
    _, flow = conservation(build("llama"), batch())
    assert flow.broken == [(block, "norms") for block in (2, 1, 0)]


def test_attention_without_its_rule_is_found(monkeypatch):
    monkeypatch.setattr(wrap, "scale_gradient", lambda x, scale: x)
    _, flow = conservation(build("llama"), batch())
    assert flow.broken == [(1, "products"), (0, "products")]


def test_an_mlp_declared_as_plain_is_found(monkeypatch):
    wrong = replace(families.FAMILIES["llama"], mlp=None)
    monkeypatch.setitem(families.FAMILIES, "llama", wrong)
    _, flow = conservation(build("llama"), batch())
    assert flow.broken == [(1, "unaccounted"), (0, "unaccounted")]


# Nothing is left behind


def test_the_model_is_left_as_it_was():
    model = build("qwen3_moe").train()
    before = state(model)
    conservation(model, batch())
    assert state(model) == before

    def broken(logits, inputs):
        raise ZeroDivisionError("of the target")

    with pytest.raises(ZeroDivisionError):
        conservation(model, batch(), target=broken)
    assert state(model) == before
    with pytest.raises(InputError, match="rule 'lxt' is not known"):
        conservation(model, batch(), rule="lxt")
    assert state(model) == before
