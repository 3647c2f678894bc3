"""Components against ablation by hand: columns of the output linears set to zero, activations written over."""

from copy import deepcopy

import pytest
import torch
from tiny import CONFIGS, attentions, batch, build, singles

from sparc3.errors import InputError
from sparc3.families import blocks_of, family_of, find
from sparc3.units import UNITS, ablated, components, recorded

DENSE = [name for name in CONFIGS if name not in ("mixtral", "qwen3_moe")]
# Two fp32 forwards of the same function whose sums have other terms at zero: some roundings of 6e-8 apart, twice
# amplified by two blocks of random weights; what is ablated moves logits by 1e-2 and more.
TOLERANCE = 1e-5


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def by_hand(model, pruned):
    """A copy with the columns of these components at zero; pruned: [(layer, "attention"|"mlp", channels)]."""
    copy = deepcopy(model)
    family = family_of(copy)
    for layer, kind, channels in pruned:
        path = family.attention_output if kind == "attention" else family.mlp_output
        weight = find(blocks_of(copy)[layer], path).weight.data
        (weight if copy.config.model_type == "gpt2" else weight.mT)[channels] = 0
    return copy


def width(model, layer, kind):
    family = family_of(model)
    path = family.attention_output if kind == "attention" else family.mlp_output
    weight = find(blocks_of(model)[layer], path).weight
    return weight.shape[0] if model.config.model_type == "gpt2" else weight.shape[1]


def channels_of(model, unit, label):
    """What a component's name says it is, worked out from the configuration alone."""
    layer = int(label[1:].split(".")[0])
    mlp, attention = ((layer, kind, slice(None)) for kind in ("mlp", "attention"))
    if unit == "layer":
        return [mlp, attention]
    if label.startswith("m"):
        return [mlp] if "." not in label else [(layer, "mlp", [int(label.split(".n")[1])])]
    heads = model.config.num_attention_heads
    size = width(model, layer, "attention") // heads
    if ".h" in label:
        first, count = int(label.split(".h")[1]), 1
    else:
        count = heads // getattr(model.config, "num_key_value_heads", heads)
        first = int(label.split(".kv")[1]) * count
    return [(layer, "attention", slice(first * size, (first + count) * size))]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", DENSE)
def test_ablating_is_zeroing_columns_and_the_mask_does_the_same(name, unit):
    model, inputs = build(name, attentions(name)[0]), batch(padding=False)
    found = components(model, unit)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(len(found.names), generator=generator) < 0.5
    assert 0 < keep.sum() < len(keep)
    hand = by_hand(
        model,
        [
            part
            for label, on in zip(found.names, keep, strict=True)
            if not on
            for part in channels_of(model, unit, label)
        ],
    )
    expected = logits(hand, inputs)
    with ablated(found, keep):
        ours = logits(model, inputs)
    size = expected.abs().max().item()
    assert (ours - expected).abs().max().item() <= TOLERANCE * size
    assert (logits(model, inputs) - expected).abs().max().item() > 1e-3 * size
    mask = found.mask(model, keep)
    mask.apply(model)
    assert (logits(model, inputs) - expected).abs().max().item() <= TOLERANCE * size


def test_how_many_components_there_are():
    model = build("llama")
    counts = {unit: len(components(model, unit).names) for unit in UNITS}
    assert counts == {"neuron": 96, "head": 8, "kv-head": 4, "mlp": 2, "node": 10, "layer": 2}
    assert components(model, "node").names[3:6] == ("a0.h3", "m0", "a1.h0")
    assert components(model, "neuron").names[48] == "m1.n0"


def test_the_mask_of_a_neuron_ties_its_rows_with_its_column():
    model = build("phi3")  # gate and up in one linear
    found = components(model, "neuron")
    keep = torch.ones(96, dtype=torch.bool)
    keep[48 + 7] = False
    mask = found.mask(model, keep)
    gate_up = mask.kept("model.layers.1.mlp.gate_up_proj.weight")
    down = mask.kept("model.layers.1.mlp.down_proj.weight")
    assert not gate_up[[7, 48 + 7]].any()
    assert not down[:, 7].any()
    assert mask.total * mask.sparsity == pytest.approx(3 * 32)
    assert not [name for name in mask.shapes if "attn" in name]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_patching_writes_the_other_runs_activations(name):
    model, inputs = build(name), batch(2, padding=False)
    other = {**inputs, "input_ids": batch(2, padding=False, seed=5)["input_ids"]}
    found = components(model, "head")
    keep = torch.tensor([True, False, True, True, False, True, True, False])
    with recorded(found) as instead:
        logits(model, other)
    seen = dict(instead)
    copy = deepcopy(model)
    for layer, block in enumerate(blocks_of(copy)):
        module = find(block, family_of(copy).attention_output)

        def replace(module, args, layer=layer):
            x = args[0].clone()
            theirs = seen[f"{family_of(model).blocks}.{layer}.{family_of(model).attention_output}"]
            for head in range(4):
                if not keep[4 * layer + head]:
                    x[..., 8 * head : 8 * head + 8] = theirs[..., 8 * head : 8 * head + 8]
            return (x,)

        module.register_forward_pre_hook(replace)
    with ablated(found, keep, instead):
        ours = logits(model, inputs)
    assert torch.equal(ours, logits(copy, inputs))
    # Everything patched with itself changes nothing.
    with recorded(found) as same:
        plain = logits(model, inputs)
    with ablated(found, torch.zeros(8, dtype=torch.bool), same):
        assert torch.equal(logits(model, inputs), plain)


def test_padding_does_not_matter():
    model = build("llama")
    found = components(model, "head")
    keep = torch.arange(8) % 3 != 0
    inputs = batch()
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with ablated(found, keep):
        together = logits(model, inputs)
        for row, single in enumerate(singles(inputs)):
            alone = logits(model, single)[0]
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(
                together[row, real], alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item()
            )


def test_gather_sums_over_each_components_channels():
    model = build("gpt2")
    found = components(model, "node")
    channels = {site.name: torch.randn(len(site.component)) for site in found.sites}
    expected = []
    for layer in range(2):
        expected += channels[f"transformer.h.{layer}.attn.c_proj"].view(4, 8).sum(1).tolist()
        expected.append(channels[f"transformer.h.{layer}.mlp.c_proj"].sum().item())
    assert found.gather(channels).tolist() == pytest.approx(expected, abs=1e-5)


def test_hooks_are_gone_afterwards_even_after_an_error():
    model = build("llama")
    found = components(model, "node")
    with pytest.raises(KeyError), ablated(found, torch.ones(10, dtype=torch.bool)):
        raise KeyError
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_refused():
    with pytest.raises(InputError, match=r"unit 'edge' is not known; use weight \| neuron"):
        components(build("llama"), "edge")
    for unit in ("neuron", "mlp", "node", "layer"):
        with pytest.raises(InputError, match=r"block \d has fused experts; use weight, head or kv-head"):
            components(build("mixtral"), unit)
    assert len(components(build("mixtral"), "kv-head").names) == 4
