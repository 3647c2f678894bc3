"""Weights read block by block from a checkpoint, against the model that transformers loads whole."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, batch, build
from transformers import AutoModelForCausalLM

from sparc3.checkpoint import INDEX, Checkpoint, write_tensors
from sparc3.engine import Blocks
from sparc3.errors import InputError
from sparc3.families import blocks_of
from sparc3.weights import OUTSIDE, Streamed, empty_model

CPU = torch.device("cpu")


def save(folder, name="llama", shards="1GB", **changes):
    model = build(name, "eager" if name == "gemma2" else "sdpa", **changes)
    model.save_pretrained(folder, max_shard_size=shards)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def parameters(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def is_empty(model):
    return all(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_and_what_is_outside_have_the_bits_of_the_whole_model(name, tied, tmp_path):
    whole = save(tmp_path, name, "20KB", tie_word_embeddings=tied)
    empty = empty_model(tmp_path)
    assert is_empty(empty)
    for (path, one), (other, two) in zip(whole.named_buffers(), empty.named_buffers(), strict=True):
        assert path == other
        assert two.is_meta or torch.equal(one, two), path
    source = Streamed(empty, Checkpoint(tmp_path), CPU)
    seen = []
    for index in source.visit([1, 0]):
        seen.append(index)
        expected = blocks_of(whole)[index].state_dict()
        for path, tensor in blocks_of(empty)[index].state_dict().items():
            assert torch.equal(tensor, expected[path])
        assert not any(parameter.requires_grad for parameter in blocks_of(empty)[index].parameters())
    assert seen == [1, 0]
    assert is_empty(empty)
    with source.outside():
        for path, tensor in empty.state_dict().items():
            inside = any(
                path.startswith(f"{prefix}.") for prefix, m in empty.named_modules() if m is blocks_of(empty)
            )
            assert tensor.is_meta if inside else torch.equal(tensor, whole.state_dict()[path]), path
        assert (empty.get_output_embeddings().weight is empty.get_input_embeddings().weight) == tied
    assert is_empty(empty)


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "opt-post", "qwen3_moe"])
def test_a_streamed_model_gives_the_same_logits(name, prefetch, tmp_path):
    whole = save(tmp_path, name)
    inputs = batch()
    source = Streamed(empty_model(tmp_path), Checkpoint(tmp_path), CPU, prefetch)
    blocks = Blocks(source.model, source)
    with torch.no_grad():
        with source.outside():
            hidden, calls = blocks.record(inputs)
        for index in source.visit(range(2)):
            hidden = blocks.run(index, hidden, calls[index])
        with source.outside():
            logits = blocks.logits(hidden, inputs, torch.arange(12))
        same = Blocks(whole)
        hidden, calls = same.record(inputs)
        for index in range(2):
            hidden = same.run(index, hidden, calls[index])
        expected = same.logits(hidden, inputs, torch.arange(12))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_dtypes_are_those_of_a_whole_load(dtype, tmp_path):
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted)
    source = Streamed(empty_model(tmp_path, dtype), Checkpoint(tmp_path), CPU)
    for _ in source.visit([1]):
        for path, tensor in blocks_of(source.model)[1].state_dict().items():
            assert torch.equal(tensor, blocks_of(whole)[1].state_dict()[path])
            assert tensor.dtype == whole.dtype


@pytest.mark.parametrize("prefetch", [True, False])
def test_at_most_two_blocks_are_held_and_none_after_an_exception(prefetch, tmp_path):
    save(tmp_path, num_hidden_layers=5)
    source = Streamed(empty_model(tmp_path), Checkpoint(tmp_path), CPU, prefetch)

    def held():
        return sum(not next(iter(block.parameters())).is_meta for block in blocks_of(source.model))

    for _ in source.visit(range(5)):
        assert 1 <= held() <= 1 + prefetch

    def fail():
        for index in source.visit(range(4, -1, -1)):
            if index == 3:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_empty(source.model)


# Bad checkpoints


def test_a_shard_that_is_missing_is_named(tmp_path):
    save(tmp_path, shards="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: this shard is missing"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_shard_that_is_cut_off_is_named(keep, tmp_path):
    save(tmp_path, shards="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError, match=f"{shard.name}: damaged or incomplete safetensors file"):
        Checkpoint(tmp_path)


def test_a_shard_that_shrinks_later_is_an_error(tmp_path):
    save(tmp_path)
    source = Streamed(empty_model(tmp_path), Checkpoint(tmp_path), CPU)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:30000])
    with pytest.raises(InputError, match=r"ends \d+ bytes too early"):
        list(source.visit([0, 1]))


def edit_index(folder, change):
    index = folder / INDEX
    content = json.loads(index.read_text())
    text = change(content["weight_map"])
    index.write_text(text if text is not None else json.dumps(content))


def test_an_index_that_names_a_tensor_twice(tmp_path):
    save(tmp_path, shards="20KB")
    name = "model.layers.0.mlp.up_proj.weight"

    def change(weight_map):
        pairs = [*weight_map.items(), (name, "model-00001-of-00002.safetensors")]
        return '{"weight_map": {' + ",".join(f'"{key}": "{file}"' for key, file in pairs) + "}}"

    edit_index(tmp_path, change)
    with pytest.raises(InputError, match=f"{name} is named twice"):
        Checkpoint(tmp_path)


def test_two_shards_that_hold_a_tensor(tmp_path):
    save(tmp_path, shards="20KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    with safe_open(first, "pt") as file:
        name = next(iter(file.keys()))
        tensor = file.get_tensor(name)
    save_file({**load_file(second), name: tensor}, second)
    with pytest.raises(InputError, match=f"{name} is in two shards|{name} is said to be in"):
        Checkpoint(tmp_path)


def test_an_index_that_is_wrong_about_a_tensor(tmp_path):
    save(tmp_path, shards="20KB")
    edit_index(tmp_path, lambda names: names.update({"model.norm.weight": min(names.values())}))
    with pytest.raises(InputError, match=r"model\.norm\.weight is said to be in"):
        Checkpoint(tmp_path)
    edit_index(tmp_path, lambda names: names.pop("model.norm.weight") and None)
    edit_index(tmp_path, lambda names: names.update({"model.extra": min(names.values())}))
    with pytest.raises(InputError, match=r"model\.extra is in none of the shards"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none(text, tmp_path):
    save(tmp_path, shards="20KB")
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match="not an index of shards"):
        Checkpoint(tmp_path)


def test_no_safetensors(tmp_path):
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("inf")),
            "NaN or Inf in model.layers.1.mlp.up",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 32)}),
            r"up_proj.weight is \[2, 32\], but config.json says \[48, 32\]",
        ),
    ],
)
def test_weights_that_are_not_as_they_should_be(change, message, tmp_path):
    save(tmp_path)
    rewrite(tmp_path, change)
    source = Streamed(empty_model(tmp_path), Checkpoint(tmp_path), CPU)

    def read_all():
        list(source.visit([0, 1]))
        with source.outside():
            pass

    with pytest.raises(InputError, match=message):
        read_all()
    assert is_empty(source.model)


def test_models_that_cannot_be_made(tmp_path):
    with pytest.raises(InputError, match="transformers cannot make this model"):
        empty_model(tmp_path)
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="quantised checkpoint"):
        empty_model(tmp_path)


# Writing


def test_what_is_written_piece_by_piece_is_read_by_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "bits": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
    }
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with (tmp_path / "model.safetensors").open("wb") as file:
        write_tensors(file, shapes, iter(tensors.values()), {"format": "pt", "what": 'a "word"'})
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    ours = Checkpoint(tmp_path).tensors
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(ours[name].read(), tensor)
        assert ours[name].read().dtype == tensor.dtype
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "what": 'a "word"'}


def test_groups_follow_the_names_in_the_checkpoint(tmp_path):
    save(tmp_path, "gpt2")
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "copy")
    rewrite(
        tmp_path,
        lambda t: [t.update({name.removeprefix("transformer."): t.pop(name)}) for name in list(t)],
    )
    source = Streamed(empty_model(tmp_path), Checkpoint(tmp_path), CPU)
    assert set(source.groups) == {0, 1, OUTSIDE}
    assert all(name.startswith("h.1.") for name in source.groups[1])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    for index in source.visit([1]):
        for path, tensor in blocks_of(source.model)[index].state_dict().items():
            assert torch.equal(tensor, blocks_of(whole)[index].state_dict()[path])
