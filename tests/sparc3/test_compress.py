"""`prune` and `compare` against the same work done by hand: a naive sequential Wanda, and prune, apply, measure.

The naive Wanda follows the published script (wanda, lib/prune.py): hooks collect the inputs of every linear of one
block while the samples run through a model whose earlier blocks are already pruned for good, then the block is
pruned, and the next one is observed on what comes out. Sums and scores are float64.
"""

import copy
import math
from functools import partial

import pytest
import torch
from scipy import stats
from tiny import VOCABULARY, batch, build, singles, state

import sparc3.compress
from sparc3.compress import DEFAULTS, compare, default_settings, evaluate_pruned, prune
from sparc3.errors import InputError
from sparc3.families import blocks_of, prunable
from sparc3.scores import METHODS, attribute

# Plain linears; Conv1D; a dense block before one of fused experts.
MODELS = ["llama", "gpt2", "qwen3_moe"]
SAMPLES = [batch(), batch(2, 7, padding=False, seed=2)]


def windows(count=6, length=12, seed=11):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def bits(mask):
    return {name: tensor.tolist() for name, tensor in mask.bits.items()}


# Sequential Wanda and RIA


def input_norms(model, index):
    """{name: [..., in]} of block ``index``'s weights, over the real tokens of SAMPLES run one by one."""
    squares, handles = {}, []

    def of_linear(module, args, name):
        squares[name] = squares.get(name, 0) + args[0].flatten(0, -2).double().square().sum(0)

    def of_experts(module, args, path):
        x, chosen = args[0].double(), args[1]
        for expert in range(len(module.down_proj)):
            routed = x[(chosen == expert).any(1)]
            gate, up = (routed @ module.gate_up_proj[expert].double().T).chunk(2, 1)
            for kind, rows in (("gate_up_proj", routed), ("down_proj", module.act_fn(gate) * up)):
                total = squares.setdefault(f"{path}.{kind}", [0] * len(module.down_proj))
                total[expert] = total[expert] + rows.square().sum(0)

    for path, module in model.named_modules():
        if f".{index}." in path and path.endswith("experts"):
            handles.append(module.register_forward_pre_hook(partial(of_experts, path=path)))
        elif f".{index}." in path and type(module).__name__ in ("Linear", "Conv1D"):
            handles.append(module.register_forward_pre_hook(partial(of_linear, name=f"{path}.weight")))
    with torch.no_grad():
        for sample in (one for several in SAMPLES for one in singles(several)):
            model(**sample, use_cache=False)
    for handle in handles:
        handle.remove()
    return {
        name: (torch.stack(total) if isinstance(total, list) else total).sqrt()
        for name, total in squares.items()
    }


def naive_sequential(model, method, choose):
    """{name: kept as stored}; choose: scores [..., out, in] float64 -> kept."""
    model, kept = copy.deepcopy(model), {}
    for index in range(len(blocks_of(model))):
        for name, norm in input_norms(model, index).items():
            transposed = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
            stored = model.get_parameter(name).data
            weight = (stored.mT if transposed else stored).double().abs()
            if method == "ria":
                weight = weight / weight.sum(-1, keepdim=True) + weight / weight.sum(-2, keepdim=True)
                norm = norm.sqrt()
            keep = choose(weight * norm[..., None, :])
            kept[name] = keep.mT if transposed else keep
            stored.masked_fill_(~kept[name], 0)
    return kept


def lowest(scores, size, share):
    """Keep all but the floor(share n + 1/2) lowest of each ``size`` consecutive scores."""
    groups = scores.reshape(-1, size)
    gone = groups.argsort(1)[:, : math.floor(share * size + 0.5)]
    return torch.ones_like(groups, dtype=torch.bool).scatter(1, gone, False).view_as(scores)


