"""Tokens per second of a whole model while decoding, dense and packed, with the peak memory of each.

    python bench/decode_end_to_end.py prepare FOLDER [--shape llama-3.2-1b]   # writes the models (7 GB), checks them
    python bench/decode_end_to_end.py measure FOLDER OUT.json                 # times them, on a quiet machine
    python bench/decode_end_to_end.py peaks FOLDER OUT.json                   # adds the peak memory of each

A Llama of random bf16 weights, its blocks' linears pruned at random places at 50 % and 70 %, and 2:4. A dense and a
packed model, loaded from disk by plain transformers, decode one token each in turn, greedily, after the same prompt;
medians of single tokens. Dense weights take the same time whether they are zeros or not, so there is one dense model.
Peak memory is the maximum resident size of a process of its own that loads a model and decodes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import sparc3  # registers the packed format
from sparc3.report import versions
from sparc3.runtime import SparseLinear

CONFIGS = {
    "llama-3.2-1b": dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    ),
    "tiny": dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    ),
}
CASES = {"bitmap-50": ("bitmap", 0.5), "bitmap-70": ("bitmap", 0.7), "nm-2of4": ("nm", "2:4")}
PROMPT = 32


def dense_model(shape: str) -> PreTrainedModel:
    """A bf16 model of random weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return AutoModelForCausalLM.from_config(LlamaConfig(**CONFIGS[shape]), dtype=torch.bfloat16).eval()
    finally:
        torch.set_default_dtype(before)


def prune_(model: PreTrainedModel, sparsity: float | str) -> None:
    """Put zeros at random places of the linears of the blocks."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" not in name or weight.dim() != 2:
                continue
            if sparsity == "2:4":
                places = torch.rand(weight.numel() // 4, 4, generator=generator).argsort(1)[:, :2]
                weight.view(-1, 4).scatter_(1, places, 0.0)
            else:
                weight.masked_fill_(torch.rand(weight.shape, generator=generator) < sparsity, 0.0)


def prepare(shape: str, folder: Path) -> None:
    """Write the dense model and the packed ones, and check the logits of each against its dense self."""
    folder.mkdir(parents=True)
    ids = torch.randint(0, 500, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    for name, (format, sparsity) in CASES.items():
        model = dense_model(shape)
        if not (folder / "dense").exists():
            sparc3.save_pretrained(model, None, folder / "dense")
        prune_(model, sparsity)
        sparc3.save_pretrained(model, None, folder / name, format=format)
        with torch.no_grad():
            expected = model(ids).logits.float()
            del model
            found = AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits.float()
        error = ((found - expected).norm() / expected.norm()).item()
        print(f"{name}: logits differ by {error:.3g} of their norm", flush=True)
        # 16 layers, each rounding its results to 8 bits of mantissa.
        if error > 0.02:
            raise SystemExit("that is more than rounding")
        (folder / name / "error.json").write_text(json.dumps(error))


def decoder(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[], float]:
    """A function that decodes one more token and returns its seconds; the prompt is read first."""
    state: dict[str, Any] = {}
    with torch.no_grad():
        out = model(prompt, use_cache=True)
    state["cache"], state["next"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def step() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            out = model(state["next"], past_key_values=state["cache"], use_cache=True)
            state["next"] = out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    return step


def interleaved(models: dict[str, PreTrainedModel], tokens: int) -> dict[str, float]:
    """Median seconds a token of each model, one token each in turn."""
    prompt = torch.randint(0, 500, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    steps = {name: decoder(model, prompt) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for token in range(tokens + 2):
        for name, step in steps.items():
            taken = step()
            if token >= 2:  # warm by then
                seconds[name].append(taken)
    return {name: statistics.median(times) for name, times in seconds.items()}


def profile(model: PreTrainedModel) -> dict[str, float]:
    """Seconds a token inside the packed linears, and the number of their calls."""
    spent, begun = [0.0, 0], [0.0]

    def before(*_: Any) -> None:
        begun[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[0] += time.perf_counter() - begun[0]
        spent[1] += 1

    handles = []
    for module in model.modules():
        if isinstance(module, SparseLinear):
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    step = decoder(model, torch.zeros(1, 4, dtype=torch.int64))
    spent[:] = [0.0, 0]
    tokens = 5
    for _ in range(tokens):
        step()
    for handle in handles:
        handle.remove()
    return {"seconds_in_linears": spent[0] / tokens, "calls": spent[1] / tokens}


def peak(folder: Path) -> int:
    """Maximum resident bytes of this process after it has loaded the model and decoded eight tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    step = decoder(model, torch.zeros(1, PROMPT, dtype=torch.int64))
    for _ in range(8):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path, threads: int, tokens: int) -> dict[str, Any]:
    """Every case beside dense."""
    torch.set_num_threads(threads)
    lines = []
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    for name in CASES:
        packed = AutoModelForCausalLM.from_pretrained(folder / name)
        seconds = interleaved({"dense": dense, "packed": packed}, tokens)
        lines.append(
            {
                "case": name,
                "tokens_per_second": {key: 1 / value for key, value in seconds.items()},
                "ratio": seconds["dense"] / seconds["packed"],
                "weights_bytes": {"dense": size_of(dense), "packed": size_of(packed)},
                "relative_error_of_logits": json.loads((folder / name / "error.json").read_text()),
                **profile(packed),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    config = json.loads((folder / "dense/config.json").read_text())
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_key_value_heads")
    shape = {key: config[key] for key in keys}
    settings = {"dtype": "bfloat16", "threads": threads, "tokens": tokens, "prompt": PROMPT}
    return {"shape": shape, **settings, "lines": lines, **versions()}


def size_of(model: PreTrainedModel) -> int:
    """Bytes of the weights; those of tied tensors once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def measure_peaks(folder: Path) -> dict[str, int]:
    """Peak memory of every model, each in its own process."""
    peaks = {}
    for name in ("dense", *CASES):
        command = [sys.executable, __file__, "peak", str(folder / name)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[name] = int(found.stdout.split()[-1])
    return peaks


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=("prepare", "measure", "peaks", "peak"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--shape", choices=CONFIGS, default="llama-3.2-1b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    if arguments.step == "prepare":
        prepare(arguments.shape, arguments.folder)
    elif arguments.step == "peak":
        print(peak(arguments.folder))
    else:
        if arguments.step == "measure":
            result = measure(arguments.folder, arguments.threads, arguments.tokens)
        else:
            result = json.loads(arguments.out.read_text())
            result["peak_resident_bytes"] = measure_peaks(arguments.folder)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
