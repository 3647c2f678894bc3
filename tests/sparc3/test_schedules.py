"""Wanda and RIA, in one pass and block by block, against naive implementations on the plain model.

The references run the whole model on single samples without padding, with a hook on each linear; the
sequential one prunes a deep copy for good, block after block, and runs the copy again from its start each
time.
"""

import copy

import pytest
import torch
from tiny import batch, build, singles, state
from torch.nn import functional as F

from sparc3.families import blocks_of, prunable
from sparc3.schedules import activation_score, activation_scores, sweep

# Linears with and without bias, a Conv1D, experts beside a dense MLP.
MODELS = ["llama", "opt", "gpt2", "qwen3_moe"]


def sequential_masks(model, samples, method, weights, select):
    """{name: kept}, each block scored on what the pruned blocks before it hand on."""
    kept = {}

    def visit(name, inputs):
        kept[name] = select(name, activation_score(weights[name], inputs, method))
        return weights[name].canonical(weights[name].weight).masked_fill(~kept[name], 0)

    sweep(model, samples, weights, visit)
    return kept


def samples():
    """Three batches, one of them padded on both sides."""
    return [batch(), batch(2, 7, padding=False, seed=2), batch(1, 1, padding=False, seed=3)]


def norms(model, names):
    """{name: [..., in]} by running the model on every sample alone."""
    squares = dict.fromkeys(names, 0)
    handles = []

    def linear(name, module, args):
        squares[name] = squares[name] + args[0].double().flatten(0, -2).square().sum(0)

    def experts(prefix, module, args):
        x, index, _ = (tensor.double() if tensor.is_floating_point() else tensor for tensor in args)
        count = module.gate_up_proj.shape[0]
        chosen = F.one_hot(index, count).sum(1).double()  # [t, experts]: a dense mask of 0 and 1
        gate, up = torch.einsum("tk,enk->ten", x, module.gate_up_proj.double()).chunk(2, -1)
        hidden = module.act_fn(gate) * up
        for name, inputs in (("gate_up_proj", x[:, None].expand(-1, count, -1)), ("down_proj", hidden)):
            if f"{prefix}.{name}" in squares:
                squares[f"{prefix}.{name}"] += (inputs.square() * chosen[..., None]).sum(0)

    for path, module in model.named_modules():
        if f"{path}.weight" in squares:
            handles.append(
                module.register_forward_pre_hook(lambda m, args, n=f"{path}.weight": linear(n, m, args))
            )
        elif path.endswith("experts"):
            handles.append(module.register_forward_pre_hook(lambda m, args, p=path: experts(p, m, args)))
    with torch.no_grad():
        for inputs in samples():
            for sample in singles(inputs):
                model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}


def score(weight, norm, method):
    """weight [..., out, in] float64."""
    size = weight.abs()
    if method == "ria":
        size = size / size.sum(-1, keepdim=True) + size / size.sum(-2, keepdim=True)
        norm = norm.sqrt()
    return size * norm[..., None, :]


def weight_of(model, name, transposed):
    weight = model.get_parameter(name).detach().double()
    return weight.mT if transposed else weight