CHOICES = {
    ("row", 0.6): lambda scores: lowest(scores, scores.shape[-1], 0.6),
    ("layer", 0.3): lambda scores: lowest(scores, scores.numel(), 0.3),
    ("2:4", None): lambda scores: lowest(scores, 4, 0.5),
}


@pytest.mark.parametrize("method", ["wanda", "ria"])
@pytest.mark.parametrize(("pattern", "sparsity"), CHOICES)
@pytest.mark.parametrize("name", MODELS)
def test_wanda_and_ria_prune_block_after_block(name, pattern, sparsity, method):
    model = build(name)
    before = state(model)
    mask = prune(model, SAMPLES, method, sparsity, pattern)
    assert state(model) == before
    expected = naive_sequential(model, method, CHOICES[pattern, sparsity])
    assert list(mask.bits) == list(prunable(model))
    assert set(expected) == set(mask.bits)
    for key, keep in expected.items():
        assert torch.equal(mask.kept(key), keep), key
    assert mask.settings == {
        "method": method,
        "schedule": "sequential",
        "sparsity": 0.5 if sparsity is None else sparsity,
        "pattern": pattern,
        "by": "magnitude",
    }
    mask.apply(model)  # its fingerprint is the dense model's


def test_a_threshold_over_the_model_is_found_on_the_dense_one():
    model = build("llama")
    for method in ("wanda", "ria"):
        mask = prune(model, SAMPLES, method, 0.4, "global")
        assert bits(mask) == bits(attribute(model, SAMPLES, method).select(0.4, "global"))
        assert mask.settings["schedule"] == "one-shot"


# One-shot


@pytest.mark.parametrize("pattern", ["row", "layer", "global", "2:4", "1:4"])
def test_the_defaults_are_the_patterns(pattern):
    model = build("llama")
    settings = DEFAULTS["N:M" if ":" in pattern else pattern]
    assert default_settings(pattern) == settings
    for method in ("lrp", "gradient"):
        mask = prune(model, SAMPLES, method, pattern=pattern)
        expected = attribute(model, SAMPLES, method, **settings)
        assert bits(mask) == bits(expected.select(None if ":" in pattern else 0.5, pattern))
        assert mask.settings == expected.settings | {
            "schedule": "one-shot",
            "sparsity": 0.75 if pattern == "1:4" else 0.5,
            "pattern": pattern,
            "by": "magnitude",
        }


def test_defaults_are_copies_and_lrp_has_a_rule_on():
    default_settings("row")["rule"] = "changed"
    assert default_settings("row")["rule"] != "changed"
    model = build("llama")
    for pattern in DEFAULTS:
        mask = prune(model, SAMPLES, "lrp", pattern="2:4" if pattern == "N:M" else pattern)
        assert mask.settings["rule"] != "gradient"


def test_settings_go_over_the_defaults():
    model = build("gpt2")
    given = {
        "rule": "attnlrp",
        "target": "logit",
        "positions": "last",
        "reduce": "signed",
        "skip_first": True,
    }
    mask = prune(model, SAMPLES, "lrp", 0.3, "layer", **given)
    assert bits(mask) == bits(attribute(model, SAMPLES, "lrp", **given).select(0.3, "layer"))
    assert given.items() <= mask.settings.items()
    assert bits(prune(model, [], "random", 0.3, seed=5)) == bits(
        attribute(model, [], "random", seed=5).select(0.3)
    )


@pytest.mark.parametrize("method", METHODS)
def test_only_the_named_weights_are_pruned_and_progress_adds_up(method):
    model, steps = build("llama"), []
    before = state(model)
    names = {"include": ["*.mlp.*", "*q_proj*"], "exclude": ["*.1.*"]}
    mask = prune(model, SAMPLES, method, 0.25, progress=steps.append, **names)
    assert list(mask.bits) == list(prunable(model, **names))
    assert mask.sparsity == 0.25
    assert sum(steps) == (0 if method in ("magnitude", "random") else 5)
    assert state(model) == before


# compare


