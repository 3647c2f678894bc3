"""Masks: applied and undone bit for bit, refused for other models, whole on disk or not there at all."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sparc3_kernels.select import pack_bits
from tiny import build
from transformers import AutoModelForCausalLM
from words import tokenizer

from sparc3.errors import InputError
from sparc3.families import prunable
from sparc3.mask import VERSION, Mask, fingerprint
from sparc3.scores import attribute

UP = "model.layers.0.mlp.up_proj.weight"


def bits_of(model):
    """Every byte of a model's state, NaN payloads and signs of zeros included."""
    return {
        name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


def mask_of(model, sparsity=0.5, pattern="row", **options):
    return attribute(model, [], "random", **options).select(sparsity, pattern)


def with_odd_values(model, name):
    """Signed zeros and a subnormal where the mask may prune them."""
    weight = model.get_parameter(name)
    tiny = torch.finfo(weight.dtype).smallest_normal / 4
    weight.data.view(-1)[:6] = torch.tensor([-0.0, 0.0, tiny, -tiny, 1.5, -0.0], dtype=weight.dtype)
    return model


def by_hand(kept):
    """A mask without a fingerprint from {name: nested list of 0 and 1}."""
    tensors = {name: torch.tensor(value, dtype=torch.bool) for name, value in kept.items()}
    return Mask(
        {name: pack_bits(tensor) for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
    )


# Applying and undoing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_apply_zeroes_what_is_not_kept_and_undo_brings_it_back(name, dtype):
    model = build(name).to(dtype)
    mask = mask_of(with_odd_values(model, next(iter(prunable(model)))))
    dense = bits_of(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    mask.apply(model, keep=True)
    for key, tensor in model.state_dict().items():
        if key not in mask.bits:
            assert torch.equal(tensor, before[key])
            continue
        kept = mask.kept(key)
        assert torch.equal(tensor[kept].view(torch.int8), before[key][kept].view(torch.int8))
        pruned = tensor[~kept].contiguous()
        assert not pruned.view(torch.uint8).any()  # +0, not -0
    zeros = sum(int((model.get_parameter(key) == 0).sum()) for key in mask.bits)
    assert zeros >= mask.total * mask.sparsity
    mask.undo(model)
    assert bits_of(model) == dense


@pytest.mark.parametrize("shard", ["5MB", "20KB"])
@pytest.mark.parametrize(
    ("name", "stored", "loaded", "tied"),
    [
        ("llama", "float32", "float32", True),  # a tied head is not in the file
        ("llama", "bfloat16", "bfloat16", False),
        ("llama", "bfloat16", "float32", False),  # widened when loaded
        ("llama", "float32", "bfloat16", False),  # rounded when loaded
        ("gpt2", "float32", "float32", True),
        ("gpt_neox", "float16", "float16", False),  # the head has another name in the file
        ("mixtral", "bfloat16", "bfloat16", False),  # experts are stored one by one
    ],
)
def test_undo_from_the_named_base(tmp_path, name, stored, loaded, tied, shard):
    base = tmp_path / "base"
    made = build(name, tie_word_embeddings=tied).to(getattr(torch, stored))
    made.save_pretrained(base, max_shard_size=shard)
    tokenizer().save_pretrained(base)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, loaded))
    dense = bits_of(model)
    mask = mask_of(model, include=["*"])
    assert any("head" in key for key in mask.bits)
    mask.save(base / "mask.safetensors")  # a file beside the weights that is none of them
    mask.apply(model)
    assert bits_of(model) != dense
    with pytest.raises(InputError, match="give the checkpoint that the mask was made from"):
        mask.undo(model)
    Mask.load(base / "mask.safetensors").undo(model, base)
    assert bits_of(model) == dense


def test_undo_refuses_a_base_that_is_not_the_masks(tmp_path):
    model, other = build("llama"), build("llama", seed=1)
    other.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    mask = mask_of(model)
    mask.apply(model)
    pruned = bits_of(model)
    with pytest.raises(InputError, match=r"made for another model: .* its values differ"):
        mask.undo(model, tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        mask.undo(model, tmp_path / "nothing" / "is" / "here")
    assert bits_of(model) == pruned


def test_values_are_kept_for_one_undo():
    model = build("llama")
    mask = mask_of(model)
    mask.apply(model, keep=True)
    mask.undo(model)
    with pytest.raises(InputError, match="not known"):
        mask.undo(model)
    mask.apply(model)
    with pytest.raises(InputError, match="not known"):
        mask.undo(model)


def test_a_mask_that_is_applied_is_not_applied_again_and_loses_no_values():
    model = build("llama")
    dense, mask = bits_of(model), mask_of(model)
    mask.apply(model, keep=True)
    with pytest.raises(InputError, match=r"values differ \(a model that is already pruned differs too"):
        mask.apply(model, keep=True)
    mask.undo(model)
    assert bits_of(model) == dense


def test_tied_weights_are_one_tensor():
    model = build("llama", tie_word_embeddings=True)
    mask = mask_of(model, include=["lm_head.weight"])
    dense = bits_of(model)
    mask.apply(model, keep=True)
    embedding = model.get_input_embeddings().weight
    assert embedding is model.lm_head.weight
    assert not embedding[~mask.kept("lm_head.weight")].any()
    mask.undo(model)
    assert bits_of(model) == dense


# Another model is refused, and left alone


def changed(change):
    model = build("llama")
    change(model)
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: build("llama", intermediate_size=64),
            r"gate_proj\.weight is \[64, 32\] here, \[48, 32\] there",
        ),
        (lambda: build("llama", num_hidden_layers=1), r"this one has no weight model\.layers\.1\."),
        (lambda: build("opt"), r"this one has no weight model\.layers\.0\."),
        (
            lambda: build("llama").bfloat16(),
            r"its dtype is bfloat16, the mask expects float32; load .*--dtype",
        ),
        (lambda: build("llama", seed=1), "its values differ"),
        (lambda: changed(lambda model: model.get_parameter(UP).data[-1, -1].mul_(-1)), f"{UP} differs"),
    ],
)
def test_another_model_is_refused(other, message):
    mask, model = mask_of(build("llama")), other()
    before = bits_of(model)
    for keep in (False, True):
        with pytest.raises(InputError, match=message):
            mask.apply(model, keep=keep)
    assert bits_of(model) == before


