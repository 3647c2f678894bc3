import json
import shutil
import sys
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import words
from safetensors.torch import load_file, save_file

from sparc3 import models
from sparc3.errors import InputError
from sparc3.models import cache_dir, check_finite, load

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny.build("llama").save_pretrained(path)
    words.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARC3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def change(folder, **tensors):
    """Rewrites the checkpoint; None takes a tensor out."""
    path = folder / "model.safetensors"
    state = load_file(path) | tensors
    save_file({k: v for k, v in state.items() if v is not None}, path, metadata={"format": "pt"})


def test_a_folder_is_loaded_as_it_was_saved(folder):
    loaded = load(folder)
    expected = tiny.build("llama").state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.tokenizer("né").input_ids == [words.BOS, *words.ids("né")]
    assert not loaded.model.training
    assert loaded.model.config.use_cache is True  # what is saved from it must generate as fast as before
    assert (loaded.name, loaded.origin, loaded.note) == (str(folder), str(folder), "")


def test_a_dtype_is_taken_or_the_checkpoints_kept(folder):
    tiny.build("llama").to(torch.bfloat16).save_pretrained(folder)
    for name in ("float32", "float16", "bfloat16", "float64"):
        assert load(folder, dtype=name).model.dtype == getattr(torch, name)
    assert load(folder, dtype="auto").model.dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"dtype 'fp8' is not known; use float32 \| bfloat16"):
        load(folder, dtype="fp8")


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(folder, device):
    with pytest.raises(InputError, match=f"device '{device}' cannot be used"):
        load(folder, device=device)


def test_bundled_models_lie_beside_the_package_and_one_is_the_default(folder, monkeypatch):
    monkeypatch.setattr(models, "__file__", str(folder.parent / "models.py"))
    bundled = folder.parent / "bundled" / "tiny-llama"
    shutil.copytree(folder, bundled)
    for name in (None, "tiny-llama"):
        loaded = load(name)
        assert (loaded.name, loaded.origin) == ("tiny-llama", str(bundled))
    with pytest.raises(InputError, match=r"tiny-opt: a model is a folder"):
        load("tiny-opt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"no config\.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no usable tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_file_says_which(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="no usable tokenizer"):
        load(folder)


def test_a_folder_with_only_a_gguf_file_says_to_name_it(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"name that file"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 300, -100])  # nothing, in the length, in the header, in the data
def test_a_damaged_weights_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or incomplete"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    shutil.rmtree(folder)
    tiny.build("llama").save_pretrained(folder, max_shard_size="30KB")
    words.tokenizer().save_pretrained(folder)
    assert load(folder).model.training is False
    shard = sorted(folder.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        load(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "abacus"}', '{"hidden_size": 3}', "\xff"])
def test_a_config_that_says_nothing_usable_is_refused(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json|transformers cannot load this model"):
        load(folder)


def test_weights_are_never_made_up(folder):
    change(folder, **{WEIGHT: None})
    with pytest.raises(InputError, match=f"lacks {WEIGHT}; it is incomplete"):
        load(folder)
    change(folder, **{WEIGHT: torch.ones(2, 3)})
    with pytest.raises(InputError, match="transformers cannot load this model"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_named(folder, value):
    bad = tiny.build("llama").state_dict()[WEIGHT].clone()
    bad[-1, -1] = value
    change(folder, **{WEIGHT: bad})
    with pytest.raises(InputError, match=f"NaN or Inf in {WEIGHT};"):
        load(folder)


def test_check_finite_names_five_and_counts_the_rest():
    model = tiny.build("opt")
    check_finite(model)
    for parameter in list(model.parameters())[:8]:
        parameter.data.view(-1)[0] = float("nan")
    with pytest.raises(InputError, match=r"^model: NaN or Inf in .*, .*, .*, .*, .* and 3 more;"):
        check_finite(model)


def test_weights_that_overflow_the_dtype_are_refused(folder):
    change(folder, **{WEIGHT: torch.full((48, 32), 1e5)})
    load(folder)
    with pytest.raises(InputError, match="overflows this dtype"):
        load(folder, dtype="float16")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError("no route"), r"^some/where: no such folder here; .*needs the network.*no route"),
        (huggingface_hub.errors.HFValidationError("two slashes"), "cannot be a hub id"),
    ],
)
def test_a_name_that_is_nowhere_says_what_was_tried(monkeypatch, failure, message):
    def model_info(self, name, timeout):
        raise failure

    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *name: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(InputError, match=message):
        load("some/where")


