"""Time of attributing all weights, ours beside plain backwards. Run through `make bench`; see bench/ratios.py."""

from __future__ import annotations

import pytest
import torch
from attribution_cases import IMPLEMENTATIONS, load_benchmark_model

from sparc3.families import prunable

# (model, samples, tokens): the shapes that the project's goals are stated for.
WHOLE = [(model, 1, tokens) for model in ("tiny-llama", "smollm2", "gemma3") for tokens in (128, 2048)]
SHORT = [(model, 1, 16) for model in ("tiny-llama", "smollm2", "gemma3")]
PER_SAMPLE = [(model, 64, 16) for model in ("tiny-llama", "smollm2", "gemma3")]


def _run(benchmark, group: str, model_name: str, samples: int, tokens: int, implementation: str) -> None:
    model = load_benchmark_model(model_name).model
    if tokens > model.config.max_position_embeddings:
        pytest.skip(f"{model_name} has {model.config.max_position_embeddings} positions")
    ids = torch.randint(
        0, model.config.vocab_size, (samples, tokens), generator=torch.Generator().manual_seed(0)
    )
    weights = sum(weight.weight.numel() for weight in prunable(model).values())
    run = IMPLEMENTATIONS[implementation](model, ids)
    benchmark.group = f"{group} {model_name} {samples}x{tokens}"
    benchmark.extra_info |= {
        "impl": implementation,
        "flops": 6 * weights * samples * tokens,
        "bytes": 4 * 3 * weights,
    }
    # Some 20 s a case at most: the whole file takes a quarter of an hour on two cores.
    rounds = 15 if model_name == "tiny-llama" else 3 if samples * tokens > 512 else 7
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=0 if rounds == 3 else 2)


@pytest.mark.parametrize("implementation", ["sparc3", "plain-backward", "plain-backward-chunked-logits"])
@pytest.mark.parametrize(("model", "samples", "tokens"), WHOLE)
def test_all_weights(benchmark, model, samples, tokens, implementation):
    _run(benchmark, "all weights", model, samples, tokens, implementation)


@pytest.mark.parametrize("implementation", ["sparc3-512MiB", "sparc3-recompute"])
@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_all_weights_in_less_memory(benchmark, model, implementation):
    _run(benchmark, "all weights", model, 1, 2048, implementation)


@pytest.mark.parametrize("implementation", ["sparc3", "backward+accumulate"])
@pytest.mark.parametrize(("model", "samples", "tokens"), SHORT)
def test_short_prompt(benchmark, model, samples, tokens, implementation):
    _run(benchmark, "short prompt", model, samples, tokens, implementation)


@pytest.mark.parametrize("implementation", ["sparc3", "backward+accumulate"])
@pytest.mark.parametrize(("model", "samples", "tokens"), PER_SAMPLE)
def test_per_sample(benchmark, model, samples, tokens, implementation):
    _run(benchmark, "per sample", model, samples, tokens, implementation)
