"""sparc3 export from the command line."""

import json

import pytest
import torch
from commands import succeed, succeed_json
from safetensors.torch import load_file
from test_cli_refusals import refuse
from transformers import AutoModelForCausalLM

import sparc3
from sparc3.runtime import SparseLinear


@pytest.fixture
def mask(masks):
    return masks[1]


def test_dense_is_the_default(room, base, mask):
    out = succeed("export", base, "--mask", mask, "--out", "out")
    assert "Saved out (dense" in out
    assert "quantization_config" not in json.loads((room / "out/config.json").read_text())
    exported, pruned = (load_file(room / folder / "model.safetensors") for folder in ("out", "fifty"))
    assert all(torch.equal(exported[key], pruned[key]) for key in pruned)


@pytest.mark.parametrize("format", ["bitmap", "csr"])
@pytest.mark.parametrize("source", ["base", "pruned"])
def test_packed_from_the_dense_and_from_the_pruned_model(room, base, mask, format, source):
    model = base if source == "base" else "fifty"
    found = succeed_json("export", model, "--mask", mask, "--format", format, "--out", "out")
    assert found["weights"]["formats"] == {format: 14}
    assert found["file_bytes"] == (room / "out/model.safetensors").stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(room / "out")
    pruned = AutoModelForCausalLM.from_pretrained(room / "fifty")
    packed = [(path, one) for path, one in loaded.named_modules() if isinstance(one, SparseLinear)]
    assert len(packed) == 14
    assert all(torch.equal(one.dense(), pruned.get_submodule(path).weight) for path, one in packed)
    report = json.loads((room / "out/report.json").read_text())
    assert report["export"]["asked"] == format
    assert report["export"]["formats"] == {format: 14}
    assert set(report["export"]["tensors"]) == set(report["tensors"])
    assert sparc3.Mask.load(room / "out/mask.safetensors").sparsity == 0.5


def test_another_dtype(room, base, mask):
    succeed("export", base, "--mask", mask, "--format", "bitmap", "--dtype", "bfloat16", "--out", "out")
    assert json.loads((room / "out/config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(room / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.uint8, torch.int64}


def test_without_a_mask(room, mask):
    table = succeed("export", "fifty", "--format", "bitmap", "--out", "out")
    assert "asked for" in table
    assert "Saved out" in table
    assert not (room / "out/mask.safetensors").exists()


def test_2_of_4_and_auto(room, base):
    succeed("prune", base, "--method", "magnitude", "--pattern", "2:4", "--out", "half")
    for format in ("nm", "auto"):
        found = succeed_json("export", "half", "--format", format, "--dtype", "bfloat16", "--out", format)
        assert sum(found["weights"]["formats"].values()) == 14
    choices = json.loads((room / "auto/report.json").read_text())["export"]["tensors"]
    assert all(
        {"bytes", "microseconds"} == set(row)
        for choice in choices.values()
        for row in choice["candidates"].values()
    )


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("format '2:4' is not known; use dense | bitmap | nm | csr | auto", ("--format", "2:4")),
        ("dtype 'float64' is not known; use float32 | bfloat16 | float16", ("--dtype", "float64")),
        ("cannot read a mask from none", ("--mask", "none")),
        ("is not N:M", ("--format", "nm")),
        ("fifty exists; give another --out", ("--out", "fifty")),
        ("device 'gpu' cannot be used", ("--device", "gpu")),
    ],
)
def test_refusals(room, base, mask, message, arguments):
    out = () if "--out" in arguments else ("--out", "out")
    given = () if "--mask" in arguments else ("--mask", mask)
    refuse(room, message, "export", base, *given, *arguments, *out)


def test_a_packed_model_is_written_in_another_format(room, base, mask):
    for format in ("bitmap", "csr"):
        succeed("export", base, "--mask", mask, "--format", format, "--out", format)
    assert "Saved again" in succeed("export", "bitmap", "--format", "csr", "--out", "again")
    assert (room / "again/model.safetensors").read_bytes() == (room / "csr/model.safetensors").read_bytes()
    modules = json.loads((room / "again/config.json").read_text())["quantization_config"]["modules"]
    assert json.loads((room / "again/report.json").read_text())["export"]["formats"] == {"csr": len(modules)}
    refuse(room, "packed already", "export", "bitmap", "--out", "dense")
    refuse(room, "packed already", "export", "bitmap", "--format", "auto", "--out", "auto")