def test_a_hub_model_on_this_machine_needs_no_network(folder, monkeypatch):
    asked = []

    def from_pretrained(source, **options):
        asked.append(source)
        return original(folder, **options)

    original, original_config = models.AutoModelForCausalLM.from_pretrained, tiny.build("llama").config
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *name: "/somewhere/config.json")
    monkeypatch.setattr(
        models, "AutoConfig", SimpleNamespace(from_pretrained=lambda *_, **__: original_config)
    )
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(
        models.AutoTokenizer, "from_pretrained", lambda source, **options: asked.append(source)
    )
    assert load("some/where").origin == "some/where"
    assert asked == ["some/where"] * 2


@pytest.mark.parametrize(("variable", "expected"), [("SPARC3_CACHE", "{}"), ("XDG_CACHE_HOME", "{}/sparc3")])
def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path, variable, expected):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("SPARC3_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert str(cache_dir()) == expected.format(tmp_path)


def readable():
    """A Llama with a token for each byte and one each for "ab" and "cd": a GGUF tokenizer has merges."""
    return tiny.build("llama", vocab_size=words.VOCABULARY + 2)


def write_gguf(path, model):
    """A Llama as llama.cpp writes it: q and k permuted from half-split to interleaved rotary pairs."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = ["<pad>", "<s>", "</s>", *words.symbols(), "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 258)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(words.BOS)
    writer.add_eos_token_id(words.EOS)
    writer.add_pad_token_id(words.PAD)
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            head_dim = config.hidden_size // config.num_attention_heads
            tensor = tensor.view(-1, 2, head_dim // 2, config.hidden_size).transpose(1, 2)
            tensor = tensor.reshape(-1, config.hidden_size)
        stored = mapping.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, readable())
    return path


def test_a_gguf_file_gives_the_weights_that_were_written(gguf_file, cache):
    loaded = load(gguf_file)
    expected = readable().state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert loaded.tokenizer("né\nab", add_special_tokens=False).input_ids == [
        *words.ids("né\n"),
        words.VOCABULARY,
    ]
    assert loaded.tokenizer.bos_token_id == words.BOS
    assert (loaded.origin, loaded.note) == (str(gguf_file), "dequantised from GGUF F32")
    folders = list((cache / "gguf").iterdir())
    assert [folder.name for folder in folders] == [models.file_sha256(gguf_file)]
    assert "quantization_config" not in json.loads((folders[0] / "config.json").read_text())


def test_a_gguf_file_is_converted_once_whatever_its_name(gguf_file, cache, monkeypatch):
    folder = models.convert_gguf(gguf_file)
    moved = gguf_file.rename(gguf_file.with_name("other.GGUF"))
    monkeypatch.setitem(sys.modules, "gguf", None)  # a conversion would fail
    assert models.convert_gguf(moved) == folder
    assert load(moved).note == "dequantised from GGUF F32"


def test_a_conversion_that_fails_leaves_nothing(gguf_file, cache, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.Path, "write_text", full)
    with pytest.raises(InputError, match=r"No space left on device.*SPARC3_CACHE"):
        load(gguf_file)
    assert list((cache / "gguf").iterdir()) == []


def test_what_is_no_gguf_file_is_refused(tmp_path, cache, gguf_file, monkeypatch):
    with pytest.raises(InputError, match="no such GGUF file"):
        load(tmp_path / "none.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK\3\4")
    with pytest.raises(InputError, match="not a GGUF file"):
        load(tmp_path / "other.gguf")
    gguf_file.write_bytes(gguf_file.read_bytes()[:3000])
    with pytest.raises(InputError, match="cannot read this GGUF file"):
        load(gguf_file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'sparc3\[gguf\]'"):
        load(gguf_file)
    assert not cache.exists()
