"""A wrapped model on the kernels (Triton's in the interpreter on a CPU) against the same model on the reference."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import weight_gradients
from sparc3_kernels import backend
from sparc3_kernels.backend import unavailable
from sparc3_kernels.lm_head import lm_head_target
from tiny import _GATED, VOCABULARY, batch, build, singles, state
from transformers import AutoModelForCausalLM, GraniteConfig

from sparc3 import families, head
from sparc3.engine import Blocks
from sparc3.families import prunable
from sparc3.head import target_gradient
from sparc3.rules import Rule
from sparc3.scores import Accumulators, accumulate
from sparc3.targets import TARGETS, target_value
from sparc3.wrap import wrap

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from interpreter import DEVICE
from precision import assert_as_good_as_torch

pytestmark = pytest.mark.skipif(unavailable("triton") is not None, reason=str(unavailable("triton")))

# What each adds: grouped heads; a window in every layer; q- and k-norms; weights 1 + w, soft-caps and a window in
# half of the layers; gate and up in one linear; LayerNorm and ReLU with biases.
FAMILIES = ["llama", "mistral", "qwen3", "gemma2", "phi3", "opt"]

needs_library = pytest.mark.skipif(unavailable("cpu") is not None, reason=str(unavailable("cpu")))
BACKENDS = ["triton", pytest.param("cpu", marks=needs_library)]


def on_device(name, device=DEVICE):
    inputs = {key: value.to(device) for key, value in batch().items()}
    return build(name, "eager" if name == "gemma2" else "sdpa").to(device), inputs


def device_of(backend_name):
    return DEVICE if backend_name == "triton" else "cpu"


@pytest.mark.parametrize("rule", ["attnlrp", "gradient"])
@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_agrees_with_the_reference(name, rule):
    model, inputs = on_device(name)
    weights = prunable(model)
    before = state(model) if DEVICE == "cpu" else None
    sink = Accumulators(weights, "signed")
    with backend("triton"):
        accumulate(model, [inputs], Rule.parse(rule), "logprob", "all", weights, sink)
    assert before is None or state(model) == before
    target = partial(target_value, target="logprob")
    expected = [weight_gradients(model, sample, Rule.parse(rule), target)[1] for sample in singles(inputs)]
    for key, weight in weights.items():
        exact = sum(weight.canonical(sample[key]) for sample in expected)
        # fp32 through two blocks, against an independent graph in fp64
        assert (sink.sums[key].double() - exact).norm() <= 1e-5 * exact.norm(), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("runs", "name"),
    [
        *(("triton", name) for name in ("llama", "gemma2", "opt")),
        # Not opt: of its ReLUs one is so close to zero that it depends on which way attention is rounded.
        *(pytest.param("cpu", name, marks=needs_library) for name in ("llama", "gemma2")),
    ],
)
def test_16_bit_relevance_is_as_good_as_torch(runs, name, dtype):
    model, inputs = on_device(name, device_of(runs))
    model = model.to(dtype)
    weights = prunable(model)
    sink = Accumulators(weights, "signed")
    with backend(runs):
        accumulate(model, [inputs], Rule.parse("attnlrp"), "logprob", "all", weights, sink)
    target = partial(target_value, target="logprob")

    def plain(wide):
        found = [
            weight_gradients(model, one, Rule.parse("attnlrp"), target, wide)[1] for one in singles(inputs)
        ]
        return {
            key: sum(weight.canonical(one[key]).double() for one in found) for key, weight in weights.items()
        }

    exact = plain(torch.float64)

    def together(relevance):
        """All weights, each in the unit of its norm: a rounding early in the forward moves a tensor as a whole."""
        return [torch.cat([(relevance[key].double() / exact[key].norm()).flatten().cpu() for key in exact])]

    assert_as_good_as_torch(together(sink.sums), together(plain(dtype)), together(exact))


@pytest.mark.parametrize("rule", ["cp", "attnlrp"])
def test_logits_agree_to_rounding(rule):
    model, inputs = on_device("gemma3_text")
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
        with backend("triton"), wrap(model, Rule.parse(rule)):
            ours = model(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], plain[real], rtol=1e-5, atol=1e-5)


def targets_of(model, inputs, target, positions, monkeypatch, runs="triton"):
    """(value, gradient) with the kernels, the same on the reference, and how often the op of the LM head ran."""
    calls = []
    monkeypatch.setattr(head, "lm_head_target", lambda *args: calls.append(args) or lm_head_target(*args))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*inputs["input_ids"].shape, model.config.hidden_size, generator=generator)
    hidden = hidden.to(inputs["input_ids"].device)
    results = []
    for name in (runs, "reference"):
        with backend(name), wrap(model, Rule()):
            results.append(target_gradient(Blocks(model), hidden, inputs, target, positions))
    assert "forward" not in vars(model.get_output_embeddings())
    return *results, len(calls)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("runs", BACKENDS)
def test_the_target_runs_in_one_op(runs, name, target, positions, monkeypatch):
    model, inputs = on_device(name, device_of(runs))
    mine, exact, calls = targets_of(model, inputs, target, positions, monkeypatch, runs)
    assert calls == (target not in ("max-logit", "lead"))  # the targets that the op does not know
    for one, other in zip(mine, exact, strict=True):
        # fp32: sums over 12 positions of sums over 97 words and 32 channels
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
@pytest.mark.parametrize("runs", BACKENDS)
def test_whoever_watches_the_head_sees_its_logits(runs, hook, monkeypatch):
    model, inputs = on_device("llama", device_of(runs))
    seen = []
    handle = getattr(model.get_output_embeddings(), hook)(lambda *args: seen.append(args[-1][0].shape))
    mine, exact, calls = targets_of(model, inputs, "logit", "all", monkeypatch, runs)
    handle.remove()
    assert not calls
    assert seen
    assert len({shape[-1] for shape in seen}) == 1
    assert seen[0][-1] == (
        model.config.hidden_size if "pre_hook" in hook and "forward" in hook else VOCABULARY
    )
    for one, other in zip(mine, exact, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_logits_that_the_model_scales_are_left_to_the_model(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "granite", families.Family())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GraniteConfig(**_GATED, logits_scaling=8.0)).eval().to(DEVICE)
    _, inputs = on_device("llama")
    mine, exact, calls = targets_of(model, inputs, "logprob", "all", monkeypatch)
    assert not calls
    for one, other in zip(mine, exact, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # gemma2: which soft-caps there, too
def test_a_mask_that_no_kernel_knows_takes_the_models_own_attention(name):
    model, inputs = on_device(name)
    inputs["attention_mask"][0, 3] = 0  # a hole
    weights = prunable(model)
    results = []
    for name in ("triton", "reference"):
        sink = Accumulators(weights, "signed")
        with backend(name):
            accumulate(model, [inputs], Rule(), "logprob", "all", weights, sink)
        results.append(sink.sums)
    for key in weights:
        torch.testing.assert_close(results[0][key], results[1][key], rtol=1e-4, atol=1e-5)