def half_of_each_row(name, scores):
    order = scores.argsort(dim=-1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, order[..., : scores.shape[-1] // 2], False)


@pytest.mark.parametrize("method", ["wanda", "ria"])
@pytest.mark.parametrize("name", MODELS)
def test_one_pass(name, method):
    model = build(name).train()
    weights = prunable(model)
    before = state(model)
    scores = activation_scores(model, samples(), method, weights)
    assert state(model) == before
    expected = norms(model.eval(), weights)
    assert list(scores) == list(weights)
    for key, ours in scores.items():
        theirs = score(weight_of(model, key, weights[key].transposed), expected[key], method)
        assert ours.dtype == torch.float32
        # fp32 sums of 27 squares (Wanda), over 97 absolute values (RIA), of a forward off by some 1e-6
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-5, atol=1e-6 * theirs.max().item())


@pytest.mark.parametrize("method", ["wanda", "ria"])
@pytest.mark.parametrize("name", MODELS)
def test_sequential(name, method):
    model = build(name)
    weights = prunable(model)
    before = state(model)
    kept = sequential_masks(model, samples(), method, weights, half_of_each_row)
    assert state(model) == before
    pruned, expected = copy.deepcopy(model), {}
    for index in range(2):
        of_block = [key for key in weights if f".{index}." in key]
        seen = norms(pruned, of_block)
        for key in of_block:
            transposed = weights[key].transposed
            keep = half_of_each_row(key, score(weight_of(pruned, key, transposed), seen[key], method))
            expected[key] = keep
            pruned.get_parameter(key).data[~(keep.mT if transposed else keep)] = 0
    assert list(kept) == list(weights)
    for key, keep in kept.items():
        assert torch.equal(keep, expected[key]), key


def test_sequential_differs_from_one_pass_only_after_the_first_block():
    model = build("llama")
    weights = prunable(model)
    sequential = sequential_masks(model, samples(), "wanda", weights, half_of_each_row)
    scores = activation_scores(model, samples(), "wanda", weights)
    for name, keep in sequential.items():
        same = torch.equal(keep, half_of_each_row(name, scores[name]))
        assert same == (".layers.0." in name)


def test_padding_is_ignored():
    model = build("gpt2")
    weights = prunable(model)
    padded = activation_scores(model, [batch()], "wanda", weights)
    alone = activation_scores(model, list(singles(batch())), "wanda", weights)
    for name in weights:
        torch.testing.assert_close(padded[name], alone[name], rtol=3e-5, atol=1e-6)


def test_only_the_named_weights_are_scored():
    model = build("qwen3_moe")
    some = prunable(model, include=["*.1.mlp.experts.down_proj", "*.0.self_attn.q_proj*"])
    everything = prunable(model)
    partial = activation_scores(model, samples(), "ria", some)
    whole = activation_scores(model, samples(), "ria", everything)
    assert list(partial) == list(some)
    for name in some:
        assert torch.equal(partial[name], whole[name])


def test_zero_weights_and_dead_inputs():
    model = build("llama")
    weights = prunable(model, include=["*.0.self_attn.q_proj*", "*.0.mlp.down_proj*"])
    q, down = weights
    weights[q].weight.data[3] = 0.0  # a row of zeros: RIA divides by its sum
    weights[q].weight.data[:, 5] = -0.0
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[7] = 0.0  # a hidden neuron that is always 0
    for method in ("wanda", "ria"):
        scores = activation_scores(model, samples(), method, weights)
        zero = weights[q].weight == 0
        assert scores[q][zero].isneginf().all()
        assert (scores[q][~zero] > 0).all()
        assert (scores[down][:, 7] == 0).all()
        assert scores[down].isfinite().all()


def test_experts_that_see_no_token_score_zero():
    model = build("mixtral")
    weights = prunable(model, include=["*.0.mlp.experts.*"])
    inputs = [batch(1, 1, padding=False)]  # one token, two of four experts
    for scores in activation_scores(model, inputs, "wanda", weights).values():
        assert sorted(scores.flatten(1).any(1).tolist()) == [False, False, True, True]


def test_progress_adds_up_to_the_number_of_samples():
    model = build("llama", num_hidden_layers=4)
    steps = []
    activation_scores(model, samples(), "wanda", prunable(model), steps.append)
    assert len(steps) == 4
    assert sum(steps) == 6


def test_an_exception_leaves_the_model_as_it_was():
    model = build("llama").train()
    blocks_of(model)[0].eval()  # a model may be partly in training
    before = state(model)
    weights = prunable(model)

    def fail_late(name, scores):
        if ".1." in name:
            raise KeyError(name)
        return half_of_each_row(name, scores)

    def fail_in_pruned(name, scores):
        return half_of_each_row(name, scores)[:2]  # a mask that does not fit

    for select, error in ((fail_late, KeyError), (fail_in_pruned, (RuntimeError, IndexError))):
        with pytest.raises(error):
            sequential_masks(model, samples(), "wanda", weights, select)
        assert state(model) == before


def test_the_head_is_scored_when_it_is_named():
    model = build("gemma3_text")
    weights = prunable(model, include=["lm_head.weight", "*.1.mlp.down_proj.weight"])
    scores = activation_scores(model, samples(), "wanda", weights)
    assert list(scores) == list(weights)
    expected = norms(model, weights)
    for name, ours in scores.items():
        theirs = score(weight_of(model, name, False), expected[name], "wanda")
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-5, atol=1e-6 * theirs.max().item())
    # The head sees the pruned blocks.
    kept = sequential_masks(model, samples(), "wanda", weights, half_of_each_row)
    pruned = copy.deepcopy(model)
    name = "model.layers.1.mlp.down_proj.weight"
    pruned.get_parameter(name).data[~kept[name]] = 0
    seen = norms(pruned, ["lm_head.weight"])
    theirs = score(weight_of(model, "lm_head.weight", False), seen["lm_head.weight"], "wanda")
    assert torch.equal(kept["lm_head.weight"], half_of_each_row("", theirs))
