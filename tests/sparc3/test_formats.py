"""What a pruned weight is packed as: sizes, the choice of auto and its reasons, and what cannot be packed."""

import json

import pytest
import torch
from packed import magnitude, packed
from safetensors.torch import load_file
from sparc3_kernels.select import pack_bits
from tiny import batch, build
from transformers import AutoModelForCausalLM

from sparc3 import formats
from sparc3.errors import InputError
from sparc3.export import save_pretrained
from sparc3.formats import pack_model, sparsify_, summary
from sparc3.mask import Mask
from sparc3.pack import pack_linear, repack_linear
from sparc3.runtime import SparseLinear
from sparc3.scores import attribute

DOWN = "model.layers.0.mlp.down_proj.weight"


def sparse_weight(rows, columns, sparsity, dtype=torch.bfloat16, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) >= sparsity
    return (weight * kept).to(dtype)


def stored_bytes(linear):
    return sum(tensor.numel() * tensor.element_size() for tensor in linear.state_dict().values())


# Bytes a weight: values, then 1/8 and an offset of 8 bytes a row for a bit map, 2 bits for 2:4, 2 for a CSR index.
@pytest.mark.parametrize(
    ("format", "sparsity", "share"), [("bitmap", 0.5, 0.57), ("bitmap", 0.7, 0.37), ("csr", 0.95, 0.11)]
)
def test_sizes_in_bf16(format, sparsity, share):
    weight = sparse_weight(512, 4096, sparsity)
    linear = pack_linear(weight, format)
    assert stored_bytes(linear) <= share * 2 * weight.numel()
    assert torch.equal(linear.dense(), weight)


def test_size_of_2_of_4_in_bf16():
    weight = sparse_weight(512, 4096, 0).view(512, -1, 4)
    weight[..., [0, 2]] = 0
    linear = pack_linear(weight.view(512, 4096), "nm", n=2, m=4)
    assert stored_bytes(linear) == 0.5625 * 2 * weight.numel()


