"""Packed models on a CUDA device: they hold the order of tensor cores only, and give back what was stored.

The device is the emulation of its kernels, on tensors of the CPU.
"""

import copy

import pytest
import torch
from emulated_cuda import emulate
from packed import packed
from sparc3_kernels import packed_cuda
from tiny import batch
from transformers import AutoModelForCausalLM

from sparc3.runtime import SparseLinear


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def logits(model):
    with torch.no_grad():
        return model(**batch(), use_cache=False).logits


def sparse(model):
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def same_state(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("format", "held"), [("bitmap", {"masks", "starts"}), ("nm", {"places"})])
def test_a_model_holds_the_arranged_weights_only(tmp_path, monkeypatch, format, held):
    pruned = packed(tmp_path / "out", "llama", format, torch.bfloat16)
    before = load(tmp_path / "out")
    state = before.state_dict()
    emulate(monkeypatch)
    model = load(tmp_path / "out")
    assert sparse(model)
    for module in sparse(model):
        assert module.arranged
        assert set(dict(module.named_buffers())) == held
    exact = logits(copy.deepcopy(pruned).float())
    # As in test_quantizer: both round the same sums to 16 bits.
    errors = [(logits(one).float() - exact).abs().max().item() for one in (model, pruned)]
    assert errors[0] <= 2 * errors[1]
    for module, dense in zip(sparse(model), sparse(before), strict=True):
        assert torch.equal(module.dense(), dense.dense())
    assert same_state(model.state_dict(), state)

    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "out/model.safetensors"
    ).read_bytes()
    model.load_state_dict(state)
    assert all(module.arranged for module in sparse(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))

    # There is a kernel for fp32 on no device: cast, the stored form is held, and cast back it is arranged again.
    for module in sparse(model):  # transformers casts no quantised model as a whole
        module.float()
    assert not any(module.arranged for module in sparse(model))
    for module in sparse(model):
        module.bfloat16()
    assert all(module.arranged for module in sparse(model))
    assert same_state(model.state_dict(), state)

    monkeypatch.setattr(packed_cuda, "takes", lambda values, rows, columns: False)  # as on a CPU
    model.to("cpu")
    assert not any(module.arranged for module in sparse(model))
    assert same_state(model.state_dict(), state)


def test_what_has_no_kernel_stays_as_stored(tmp_path, monkeypatch):
    packed(tmp_path / "out", "llama", "csr", torch.bfloat16)
    emulate(monkeypatch)
    model = load(tmp_path / "out")
    assert not any(module.arranged for module in sparse(model))


def test_empty_modules_are_not_arranged_before_they_are_loaded(tmp_path, monkeypatch):
    packed(tmp_path / "out", "llama", "bitmap", torch.bfloat16)
    emulate(monkeypatch)
    model = load(tmp_path / "out")
    module = sparse(model)[0]
    stored = module.stored()
    empty = type(module)(module.packing, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    assert not empty.arranged
    empty.load_state_dict(stored)
    assert empty.arranged
    assert torch.equal(empty.dense(), module.dense())