@pytest.mark.parametrize("pattern", ["row", "global", "2:4"])
def test_compare_is_prune_apply_and_measure(pattern):
    model, judged = build("llama"), windows()
    before, told = state(model), []
    sparsities = (None,) if pattern == "2:4" else (0.3, None)
    found = []
    for row, mask in compare(model, SAMPLES, judged, METHODS, sparsities, pattern, progress=told.append):
        assert state(model) == before  # whenever the iterator rests
        found.append((row, mask))
    order = ["wanda", "lrp", "gradient", "ria", "magnitude", "random"]
    shares = [0.5] if pattern == "2:4" else [0.3, 0.5]
    assert [row["method"] for row, _ in found] == [method for method in order for _ in shares]
    assert told == [
        f"{method} {share:.0%}: {step}"
        for method in order
        for share in shares
        for step in ("scoring", "evaluating")
    ]
    losses = {}
    for (row, mask), share in zip(found, shares * len(order), strict=True):
        method = row["method"]
        assert row["pattern"] == pattern
        assert row["sparsity"] == mask.sparsity == pytest.approx(share, abs=0.02)
        assert row["seconds"] > 0
        alone = prune(model, SAMPLES, method, None if pattern == "2:4" else share, pattern)
        assert bits(mask) == bits(alone)
        pruned = copy.deepcopy(model)
        alone.apply(pruned)
        with torch.no_grad():
            logits = pruned(judged, use_cache=False).logits.double()
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), judged[:, 1:], reduction="none"
        ).mean(1)
        # 4e-6 as in test_evaluate.py: fp32 logits of batches of another size, reduced in another order
        assert row["perplexity"] == pytest.approx(nll.mean().exp().item(), rel=4e-6)
        losses[method, share] = nll
        if method == "wanda":
            assert "interval" not in row
        else:
            expected = stats.ttest_rel(nll.numpy(), losses["wanda", share].numpy())
            low, high = expected.confidence_interval(0.95)
            mean = (nll - losses["wanda", share]).mean().item()
            # Differences of losses near 5 that are each off by 4e-6
            assert row["interval"] == pytest.approx([mean, low, high], abs=5e-5)


def test_without_wanda_or_with_one_window_there_is_no_interval():
    model = build("llama")
    for methods, judged in ((["magnitude", "random"], windows()), (["wanda", "magnitude"], windows(1))):
        for row, _ in compare(model, SAMPLES, judged, methods):
            assert "interval" not in row


def test_what_is_named_twice_is_done_once():
    found = compare(build("llama"), [], windows(), ["random", "random"], (0.5, None, 0.5))
    assert [(row["method"], row["sparsity"]) for row, _ in found] == [("random", 0.5)]


def test_one_attribution_serves_every_sparsity(monkeypatch):
    calls = []
    monkeypatch.setattr(
        sparc3.compress, "attribute", lambda *args, **rest: calls.append(args[2]) or attribute(*args, **rest)
    )
    found = list(compare(build("llama"), SAMPLES, windows(), ["lrp", "random"], (0.2, 0.4, 0.6)))
    assert len(found) == 6
    assert calls == ["lrp", "random"]


