"""Pruning block by block from disk beside pruning in memory, at equal work, on the CPU with a warm page cache.

    python bench/streamed.py smollm2 4 128     # model, windows, tokens in each; prints JSON

Both read the same checkpoint, score all weights by LRP, prune half of every row and write the model with its mask and
report; both run every block's forward again when they go backward. They take turns. The masks are compared, and the
ratio is of the median times.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from real_models import gemma3, lee_background, smollm2

import sparc3
from sparc3.checkpoint import Checkpoint
from sparc3.compress import prune
from sparc3.families import prunable
from sparc3.job import Job, identity_of
from sparc3.models import load_tokenizer, local_folder
from sparc3.plan import Budget, plan
from sparc3.report import describe, versions
from sparc3.shape import shape_of
from sparc3.stream import prune_by_block
from sparc3.unfinished import Unfinished
from sparc3.weights import Streamed, empty_model

CPU, PLENTY, TURNS = torch.device("cpu"), 1 << 40, 3
METHOD, SPARSITY, PATTERN = "lrp", 0.5, "row"


def resident(folder: Path, samples: torch.Tensor, out: Path) -> None:
    """Load all, prune, write."""
    loaded = sparc3.load(folder)
    mask = prune(loaded.model, samples, METHOD, SPARSITY, PATTERN, memory=0)
    sparc3.save_pretrained(loaded.model, mask, out, loaded.tokenizer, describe(loaded, mask))


def streamed(folder: Path, samples: torch.Tensor, out: Path) -> None:
    """The same block by block."""
    model, checkpoint = empty_model(folder, "float32"), Checkpoint(folder)
    shape = shape_of(model, prunable(model), *samples.shape, checkpoint)
    budget = Budget(PLENTY, PLENTY, PLENTY, 0, False)
    way = plan(shape, METHOD, PATTERN, budget, model.config.vocab_size)
    job = Job(METHOD, SPARSITY, PATTERN, samples)
    source = Streamed(model, checkpoint, CPU, way.prefetch)
    run = Unfinished(out, identity_of(job, model, checkpoint, CPU))
    prune_by_block(job, source, run, way, load_tokenizer(folder, str(folder)))


def main() -> None:
    name, windows, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    transformers.logging.disable_progress_bar()
    fetch = {"smollm2": smollm2, "gemma3": gemma3}.get(name)
    folder, note = local_folder(str(fetch() if fetch else name))
    tokenizer = load_tokenizer(folder, name)
    samples = sparc3.windows(tokenizer, sparc3.read_documents([str(lee_background())]), tokens, windows, 0)
    for stored in Checkpoint(folder).tensors.values():
        stored.read()
    runs = {"resident": resident, "streamed": streamed}
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    with tempfile.TemporaryDirectory() as scratch:
        outs = {kind: Path(scratch) / kind for kind in runs}
        for turn in range(TURNS + 1):
            for kind, run in runs.items():
                shutil.rmtree(outs[kind], ignore_errors=True)
                start = time.perf_counter()
                run(folder, samples, outs[kind])
                if turn:  # the first one warms up
                    seconds[kind].append(time.perf_counter() - start)
        masks = [sparc3.Mask.load(out / "mask.safetensors").bits for out in outs.values()]
        assert all(torch.equal(bits, masks[1][weight]) for weight, bits in masks[0].items())
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    found = {
        "what": "seconds to read, prune by LRP at 50 % a row and write, in memory and block by block",
        "model": name,
        "note": note,
        "data": f"{len(samples)} windows of {tokens} tokens of lee_background.cor",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "median_seconds": medians,
        "streamed_over_resident": medians["streamed"] / medians["resident"],
        **versions(),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