@pytest.mark.parametrize("format", ["bitmap", "csr", "nm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 36), (17, 100), (5, 64)])
def test_a_packed_linear_is_the_linear_of_its_weight(rows, columns, dtype, format):
    weight = sparse_weight(rows, columns, 0.5, dtype)
    if format == "nm":
        weight.view(rows, -1, 4)[..., :2] = 0
    bias = torch.randn(rows).to(dtype)
    linear = pack_linear(weight, format, bias, 2, 4) if format == "nm" else pack_linear(weight, format, bias)
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(9)).to(dtype)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    scale = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    # One rounding of the result, and of each of at most columns + 1 fp32 sums.
    allowed = exact.abs() * torch.finfo(dtype).eps + scale * (columns + 1) * torch.finfo(torch.float32).eps
    with torch.no_grad():
        assert ((linear(x).double() - exact).abs() <= allowed + torch.finfo(dtype).tiny).all()
    assert torch.equal(linear.dense(), weight)


def times(monkeypatch, **microseconds):
    """What the formats take, in place of a measurement."""
    monkeypatch.setattr(
        formats, "cold_seconds", lambda calls, device: {name: microseconds[name] * 1e-6 for name in calls}
    )


@pytest.mark.parametrize(
    ("dense", "bitmap", "nm", "csr", "best", "why"),
    [
        (100, 60, 60, 80, "nm", "the smallest of those at most 10 % slower than the fastest, bitmap"),
        (100, 60, 70, 80, "bitmap", "the fastest"),
        (50, 60, 70, 80, "dense", "the fastest"),
        (100, 60, 64, 59, "nm", "the smallest of those at most 10 % slower than the fastest, csr"),
        (60, 65, 90, 90, "bitmap", "the smallest of those at most 10 % slower than the fastest, dense"),
    ],
)
def test_auto_weighs_bytes_and_time(monkeypatch, dense, bitmap, nm, csr, best, why):
    model = build("llama")
    times(monkeypatch, dense=dense, bitmap=bitmap, nm=nm, csr=csr)
    linears, choices = pack_model(model, magnitude(model, "nm", include=[DOWN]), "auto")
    choice = choices[DOWN]
    assert (choice["format"], choice["why"]) == (best, why)
    assert {name: row["microseconds"] for name, row in choice["candidates"].items()} == {
        "dense": dense,
        "bitmap": bitmap,
        "nm": nm,
        "csr": csr,
    }
    # 32 x 48 fp32 at half: values 3072, and 33 offsets, 32 x 8 bytes of bits, 24 x 2 bits or 768 x 16 bits.
    assert {name: row["bytes"] for name, row in choice["candidates"].items()} == {
        "dense": 6144,
        "bitmap": 3072 + 264 + 256,
        "nm": 3072 + 192,
        "csr": 3072 + 264 + 1536,
    }
    assert choice["bytes"] == choice["candidates"][best]["bytes"]
    assert [linear.format for linear in linears.values()] == [best][: best != "dense"]


def test_auto_offers_n_of_m_only_where_the_weight_is(monkeypatch):
    model = build("llama")
    times(monkeypatch, dense=9, bitmap=3, csr=5)
    _, choices = pack_model(model, magnitude(model, "row", include=[DOWN]), "auto")
    assert set(choices[DOWN]["candidates"]) == {"dense", "bitmap", "csr"}


def test_a_dense_choice_still_has_the_zeros(tmp_path, monkeypatch):
    model = build("llama")
    mask = magnitude(model, "row")
    times(monkeypatch, dense=1, bitmap=3, csr=5)
    save_pretrained(model, mask, tmp_path / "out", format="auto", report={})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mask.apply(model)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    export = json.loads((tmp_path / "out/report.json").read_text())["export"]
    assert (export["asked"], export["formats"], export["ratio"]) == ("auto", {"dense": 14}, 1)
    assert export["tensors"][DOWN]["why"] == "the fastest"


def test_the_measurement_runs(monkeypatch):
    """auto on this machine: figures of every candidate, whatever they are."""
    model = build("llama")
    _, choices = pack_model(model, magnitude(model, "nm", include=[DOWN]), "auto")
    figures = choices[DOWN]["candidates"]
    assert set(figures) == {"dense", "bitmap", "nm", "csr"}
    assert all(row["microseconds"] > 0 for row in figures.values())
    assert choices[DOWN]["format"] in figures


def test_without_a_mask_the_zeros_count(tmp_path):
    model = build("llama")
    mask = magnitude(model, "row", exclude=["*.0.*"])
    mask.apply(model)
    linears, choices = pack_model(model, None, "bitmap")
    assert set(linears) == {
        f"model.layers.1.{path}"
        for path in (
            *(f"self_attn.{one}_proj" for one in "qkvo"),
            *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
        )
    }
    assert choices[DOWN] == {
        "format": "dense",
        "bytes": 6144,
        "dense_bytes": 6144,
        "why": "nothing of it is pruned",
    }
    assert summary(choices)["formats"] == {"dense": 7, "bitmap": 7}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_fused_experts_stay_dense_with_a_reason_or_are_refused(tmp_path, monkeypatch, name):
    model = build(name, "eager")
    mask = magnitude(model, "row")
    experts = next(key for key in mask.bits if "experts" in key)
    with pytest.raises(
        InputError, match=rf"{experts} cannot be packed as bitmap: its experts are fused .*auto"
    ):
        save_pretrained(model, mask, tmp_path / "out", format="bitmap")
    assert list(tmp_path.iterdir()) == []
    times(monkeypatch, dense=9, bitmap=3, csr=5)
    choices = save_pretrained(model, mask, tmp_path / "out", format="auto")
    assert choices[experts]["why"].startswith("its experts are fused in one tensor of shape")
    assert summary(choices)["formats"]["bitmap"] == sum("experts" not in key for key in mask.bits)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert any(isinstance(module, SparseLinear) for module in loaded.modules())
    mask.apply(model)
    with torch.no_grad():
        found, expected = (one(**batch(), use_cache=False).logits for one in (loaded, model))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_tied_head_is_refused_and_an_untied_one_packed(tmp_path):
    tied = build("llama", tie_word_embeddings=True)
    with pytest.raises(
        InputError, match=r"lm_head.weight cannot be packed as csr: it is tied to the embeddings"
    ):
        pack_model(tied, magnitude(tied, "row", include=["lm_head*"]), "csr")
    model = build("llama")
    mask = magnitude(model, "row", include=["*"])
    save_pretrained(model, mask, tmp_path / "out", format="bitmap")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.lm_head, SparseLinear)
    mask.apply(model)
    assert torch.equal(loaded.lm_head.dense(), model.lm_head.weight)


def test_what_cannot_be_packed_is_refused_by_name(tmp_path):
    model = build("llama")
    with pytest.raises(InputError, match=rf"{DOWN} is not N:M, not even half of every 4, 8 or 16"):
        pack_model(model, magnitude(model, "row", include=[DOWN]), "nm")
    with pytest.raises(
        InputError, match=r"format '24' is not known; use dense \| bitmap \| nm \| csr \| auto"
    ):
        pack_model(model, None, "24")
    with pytest.raises(
        InputError, match=r"w is torch.float64; packed weights are float32, bfloat16 or float16"
    ):
        pack_linear(torch.ones(2, 4, dtype=torch.float64), "bitmap", name="w")
    with pytest.raises(
        InputError, match=r"w cannot be packed as nm: the weight is not 1:4: row 0, columns 0 to 3"
    ):
        pack_linear(torch.ones(2, 4), "nm", n=1, m=4, name="w")
    with pytest.raises(InputError, match="the mask was made for another model"):
        pack_model(build("llama", seed=1), magnitude(model, "row"), "bitmap")


