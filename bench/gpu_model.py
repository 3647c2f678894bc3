"""A whole model for bench/gpu.py: one way to find the relevance of all its weights, in a process of its own.

    python bench/gpu_model.py sparc3           # one JSON document, last on stdout
    python bench/gpu_model.py lxt --dry        # two tiny blocks, on a CPU

Llama-3-8B's shape with random bf16 weights, one sample of 2048 random tokens, log-probability of the next tokens.
Each way has a process of its own because LXT patches the process it is in, and so that peaks of memory do not mix.
"""

from __future__ import annotations

import argparse
import importlib
import json
from contextlib import nullcontext
from typing import Any

import torch
from attribution_cases import Run, accumulate_by_hand, ours, plain_backward
from gpu_timing import median_ms
from sparc3_kernels import backend
from transformers import LlamaConfig, LlamaForCausalLM

from sparc3.families import prunable
from sparc3.rules import Rule
from sparc3.scores import Accumulators, accumulate

TOKENS = 2048
LLAMA_3_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
TINY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=64,
)  # fmt: skip
# Largest difference of relevance, norm over norm, that is timed. Of bf16, 32 blocks with some ten roundings of 2^-9
# each: sqrt(320) 2^-9 = 0.035 on either side.
_TOLERANCE, _DRY_TOLERANCE = 0.1, 1e-4


def built(dry: bool) -> tuple[Any, torch.Tensor]:
    """(model, tokens [1, T])."""
    device = torch.device("cpu" if dry else "cuda")
    config = LlamaConfig(**(TINY if dry else LLAMA_3_8B), attn_implementation="sdpa")
    torch.manual_seed(0)
    with device:
        dtype = torch.float32 if dry else torch.bfloat16
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
        return model, torch.randint(0, config.vocab_size, (1, 16 if dry else TOKENS))


def error(model: Any, ids: torch.Tensor) -> float:
    """Relative difference between the first block's relevance by the kernels and by the reference."""
    weights = prunable(model, include=["model.layers.0.*"])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for forced in (nullcontext(), backend("reference")):
        sink = Accumulators(weights, "abs")
        with forced:
            accumulate(model, [batch], Rule.parse("attnlrp"), "logprob", "all", weights, sink)
        found.append(sink.sums)
    mine, exact = found
    return max(((mine[name] - exact[name]).norm() / exact[name].norm()).item() for name in weights)


def lxt(model: Any, ids: torch.Tensor, compiled: bool, dry: bool) -> Run:
    """What LXT's users write.

    Compiled: block by block, which is one compilation for all of them; the whole model at once takes minutes.
    """
    from lxt.efficient import monkey_patch

    monkey_patch(importlib.import_module(type(model).__module__), verbose=False)
    for block in model.model.layers if compiled else ():
        block.compile(backend="eager" if dry else "inductor")
    return accumulate_by_hand(model, ids)


WAYS = ("plain backward", "sparc3", "lxt", "lxt compiled")


def measure(way: str, dry: bool) -> dict[str, Any]:
    """Median time of one attribution in ms, and the peak of allocated memory in bytes (0 on a CPU)."""
    model, ids = built(dry)
    result: dict[str, Any] = {}
    weights = sum(weight.weight.numel() for weight in prunable(model).values())
    # Forward, gradients of inputs and of weights; the head has no gradient of its weight.
    result["flops"] = ids.numel() * (6 * weights + 4 * model.get_output_embeddings().weight.numel())
    with backend("triton") if dry and way == "sparc3" else nullcontext():
        if way == "sparc3":
            result["error"] = error(model, ids)
            if not result["error"] <= (_DRY_TOLERANCE if dry else _TOLERANCE):
                raise SystemExit(f"relevance of the first block is off by {result['error']:.3g}")
            run = ours(model, ids)
        elif way == "plain backward":
            run = plain_backward(model, ids)
        else:
            run = lxt(model, ids, way == "lxt compiled", dry)
        if not dry:
            run()
            torch.cuda.reset_peak_memory_stats()
        result["ms"] = median_ms({way: lambda _: run()}, dry, 5.0)[way]
    result["peak_bytes"] = 0 if dry else torch.cuda.max_memory_allocated()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.way, arguments.dry)))


if __name__ == "__main__":
    main()
