"""Packed models through plain transformers: they load, run, save and move like dense ones."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import FORMATS, packed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparc3_kernels import native
from tiny import CONFIGS, attentions, batch
from transformers import AutoModel, AutoModelForCausalLM

import sparc3
from sparc3.quantizer import move_to_huge_pages
from sparc3.runtime import SparseLinear

Q = "model.layers.0.self_attn.q_proj"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model, **options):
    with torch.no_grad():
        return model(**batch(), use_cache=False, **options).logits


def sparse(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseLinear)}


# Experts fused in one tensor are the subject of test_formats.
DENSE_FAMILIES = [name for name in CONFIGS if name not in ("mixtral", "qwen3_moe")]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_a_packed_model_has_the_logits_of_the_pruned_one(tmp_path, name, format):
    pruned = packed(tmp_path / "out", name, format)
    model = load(tmp_path / "out", attn_implementation=attentions(name)[0])
    assert sparse(model)
    assert {module.format for module in sparse(model).values()} == {format}
    # Sums of at most 48 products in another order, through two layers: some hundred roundings of 6e-8.
    expected = logits(pruned)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for path, module in sparse(model).items():
        weight = pruned.get_submodule(path).weight
        assert torch.equal(module.dense(), weight.T if module.packing.transposed else weight), path
    # Nothing else holds the weights: the packed model has no parameter of a dense linear's shape in its blocks.
    assert not any(
        f"{path}.weight" in dict(pruned.named_parameters()) and module.weight.shape == module.packing.shape
        for path, module in sparse(model).items()
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_as_exact_as_dense_ones(tmp_path, dtype, format):
    pruned = packed(tmp_path / "out", "llama", format, dtype)
    model = load(tmp_path / "out", attn_implementation="eager")
    assert model.dtype == dtype
    assert all(module.weight.dtype == dtype for module in sparse(model).values())
    exact = logits(copy.deepcopy(pruned).float())
    errors = [(logits(one).float() - exact).abs().max().item() for one in (model, pruned)]
    # Both round the same sums to 16 bits; only sums close to the middle between two values may go either way.
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_pretrained_takes_another_dtype(tmp_path, stored, dtype):
    packed(tmp_path / "out", dtype=stored)
    model = load(tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert {module.bits.dtype for module in sparse(model).values()} == {torch.uint8}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_save_pretrained_goes_round(tmp_path, format):
    packed(tmp_path / "out", format=format)
    model = load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    files = list((tmp_path / "again").glob("model-*.safetensors"))
    assert len(files) > 1
    again = {key: tensor for file in files for key, tensor in load_file(file).items()}
    first = load_file(tmp_path / "out/model.safetensors")
    assert set(again) == set(first)
    assert all(torch.equal(again[key], first[key]) for key in first)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_generate_makes_the_words_of_the_pruned_model(tmp_path):
    pruned = packed(tmp_path / "out")
    ids = batch(padding=False)["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found, expected = (one.generate(ids, **options) for one in (load(tmp_path / "out"), pruned))
    assert torch.equal(found, expected)
    assert found.shape[1] > ids.shape[1]


@pytest.mark.parametrize("format", FORMATS)
def test_torch_compile_takes_the_whole_model(tmp_path, format):
    packed(tmp_path / "out", format=format)
    model = load(tmp_path / "out")
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)


def mapping(address):
    """(file, flags) of the memory mapping of this process that holds an address."""
    file, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside, file = begin <= address < end, rest[4] if len(rest) > 4 else ""
        elif inside and first == "VmFlags:":
            return file, rest
    raise LookupError(hex(address))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or native.missing() is not None,
    reason="the kernel has no transparent huge pages, or the CPU library was not built",
)
@pytest.mark.parametrize("format", FORMATS)
def test_large_packed_weights_lie_in_huge_pages(tmp_path, format):
    # 1024 x 3072 fp32 at half are 6 MB of values: more than the 2 MB below which a huge page has no room.
    pruned = packed(
        tmp_path / "out", format=format, hidden_size=1024, intermediate_size=3072, num_hidden_layers=1
    )
    model = load(tmp_path / "out", attn_implementation="eager")
    moved = 0
    for path, module in sparse(model).items():
        for name, tensor in module.stored().items():
            if tensor.nbytes >= native.HUGE_PAGE:
                file, flags = mapping(tensor.data_ptr() + tensor.nbytes // 2)
                assert "hg" in flags, (path, name)
                assert not file.endswith(".safetensors"), (path, name)
                moved += 1
        assert torch.equal(module.dense(), pruned.get_submodule(path).weight), path
    # gate, up and down at least.
    assert moved >= 3


def test_to_and_state_dict_and_copy(tmp_path):
    packed(tmp_path / "out")
    model, other = load(tmp_path / "out"), load(tmp_path / "out")
    expected = logits(model)
    state = model.state_dict()
    assert {key.rpartition(".")[2] for key in state if key.startswith(Q)} == {"weight", "bits", "offsets"}
    for module in sparse(other).values():
        module.weight.data.zero_()
    assert not torch.equal(logits(other), expected)
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {module.weight.dtype for module in sparse(half).values()} == {torch.bfloat16}
    assert logits(half).isfinite().all()
    meta = copy.deepcopy(model).to("meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert "q_proj): BitmapLinear(in_features=32, out_features=32, bias=False, kept=50.0%)" in str(model)


@pytest.mark.parametrize("second", ["cpu", "disk"])
def test_device_map(tmp_path, second):
    packed(tmp_path / "out")
    places = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "lm_head": "cpu",
    }
    places |= {"model.layers.1": second, "model.norm": "cpu"}
    model = load(tmp_path / "out", device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(load(tmp_path / "out")))


def test_the_base_model_loads_without_its_head(tmp_path):
    pruned = packed(tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert set(sparse(model)) == {path.removeprefix("model.") for path in sparse(load(tmp_path / "out"))}
    ids = batch(padding=False)["input_ids"]
    with torch.no_grad():
        found, expected = (one(ids).last_hidden_state for one in (model, pruned.model))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dequantize_makes_it_dense_again(tmp_path):
    pruned = packed(tmp_path / "out")
    model = load(tmp_path / "out")
    model.dequantize()
    assert not sparse(model)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "dense", attn_implementation="eager")), logits(pruned))


def test_sparc3_load_reads_it(tmp_path):
    from words import tokenizer

    packed(tmp_path / "out")
    tokenizer().save_pretrained(tmp_path / "out")
    assert sparse(sparc3.load(tmp_path / "out", dtype="auto").model)


LOAD = """
import sys
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sum(type(module).__name__ == "BitmapLinear" for module in model.modules()))
"""


def loading(folder, imports):
    return subprocess.run(
        [sys.executable, "-c", LOAD.format(imports=imports), str(folder)], capture_output=True, text=True
    )


def test_import_sparc3_alone_is_enough_and_light(tmp_path):
    packed(tmp_path / "out")
    light = "import sparc3; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    found = loading(tmp_path / "out", light)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "14\n"


def test_without_sparc3_it_is_an_error_not_random_weights(tmp_path):
    packed(tmp_path / "out")
    found = loading(tmp_path / "out", "")
    assert found.returncode == 1
    assert found.stdout == ""
    assert "Unknown quantization type, got sparc3" in found.stderr
    assert "mismatch" in found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/smaps")
def test_a_loaded_weight_is_in_memory_once(tmp_path: Path) -> None:
    """Copied to huge pages, it leaves the pages of the mapped file, which a dense weight beside it keeps mapped."""
    file = tmp_path / "model.safetensors"
    values = torch.randint(0, 255, (3 * native.HUGE_PAGE,), dtype=torch.uint8)
    save_file({"packed": values, "dense": torch.ones(64)}, file)
    module = torch.nn.Module()
    with safe_open(file, framework="pt") as opened:
        dense, mapped = opened.get_tensor("dense"), opened.get_tensor("packed")
    module.register_buffer("packed", mapped)
    assert torch.equal(module.packed, values)
    assert resident(file) > values.nbytes
    move_to_huge_pages(module)
    assert resident(file) < values.nbytes / 8
    assert torch.equal(module.packed, values)
    assert torch.equal(mapped, values)
    assert torch.equal(dense, torch.ones(64))


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in the memory of this process."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found