@pytest.mark.parametrize("to", ["bitmap", "nm", "csr"])
@pytest.mark.parametrize("source", ["bitmap", "nm", "csr"])
def test_a_packed_model_in_another_format(tmp_path, source, to):
    """The bytes that packing the dense model so gives, also of GPT-2's transposed weights with biases."""
    model = build("gpt2")
    mask = magnitude(model, "nm")
    for format in {source, to}:
        save_pretrained(model, mask, tmp_path / format, format=format)
    save_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / source), None, tmp_path / "again", format=to
    )
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("again", to))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("again", to)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_what_a_packed_model_cannot_become_is_refused(tmp_path):
    packed(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="the model is packed already; it can be written as bitmap, nm, csr"):
        save_pretrained(model, None, tmp_path / "again")
    with pytest.raises(InputError, match=r"the model is packed already: .* no mask can be applied"):
        save_pretrained(model, magnitude(build("llama"), "row"), tmp_path / "again", format="csr")
    with pytest.raises(
        InputError, match=r"cannot be packed as nm: the weight is not 2:4: .*; the weight is not 4:8"
    ):
        save_pretrained(model, None, tmp_path / "again", format="nm")


def test_repacking_keeps_the_pattern_and_the_linear():
    weight = torch.zeros(3, 32)
    weight[:, :8] = torch.arange(1.0, 25.0).view(3, 8)
    linear = pack_linear(weight, "csr", name="w")
    assert repack_linear(linear, "csr") is linear
    found = repack_linear(linear, "nm")
    assert (found.packing.n, found.packing.m) == (8, 16)
    assert torch.equal(found.dense(), weight)
    assert linear.format == "csr"


def test_the_mask_of_8_of_16_is_found():
    model = build("llama")
    weight = model.get_parameter(DOWN)
    with torch.no_grad():
        weight.view(32, 3, 16)[..., 3:11] = 0
    _, choices = pack_model(model, None, "nm")
    assert choices[DOWN]["bytes"] == 4 * 32 * 24 + 32 * 12


@pytest.mark.parametrize("pattern", ["2:4", "3:4", "4:6"])
def test_an_n_of_m_mask_and_a_correction_are_packed_as_n_of_m(pattern):
    """3:4 and 4:6 are not looked for in the weights; the mask was made for them."""
    model = build("llama")
    compressed = attribute(model, [], "magnitude", include=[DOWN]).select(None, pattern)
    random = torch.Generator().manual_seed(0)
    correction = Mask(
        {
            name: pack_bits(torch.rand(shape, generator=random) > 0.01)
            for name, shape in compressed.shapes.items()
        },
        compressed.shapes,
        compressed.fingerprint,
        {"unit": "neuron"},
    )
    both = correction.combine(compressed)
    linears, choices = pack_model(model, both, "nm")
    assert {choice["format"] for choice in choices.values()} == {"nm"}
    (linear,) = linears.values()
    assert torch.equal(linear.dense(), model.get_parameter(DOWN) * both.kept(DOWN))
    with pytest.raises(InputError, match="not N:M"):
        pack_model(model, correction.combine(compressed, "or"), "nm")


def test_sparsify_in_memory_is_what_a_file_would_be(tmp_path):
    model = build("llama")
    mask = magnitude(model, "row")
    save_pretrained(model, mask, tmp_path / "out", format="bitmap")
    sparsify_(model, mask)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert set(loaded) == set(model.state_dict())
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


def test_the_bytes_are_those_of_the_document():
    """docs/formats.md, read by hand: each format's tensors of a small weight."""
    weight = torch.zeros(2, 40)
    weight[0, [1, 9, 39]] = torch.tensor([1.5, -2.0, 3.0])
    weight[1, 32] = float("inf")
    stored = {format: pack_linear(weight, format).stored() for format in ("bitmap", "csr")}
    for tensors in stored.values():
        assert tensors["weight"].tolist() == [1.5, -2.0, 3.0, float("inf")]
        assert tensors["offsets"].tolist() == [0, 3, 4]
    assert stored["bitmap"]["bits"].tolist() == [[2, 2, 0, 0, 128, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]
    assert (stored["csr"]["indices"].dtype, stored["csr"]["indices"].tolist()) == (
        torch.uint16,
        [1, 9, 39, 32],
    )
    row = torch.tensor([[0.0, 5, 0, 7, 3, 0, 0, 0]])
    tensors = pack_linear(row, "nm", n=2, m=4).stored()
    assert (tensors["weight"].tolist(), tensors["indices"].tolist()) == ([[5, 7, 3, 0]], [[77]])
    # 8 places of 4 bits in 16 columns of 8:16: the second of a byte in its upper half.
    tensors = pack_linear(torch.arange(16.0).remainder(2)[None], "nm", n=8, m=16).stored()
    assert tensors["indices"].tolist() == [[1 | 3 << 4, 5 | 7 << 4, 9 | 11 << 4, 13 | 15 << 4]]
    wide = torch.zeros(1, 65537)
    wide[0, 65536] = 1
    assert pack_linear(wide, "csr").stored()["indices"].dtype == torch.int32
