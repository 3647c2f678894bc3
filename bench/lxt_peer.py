"""LXT beside us: time of the same attribution, in a process of its own (it patches globally).

    git clone https://github.com/rachtibat/LRP-eXplains-Transformers ~/lxt
    python bench/lxt_peer.py ~/lxt smollm2 2048       # one JSON document on stdout
    python bench/lxt_peer.py ~/lxt smollm2 2048 2     # the median of 2 rounds instead of 5

Both run AttnLRP's backward of the summed log-probability with weight gradients; |W * grad| is added up by hand
for LXT, as its users do. Needs transformers 5 and LXT at f043441 (August 2026) or later; none of its code is here.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from attribution_cases import accumulate_by_hand, load_benchmark_model, ours, plain_backward

from sparc3.report import versions

ROUNDS = 5


def _seconds(run, rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def lxt_seconds(model_name: str, tokens: int, rounds: int) -> dict[str, float]:
    """Patch the model's module with LXT, then time what its users write."""
    from lxt.efficient import monkey_patch

    model = load_benchmark_model(model_name).model
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    monkey_patch(importlib.import_module(type(model).__module__), verbose=False)
    return {
        "lxt backward": _seconds(plain_backward(model, ids), rounds),
        "lxt backward + accumulate": _seconds(accumulate_by_hand(model, ids), rounds),
    }


def our_seconds(model_name: str, tokens: int, rounds: int) -> dict[str, float]:
    """Ours and the plain backward, in this process."""
    model = load_benchmark_model(model_name).model
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {
        "plain backward": _seconds(plain_backward(model, ids), rounds),
        "sparc3": _seconds(ours(model, ids), rounds),
        # What the engine does by itself where a model's activations do not fit.
        "sparc3-recompute": _seconds(ours(model, ids, memory=0), rounds),
    }


def main() -> None:
    folder, model_name, tokens, *more = sys.argv[1:]
    rounds = int(more[0]) if more else ROUNDS
    if more[1:]:
        sys.path.insert(0, folder)
        print(json.dumps(lxt_seconds(model_name, int(tokens), rounds)))
        return
    command = [sys.executable, str(Path(__file__)), folder, model_name, tokens, str(rounds), "inner"]
    theirs = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    found = {
        "model": model_name,
        "note": load_benchmark_model(model_name).note,
        "tokens": int(tokens),
        "rounds": rounds,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "seconds": our_seconds(model_name, int(tokens), rounds) | theirs,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
