"""LXT beside us: time and peak memory of the same attribution, in a process of its own (it patches globally).

    git clone https://github.com/rachtibat/LRP-eXplains-Transformers ~/lxt
    python bench/lxt_peer.py ~/lxt smollm2 2048       # one JSON document on stdout

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

ROUNDS = 5


def _seconds(run) -> float:
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def lxt_seconds(model_name: str, tokens: int) -> dict[str, float]:
    """Patch the model's module with LXT, then time what its users write."""
    from lxt.efficient import monkey_patch

    model = load_benchmark_model(model_name).model
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    monkey_patch(importlib.import_module(type(model).__module__), verbose=False)
    return {
        "lxt backward": _seconds(plain_backward(model, ids)),
        "lxt backward + accumulate": _seconds(accumulate_by_hand(model, ids)),
    }


def our_seconds(model_name: str, tokens: int) -> dict[str, float]:
    """Ours and the plain backward, in this process."""
    model = load_benchmark_model(model_name).model
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    plain = _seconds(plain_backward(model, ids))
    return {"plain backward": plain, "sparc3": _seconds(ours(model, ids))}


def main() -> None:
    folder, model_name, tokens, *inner = sys.argv[1:]
    if inner:
        sys.path.insert(0, folder)
        print(json.dumps(lxt_seconds(model_name, int(tokens))))
        return
    command = [sys.executable, str(Path(__file__)), folder, model_name, tokens, "inner"]
    theirs = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    seconds = our_seconds(model_name, int(tokens)) | theirs
    print(json.dumps({"model": model_name, "tokens": int(tokens), "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
