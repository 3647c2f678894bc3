"""Peak memory beyond the weights of one attribution, each implementation in a process of its own.

    python bench/peak_memory.py smollm2 2048            # all implementations, as a table and JSON on stdout
    python bench/peak_memory.py smollm2 2048 sparc3     # one of them, one number of bytes

The peak is the process's maximum resident size minus its resident size just before the attribution, so it counts
activations, gradients, accumulators and logits, but neither the model nor the interpreter.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import psutil
import torch
from attribution_cases import IMPLEMENTATIONS, load_benchmark_model

from sparc3.report import versions

# One sample has nothing to accumulate over: that would be a plain backward again.
MEASURED = [name for name in IMPLEMENTATIONS if name != "backward+accumulate"]


def measure(model_name: str, tokens: int, implementation: str) -> int:
    """Bytes beyond what was resident before the attribution."""
    model = load_benchmark_model(model_name).model
    # Touch every page of memory-mapped weights, so that reading them does not count.
    checksum = sum(float(parameter.detach().sum()) for parameter in model.parameters())
    assert checksum == checksum
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    run = IMPLEMENTATIONS[implementation](model, ids)
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peak - before


def main() -> None:
    model_name, tokens, *implementations = sys.argv[1:]
    if implementations:
        print(measure(model_name, int(tokens), implementations[0]))
        return
    peaks = {}
    for implementation in MEASURED:
        command = [sys.executable, __file__, model_name, tokens, implementation]
        peaks[implementation] = int(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
    chunked = peaks["plain-backward-chunked-logits"]
    found = {
        "model": model_name,
        "note": load_benchmark_model(model_name).note,
        "tokens": int(tokens),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "peak_bytes": peaks,
        "of_plain_backward_chunked_logits": {name: peak / chunked for name, peak in peaks.items()},
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
