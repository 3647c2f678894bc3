"""Masks that change the kept weights: SparseGPT and repair in the sweep, applying, undoing, saving.

The references prune a deep copy for good, block after block, and hook its linears while single samples run through
the whole copy. Second moments are float64.
"""

import copy

import pytest
import torch
from test_compress import SAMPLES, bits, windows
from tiny import build, singles, state
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from sparc3.compress import Pruner, compare, prune, repair
from sparc3.errors import InputError
from sparc3.export import save_pretrained
from sparc3.families import blocks_of, prunable
from sparc3.inputs import Inputs
from sparc3.mask import Mask
from sparc3.reconstruct import least_squares, sparsegpt
from sparc3.report import tensor_sparsity
from sparc3.scores import attribute

MODELS = ["llama", "gpt2"]


def linear_inputs(model, index):
    """{name: [tokens, in]} of block ``index``, over the real tokens of SAMPLES run one by one."""
    seen, handles = {}, []
    for path, module in model.named_modules():
        if f".{index}." in path and isinstance(module, torch.nn.Linear | Conv1D):
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=f"{path}.weight": seen.setdefault(name, []).append(
                        args[0].flatten(0, -2).double()
                    )
                )
            )
    with torch.no_grad():
        for sample in (one for several in SAMPLES for one in singles(several)):
            model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def naive(model, change):
    """{name: values as stored}; change: (name, dense [out, in], inputs) -> [out, in]."""
    pruned, values = copy.deepcopy(model), {}
    for index in range(len(blocks_of(model))):
        for name, x in linear_inputs(pruned, index).items():
            transposed = isinstance(pruned.get_submodule(name.rpartition(".")[0]), Conv1D)
            stored = pruned.get_parameter(name).data
            new = change(name, stored.mT if transposed else stored, x)
            values[name] = new.mT if transposed else new
        # Only now: the inputs of a whole block are taken while it is dense.
        for name in values:
            pruned.get_parameter(name).data.copy_(values[name])
    return values


def close(mask, expected):
    for name, value in expected.items():
        kept = value != 0
        # Sums over 27 tokens in fp32 make pairs of almost equal saliency change places, and what follows with them.
        assert (mask.kept(name) == kept).float().mean() > 0.99, name
        both = kept & mask.kept(name)
        # Solutions of systems of condition up to 1e3 from moments that are off by 1e-6.
        difference = (mask.values[name] - value)[both].abs()
        assert difference.quantile(0.95) < 5e-3 * value.abs().max(), name
        assert not mask.values[name][~mask.kept(name)].any()


@pytest.mark.parametrize("pattern", ["layer", "row", "2:4"])
@pytest.mark.parametrize("name", MODELS)
def test_sparsegpt_block_after_block(name, pattern):
    model = build(name)
    before = state(model)
    mask = prune(model, SAMPLES, "sparsegpt", 0.5, pattern)
    assert state(model) == before
    assert mask.sparsity == pytest.approx(0.5, abs=0.01)
    assert mask.settings["updates"] == "sparsegpt"
    assert mask.settings["schedule"] == "sequential"
    expected = naive(model, lambda name, w, x: sparsegpt(w, (x.T @ x).float(), 0.5, pattern)[1])
    assert list(mask.bits) == list(mask.values) == list(prunable(model))
    close(mask, expected)


@pytest.mark.parametrize("method", ["lrp", "wanda", "magnitude"])
@pytest.mark.parametrize("name", MODELS)
def test_repair(name, method):
    model = build(name)
    before = state(model)
    mask = prune(model, SAMPLES, method, 0.5, repair=True)
    assert state(model) == before
    assert mask.settings["updates"] == "least squares"
    if method != "wanda":
        # One-shot: the mask is what it is without repair.
        assert bits(mask) == bits(prune(model, SAMPLES, method, 0.5))
    weights = prunable(model)

    def change(name, w, x):
        kept = weights[name].canonical(mask.kept(name))
        tokens = torch.tensor(float(len(x)))
        inputs = Inputs(x.square().sum(0).float(), tokens, (x.T @ x).float())
        return least_squares(w, kept, inputs)

    close(mask, naive(model, change))


def test_repair_brings_outputs_closer():
    model = build("llama")
    kept = {"include": ["*.1.mlp.down_proj.weight"]}
    with torch.no_grad():
        dense = [model(**batch, use_cache=False).logits for batch in SAMPLES]

    def error(mask):
        pruned = copy.deepcopy(model)
        mask.apply(pruned)
        with torch.no_grad():
            logits = [pruned(**batch, use_cache=False).logits for batch in SAMPLES]
        real = [batch["attention_mask"].bool() for batch in SAMPLES]
        return sum((a - b)[r].square().sum() for a, b, r in zip(logits, dense, real, strict=True))

    plain = prune(model, SAMPLES, "lrp", 0.5, **kept)
    repaired = prune(model, SAMPLES, "lrp", 0.5, repair=True, **kept)
    assert error(repaired) < 0.8 * error(plain)


def test_any_mask_can_be_repaired():
    model = build("gpt2")
    names = {"include": ["*.mlp.*"]}
    mask = prune(model, SAMPLES, "random", 0.4, "global", **names)
    found = repair(model, SAMPLES, mask)
    assert bits(found) == bits(mask)
    assert found.settings == mask.settings | {"updates": "least squares"}
    alike = prune(model, SAMPLES, "random", 0.4, "global", repair=True, **names)
    for name, values in alike.values.items():
        assert torch.equal(found.values[name], values)
    with pytest.raises(InputError, match="made for another model"):
        repair(build("gpt2", seed=1), SAMPLES, mask)