def test_the_weights_are_back_after_an_exception(monkeypatch):
    model = build("llama")
    model.lm_head.weight.data[0, 0] = -0.0
    before = state(model)
    mask = prune(model, [], "magnitude")
    evaluate_pruned(model, mask, windows())
    assert state(model) == before
    monkeypatch.setattr(sparc3.compress, "perplexity", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_pruned(model, mask, windows())
    assert state(model) == before
    with pytest.raises(ZeroDivisionError):
        list(compare(model, [], windows(), ["magnitude"]))
    assert state(model) == before


# Errors, before the long work


def no_work(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("work was begun")

    for name in ("attribute", "sweep", "perplexity"):
        monkeypatch.setattr(sparc3.compress, name, fail)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, "row"), r"sparsity 1\.0 is not a share"),
        ((math.nan, "global"), "sparsity nan is not a share"),
        ((-0.1, "layer"), "is not a share"),
        ((0.5, "column"), "pattern 'column' is not known"),
        ((0.4, "2:4"), "contradicts 2:4"),
        ((None, "3:5"), r"3:5 does not divide .*q_proj\.weight: its inputs are 32 wide"),
    ],
)
def test_wrong_numbers_are_refused_before_any_work(monkeypatch, method, arguments, message):
    no_work(monkeypatch)
    model, (sparsity, pattern) = build("llama"), arguments
    with pytest.raises(InputError, match=message):
        prune(model, SAMPLES, method, *arguments)
    with pytest.raises(InputError, match=message):
        next(compare(model, SAMPLES, windows(), ["magnitude", method], (sparsity,), pattern))


def test_wrong_names_are_refused_before_any_work(monkeypatch):
    no_work(monkeypatch)
    model = build("llama")
    with pytest.raises(InputError, match=r"method 'obs' is not known; use lrp \| "):
        prune(model, SAMPLES, "obs")
    with pytest.raises(InputError, match="method 'obs' is not known"):
        next(compare(model, SAMPLES, windows(), ["wanda", "obs"]))
    for method in ("gblm", "sparsegpt"):
        with pytest.raises(InputError, match=f"{method} selects inside the forward sweep"):
            prune(model, SAMPLES, method, pattern="global")
    for pattern, message in (("2:4", "2:4 fixes the share"), ("global", "global allocates by itself")):
        for allocate in ("owl", "relevance"):
            with pytest.raises(InputError, match=message):
                prune(model, SAMPLES, "wanda", pattern=pattern, allocate=allocate)
    with pytest.raises(InputError, match="allocation 'evenly' is not known"):
        prune(model, SAMPLES, "wanda", allocate="evenly")
    with pytest.raises(InputError, match="no weight is left to prune"):
        prune(model, SAMPLES, "wanda", include=["nothing"])


def test_a_setting_that_changes_nothing_is_refused(monkeypatch):
    no_work(monkeypatch)
    model = build("llama")
    for method in ("wanda", "ria", "magnitude", "random"):
        with pytest.raises(InputError, match=f"reduce has no effect on {method}: .* lrp and gradient"):
            prune(model, SAMPLES, method, reduce="abs")
    with pytest.raises(InputError, match="rule has no effect on gradient: it is a setting of lrp"):
        prune(model, SAMPLES, "gradient", rule="attnlrp")
    with pytest.raises(InputError, match="seed has no effect on wanda, lrp"):
        next(compare(model, SAMPLES, windows(), ["wanda", "lrp"], seed=1))


def test_a_pattern_need_only_divide_what_is_pruned():
    # 3:16 divides the widths 32 and 48, 2:32 only the first: down_proj is 48 wide.
    model = build("llama")
    assert prune(model, [], "magnitude", pattern="3:16").sparsity == pytest.approx(13 / 16)
    with pytest.raises(InputError, match=r"2:32 does not divide .*down_proj"):
        prune(model, [], "magnitude", pattern="2:32")
    assert prune(model, [], "magnitude", pattern="2:32", exclude=["*down_proj*"]).sparsity == 15 / 16


@pytest.mark.parametrize("method", ["lrp", "gradient", "wanda", "ria"])
def test_what_only_the_samples_show(method):
    model = build("llama")
    with pytest.raises(InputError, match="no reference samples"):
        prune(model, [], method)
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = math.inf
    before = state(model)
    with pytest.raises(InputError, match=r"is (nan|-?inf)|are not finite"):
        prune(model, SAMPLES, method)
    assert state(model) == before


def test_a_rule_that_cannot_score_some_weights_is_refused():
    with pytest.raises(InputError, match="rule cp gives exactly zero relevance"):
        prune(build("llama"), SAMPLES, "lrp", rule="cp")
