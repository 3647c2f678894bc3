"""Damaged and foreign packed checkpoints: who is wrong, and how."""

import pytest
import torch
from packed import changed, packed
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import sparc3
from sparc3.errors import InputError

Q = "model.layers.0.self_attn.q_proj"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def drop(part):
    return lambda tensors, config: tensors.pop(f"{Q}.{part}")


def cut(tensors, config):
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"][:-3].clone()


def set_to(part, index, value):
    def damage(tensors, config):
        tensors[f"{Q}.{part}"].view(-1)[index] = value

    return damage


def flip(tensors, config):
    tensors[f"{Q}.bits"][5, 0] ^= 1


def cast(part, dtype):
    def damage(tensors, config):
        tensors[f"{Q}.{part}"] = tensors[f"{Q}.{part}"].to(dtype)

    return damage


def entry(**changes):
    return lambda tensors, config: config["quantization_config"]["modules"][Q].update(changes)


def settings(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


def rename(tensors, config):
    modules = config["quantization_config"]["modules"]
    modules["model.layers.7.mlp.up_proj"] = modules[Q]
    tensors |= {
        f"model.layers.7.mlp.up_proj.{part}": tensors[f"{Q}.{part}"].clone()
        for part in ("weight", "bits", "offsets")
    }


@pytest.mark.parametrize(
    ("format", "damage", "message"),
    [
        ("bitmap", drop("bits"), f"{Q} is packed as bitmap and lacks its bits"),
        ("bitmap", drop("weight"), f"{Q} is packed as bitmap and lacks its weight"),
        ("nm", drop("indices"), f"{Q} is packed as nm and lacks its indices"),
        ("bitmap", cut, rf"{Q} is damaged: its weight is torch.float32 \[509\], config.json says .* \[512\]"),
        ("csr", cut, rf"{Q} is damaged: its weight is torch.float32 \[509\]"),
        ("bitmap", flip, f"{Q} is damaged: bits and offsets disagree: row 5"),
        ("bitmap", set_to("offsets", 3, 99), f"{Q} is damaged: offsets are out of order"),
        ("csr", set_to("offsets", 0, 1), f"{Q} is damaged: offsets start at 1"),
        ("csr", set_to("offsets", -1, 511), f"{Q} is damaged: offsets end at 511"),
        ("csr", set_to("indices", 1, 32), f"{Q} is damaged: indices of row 0 are not ascending below 32"),
        ("nm", set_to("indices", 0, 0), f"{Q} is damaged: indices of row 0, group 0"),
        ("bitmap", cast("weight", torch.float64), f"{Q} is damaged: its weight is torch.float64"),
        ("csr", cast("indices", torch.int32), f"{Q} is damaged: its indices is torch.int32"),
        ("bitmap", entry(format="bitmask"), f"{Q} is packed as 'bitmask', which is none of bitmap, nm, csr"),
        ("bitmap", entry(shape=[32]), f"config.json is damaged: its entry for {Q}"),
        ("bitmap", entry(nonzero=-1), f"config.json is damaged: its entry for {Q}"),
        ("bitmap", entry(blocks=4), f"config.json is damaged: its entry for {Q}"),
        ("nm", entry(n=9), f"config.json is damaged: its entry for {Q}"),
        ("bitmap", entry(shape=[64, 16]), f"{Q} is damaged|says that {Q} is"),
        ("bitmap", rename, "lists a packed model.layers.7.mlp.up_proj, and the model has no such module"),
        ("bitmap", settings(version=2), "packed in version 2 .* reads version 1: update sparc3"),
        ("bitmap", settings(version="1"), "packed in version '1' .* reads version 1"),
        ("bitmap", settings(modules=[Q]), "config.json is damaged: its quantization_config has no modules"),
        ("bitmap", settings(modules=None), "config.json is damaged: its quantization_config has no modules"),
        ("bitmap", settings(modules={Q: "bitmap"}), f"config.json is damaged: its entry for {Q}"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, format, damage, message):
    packed(tmp_path / "out", format=format)
    with changed(tmp_path / "out") as (tensors, config):
        damage(tensors, config)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "out")


def test_a_dtype_that_packed_weights_do_not_have_is_refused(tmp_path):
    packed(tmp_path / "out")
    with pytest.raises(InputError, match=r"packed weights run in .*, not torch.float8_e4m3fn"):
        load(tmp_path / "out", dtype=torch.float8_e4m3fn)


def test_a_truncated_file_is_refused(tmp_path):
    packed(tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model.safetensors: damaged or incomplete"):
        sparc3.load(tmp_path / "out")
    with pytest.raises(InputError, match=r"model.safetensors is a damaged or incomplete safetensors file"):
        load(tmp_path / "out")


def test_a_damaged_state_dict_is_refused_by_name(tmp_path):
    packed(tmp_path / "out")
    model = load(tmp_path / "out")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state[f"{Q}.bits"][0, 0] ^= 3
    with pytest.raises(InputError, match=f"{Q} is damaged: bits and offsets disagree: row 0"):
        model.load_state_dict(state)
    model = load(tmp_path / "out")
    state = model.state_dict()
    state[f"{Q}.weight"] = state[f"{Q}.weight"][1:]
    with pytest.raises(RuntimeError, match=rf"size mismatch for {Q}.weight"):
        model.load_state_dict(state)


def test_a_shard_that_is_missing_its_weight_is_refused(tmp_path):
    packed(tmp_path / "out")
    load(tmp_path / "out").save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    file = next(file for file in sorted((tmp_path / "cut").glob("model-*")) if f"{Q}.bits" in load_file(file))
    tensors = load_file(file)
    del tensors[f"{Q}.bits"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{Q} is packed as bitmap and lacks its bits"):
        load(tmp_path / "cut")