def test_weights_outside_the_mask_may_differ():
    model = build("llama")
    mask = mask_of(model, include=[UP])
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data.zero_()
    mask.apply(model)


def test_the_fingerprint_samples_evenly_or_reads_all():
    weight = torch.zeros(1000, 1000)
    sampled, full = (fingerprint(torch.nn.Module(), {"w": weight}, whole) for whole in (False, True))
    assert sampled["tensors"]["w"]["shape"] == [1000, 1000]
    assert sampled["tensors"]["w"]["dtype"] == "float32"
    assert json.loads(json.dumps(sampled)) == sampled
    weight[500, 100:117] = 1  # 64 KiB are 16384 values of 10^6: any 62 in a row hold one, 17 may not
    assert fingerprint(torch.nn.Module(), {"w": weight}, True) != full
    weight[700, 200:262] = 1
    assert fingerprint(torch.nn.Module(), {"w": weight}) != sampled


def test_the_fingerprint_does_not_depend_on_strides():
    weight = torch.randn(6, 7)
    one, two = (
        fingerprint(torch.nn.Module(), {"w": tensor}) for tensor in (weight, weight.mT.contiguous().mT)
    )
    assert one == two


# Files


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = build("mixtral")
    mask = mask_of(model, 0.3, "layer")
    path = tmp_path / "mask.safetensors"
    mask.save(path)
    found = Mask.load(path)
    assert (found.shapes, found.fingerprint, found.settings) == (mask.shapes, mask.fingerprint, mask.settings)
    assert all(torch.equal(found.bits[name], mask.bits[name]) for name in mask.bits)
    assert list(found.bits) == list(mask.bits)
    assert repr(found) == repr(mask)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.safetensors"]
    found.apply(model)
    assert sum(int((model.get_parameter(name) == 0).sum()) for name in mask.bits) == sum(
        math.floor(0.3 * math.prod(shape) + 0.5) for shape in mask.shapes.values()
    )


def test_the_format_is_what_the_module_says(tmp_path):
    kept = {"a": [[1, 0, 1], [0, 0, 1], [1, 1, 0]], "b": [[[1, 0]]]}
    mask = by_hand(kept)
    mask.save(tmp_path / "m")
    stored = load_file(tmp_path / "m")
    # Element i at bit i & 7 of byte i >> 3: 101001 11|0 -> 0b11100101 with the first on the right, then 0.
    assert stored["a"].tolist() == [0b11100101, 0]
    assert stored["b"].tolist() == [0b01]
    with safe_open(tmp_path / "m", framework="pt") as file:
        header = json.loads(file.metadata()["sparc3_mask"])
    assert header["version"] == VERSION == 1
    assert header["shapes"] == {"a": [3, 3], "b": [1, 1, 2]}
    assert (mask.total, mask.sparsity) == (11, pytest.approx(5 / 11))