def test_experts_are_repaired_and_pruned_by_sparsegpt():
    model = build("mixtral")
    for mask in (prune(model, SAMPLES, "sparsegpt"), prune(model, SAMPLES, "lrp", repair=True)):
        assert list(mask.values) == list(prunable(model))
        for name, values in mask.values.items():
            assert values.shape == model.get_parameter(name).shape
            assert values.isfinite().all()
            assert not values[~mask.kept(name)].any()


def test_gblm_is_wanda_and_the_gradients_of_the_mean_loss():
    model, samples = build("llama"), [SAMPLES[1]]
    mask = prune(model, samples, "gblm", 0.5, include=["*.0.*"])
    inputs = samples[0]["input_ids"]
    squares = dict.fromkeys(mask.bits, 0.0)
    for row in inputs:
        model.zero_grad()
        model(row[None], labels=row[None], use_cache=False).loss.backward()
        for name in squares:
            squares[name] = squares[name] + model.get_parameter(name).grad.double().square()
    wanda = attribute(model, samples, "wanda", include=["*.0.*"]).tensors
    for name, square in squares.items():
        weight = model.get_parameter(name).detach().double().abs()
        score = wanda[name].double() / len(inputs) ** 0.5 + 100 * weight * square.sqrt()
        order = score.argsort(1)[:, : score.shape[1] // 2]
        kept = torch.ones_like(score, dtype=torch.bool).scatter(1, order, False)
        assert torch.equal(mask.kept(name), kept), name


@pytest.mark.parametrize("allocate", ["owl", "relevance"])
@pytest.mark.parametrize("method", ["lrp", "wanda", "sparsegpt", "magnitude"])
def test_allocation(method, allocate):
    model = build("llama")
    mask = prune(model, SAMPLES, method, 0.5, "layer", allocate=allocate)
    budgets = mask.settings["budgets"]
    assert mask.settings["allocate"] == allocate
    assert len(set(budgets.values())) > 1
    assert mask.sparsity == pytest.approx(0.5, abs=2e-3)
    for name, row in tensor_sparsity(mask).items():
        assert row["requested"] == budgets[name]
        assert row["achieved"] == pytest.approx(budgets[name], abs=0.5 / mask.kept(name).numel() + 1e-9)


@pytest.mark.parametrize("pattern", ["row", "layer"])
@pytest.mark.parametrize("allocate", ["uniform", "owl", "relevance"])
@pytest.mark.parametrize("repair", [False, True])
def test_progress_is_all_samples_as_often_as_told(pattern, allocate, repair):
    model = build("llama")
    for method in ("lrp", "wanda", "gblm", "sparsegpt", "magnitude"):
        pruner, steps = Pruner(model, SAMPLES, pattern, allocate=allocate, repair=repair), []
        pruner.mask(method, 0.5, steps.append)
        assert sum(steps) == 5 * pruner.passes(method), method


def test_methods_share_scores_and_give_what_each_gives_alone():
    model = build("llama")
    options = {"allocate": "relevance", "pattern": "layer"}
    for row, mask in compare(model, SAMPLES, windows(), ["gblm", "lrp", "wanda"], (0.3, 0.6), **options):
        alone = prune(model, SAMPLES, row["method"], mask.settings["sparsity"], **options)
        assert bits(mask) == bits(alone)


# Applying, undoing, saving


@pytest.fixture(scope="module")
def updated():
    model = build("gpt2")
    return model, prune(model, SAMPLES, "sparsegpt", 0.5, "layer")


def test_apply_and_undo(updated):
    model, mask = copy.deepcopy(updated[0]), copy.deepcopy(updated[1])
    before = state(model)
    mask.apply(model, keep=True)
    for name, values in mask.values.items():
        assert torch.equal(model.get_parameter(name), values)
    mask.undo(model)
    assert state(model)[1] == before[1]


def test_saved_models_have_the_new_values_and_saved_masks_say_that_they_lack_them(updated, tmp_path):
    model, mask = copy.deepcopy(updated[0]), copy.deepcopy(updated[1])
    before = state(model)[1]
    save_pretrained(model, mask, tmp_path / "pruned")
    assert state(model)[1] == before
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for name, values in mask.values.items():
        assert torch.equal(saved.get_parameter(name), values)
    found = Mask.load(tmp_path / "pruned" / "mask.safetensors")
    assert found.updates == "sparsegpt"
    assert bits(found) == bits(mask)
    with pytest.raises(InputError, match="sparsegpt changed the kept weights too"):
        found.apply(model)
    with pytest.raises(InputError, match="sparsegpt changed the kept weights too"):
        save_pretrained(model, found, tmp_path / "again")
    assert state(model)[1] == before
    assert not (tmp_path / "again").exists()
    # On the pruned model nothing is left to do.
    save_pretrained(saved, found, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(again.get_parameter(name), values) for name, values in mask.values.items())
    with pytest.raises(InputError, match="pruned values are not known"):
        found.undo(saved)
    model.save_pretrained(tmp_path / "dense")
    found.undo(saved, tmp_path / "dense")
    for name in mask.bits:
        assert torch.equal(saved.get_parameter(name), model.get_parameter(name))


def test_a_mask_out_of_it_is_a_mask_alone(updated):
    model, mask = copy.deepcopy(updated[0]), updated[1]
    both = mask.combine(mask, "and")
    assert both.updates is None
    both.apply(model)
    for name in mask.bits:
        expected = updated[0].get_parameter(name).masked_fill(~mask.kept(name), 0)
        assert torch.equal(model.get_parameter(name), expected)