def damage(path, **changes):
    """Save the file again with a header of ``changes`` over its own; None removes a key."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sparc3_mask"]) | changes
    header = {key: value for key, value in header.items() if value is not None}
    save_file(tensors, path, metadata={"sparc3_mask": json.dumps(header)})


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "mask.safetensors"
    by_hand({"a": [[1, 0, 1, 0, 1, 0, 0, 0, 1]]}).save(path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": VERSION + 1}, r"a mask of format 2; this one reads up to 1: update sparc3"),
        ({"shapes": {"a": [1, 17]}}, r"damaged: the bits of a do not fit its shape \[1, 17\]"),
        ({"shapes": {"b": [1, 9]}}, r"damaged: the bits of b"),
        ({"shapes": None}, "is damaged"),
        ({"version": "1"}, "is damaged"),
        ({"shapes": [3]}, "is damaged"),
        ({"settings": None}, "is damaged"),
    ],
)
def test_a_header_that_does_not_fit(saved, changes, message):
    damage(saved, **changes)
    with pytest.raises(InputError, match=message):
        Mask.load(saved)


def test_files_that_are_no_masks(saved, tmp_path):
    whole = saved.read_bytes()
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(2)}, plain)
    with pytest.raises(InputError, match=r"is a safetensors file but not a mask: .*sparc3_mask"):
        Mask.load(plain)
    save_file({"a": torch.zeros(2)}, plain, metadata={"sparc3_mask": "{"})
    with pytest.raises(InputError, match="is damaged"):
        Mask.load(plain)
    header = {"version": 1, "shapes": {"a": [1, 9]}, "fingerprint": {}, "settings": {}}
    save_file({"a": torch.zeros(2)}, plain, metadata={"sparc3_mask": json.dumps(header)})
    with pytest.raises(InputError, match="damaged: the bits of a"):
        Mask.load(plain)
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"cannot read a mask from {re.escape(str(saved))}"):
            Mask.load(saved)
    with pytest.raises(InputError, match="cannot read a mask from"):
        Mask.load(tmp_path / "none")
    with pytest.raises(InputError, match=r"it is a folder; give .*/mask.safetensors"):
        Mask.load(tmp_path)


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("where", ["save_file", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("x"), KeyboardInterrupt()]
)
def test_a_failure_leaves_no_file_and_the_old_one_alone(saved, monkeypatch, error, where, existed):
    old = saved.read_bytes()
    path = saved if existed else saved.with_name("new")

    def fail(tensors, to, **rest):
        if where == "save_file":
            Path(to).write_bytes(b"half")
        raise error

    monkeypatch.setattr("sparc3.mask.save_file" if where == "save_file" else "os.replace", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError):
        by_hand({"b": [[1]]}).save(path)
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == old


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot write the mask to"):
        by_hand({"a": [[1]]}).save(tmp_path / "none" / "mask")


# Algebra


A = {"w": [[1, 1, 0, 0, 1]], "v": [[[1, 0]], [[1, 1]]]}
B = {"w": [[1, 0, 1, 0, 1]], "v": [[[0, 0]], [[1, 0]]]}


def test_algebra_is_that_of_sets():
    a, b = by_hand(A), by_hand(B)
    a.settings["method"], b.settings["method"] = "lrp", "wanda"
    left, right = ({name: torch.tensor(value).bool() for name, value in kept.items()} for kept in (A, B))
    for how, expected in (("and", torch.logical_and), ("or", torch.logical_or)):
        found = a.combine(b, how)
        for name in A:
            assert torch.equal(found.kept(name), expected(left[name], right[name]))
        assert found.settings == {"combined": how, "of": [{"method": "lrp"}, {"method": "wanda"}]}
    inverted = a.invert()
    for name in A:
        assert torch.equal(inverted.kept(name), ~left[name])
        assert torch.equal(inverted.invert().bits[name], a.bits[name])
    assert inverted.sparsity == pytest.approx(1 - a.sparsity)
    assert a.diff(b) == {
        "w": {"only_here": 1, "only_there": 1, "both": 2, "neither": 1},
        "v": {"only_here": 2, "only_there": 0, "both": 1, "neither": 1},
    }
    assert (a.settings, b.settings) == ({"method": "lrp"}, {"method": "wanda"})


def test_counts_of_diff_on_a_model():
    model = build("gpt2")
    a, b = mask_of(model, 0.3, seed=1), mask_of(model, 0.7, "global", seed=2)
    for name, counts in a.diff(b).items():
        here, there = a.kept(name).numpy(), b.kept(name).numpy()
        assert counts["only_here"] == (here & ~there).sum()
        assert counts["only_there"] == (there & ~here).sum()
        assert counts["both"] == (here & there).sum()
        assert sum(counts.values()) == here.size


def test_masks_of_different_models_are_not_mixed():
    one = mask_of(build("llama"))
    for other, message in (
        (mask_of(build("llama", seed=1)), "its values differ"),
        (mask_of(build("llama").bfloat16()), "its dtype is bfloat16"),
        (mask_of(build("llama"), include=[UP]), "cover different weights"),
        (mask_of(build("llama", intermediate_size=64)), "cover different weights"),
    ):
        for mix in (one.combine, one.diff):
            with pytest.raises(InputError, match=message):
                mix(other)
    with pytest.raises(InputError, match=r"and \| or, not by 'xor'"):
        one.combine(one, "xor")
