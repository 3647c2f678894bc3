"""Pruning block by block: a model that is larger than memory, read from disk and written back pruned.

The masks are those of ``sparc3.prune``, bit by bit. Each block is scored, selected from and written while its weights
are there; what is left of it then is its part of the mask.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from sparc3_kernels.select import pack_bits
from transformers import PreTrainedTokenizerBase

from sparc3.boundaries import Boundaries, InMemory, OnDisk
from sparc3.compress import SEQUENTIAL, choose_in_sweep
from sparc3.engine import GRADIENT, Blocks, Resume, attribute_batches
from sparc3.inputs import Inputs
from sparc3.job import Job
from sparc3.output import Output
from sparc3.plan import Plan
from sparc3.ranks import Ranks
from sparc3.samples import Batch
from sparc3.schedules import activation_score, sweep
from sparc3.scores import Accumulators, batches_on, check_explained, sample_free_score
from sparc3.targets import TargetFunction
from sparc3.unfinished import Unfinished
from sparc3.weights import Streamed
from sparc3.wrap import wrap


def prune_by_block(
    job: Job,
    source: Streamed,
    run: Unfinished,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: Mapping[str, Any] | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> dict[str, Any] | None:
    """Prune a model and write it with its mask and report; what ``run`` has finished before is left as it is.

    Args:
        source: the model, empty, and its checkpoint.
        run: where the output is written.
        plan: the way to go.
        report: what else report.json tells.
        ranks: this process among those that share the samples; each calls this with the same arguments.

    Returns:
        the report; None in a process that does not write.

    Raises:
        InputError: as sparc3.prune; the checkpoint is damaged; or the disk is full.
    """
    start = time.perf_counter()
    output = Output(job, source, run)
    scored = ranks.told(output.is_scored())
    if not scored and job.method in ("lrp", "gradient"):
        _attribute(job, source, output, plan, ranks)
    if not ranks.writes:
        return None
    if not scored and job.method not in ("lrp", "gradient"):
        if job.method in SEQUENTIAL:
            _in_sweep(job, source, output)
        else:
            _without_samples(job, source, output)
    if job.pattern == "global":
        output.select_globally()
    return output.finish(tokenizer, report or {}, plan, start)


def _boundaries(run: Unfinished, plan: Plan, ranks: Ranks) -> Boundaries:
    if not plan.on_disk:
        return InMemory(torch.device("cpu"))
    folder = run.scratch / f"boundaries-{ranks.rank}"
    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        left.unlink()
    return OnDisk(folder)


def _attribute(job: Job, source: Streamed, output: Output, plan: Plan, ranks: Ranks) -> None:
    """Score by LRP or the gradient, from the last block down to the first."""
    chosen = job.chosen
    batches = list(ranks.share(batches_on(source.device, job.samples)))
    sink = Accumulators(output.weights, chosen.get("reduce", "abs"), chosen.get("skip_first", False), held=())
    boundaries = _boundaries(output.run, plan, ranks)
    depth = ranks.told(output.first_done())
    if depth is not None:
        for number, gradient in enumerate(output.load_state(depth, ranks.rank)):
            boundaries.put((GRADIENT, number), gradient.to(source.device))
    target: str | TargetFunction = chosen.get("target", "logprob")
    with wrap(source.model, job.rule, output.weights, sink):
        attribute_batches(
            Blocks(source.model, source),
            batches,
            target,
            chosen.get("positions", "all"),
            boundaries=boundaries,
            spacing=plan.spacing,
            memory=0,
            visitor=_Backward(batches, sink, boundaries, output, ranks),
            resume=None if depth is None else Resume(depth),
        )


class _Backward:
    """Scores each block, and writes it, when all batches went back through it (a sparc3.engine.Visitor)."""

    def __init__(
        self, batches: list[Batch], sink: Accumulators, boundaries: Boundaries, output: Output, ranks: Ranks
    ) -> None:
        self.batches, self.sink, self.boundaries = batches, sink, boundaries
        self.output, self.ranks = output, ranks

    def batch(self, number: int) -> None:
        self.sink.start(self.batches[number])

    def explained(self, number: int, value: torch.Tensor) -> None:
        check_explained(value)

    def enter(self, index: int) -> None:
        self.sink.hold(self.output.names[index])
        self.ranks.receive(self.sink.sums.values())

    def done(self, index: int) -> None:
        # Before the sums go on: what the last process calls done, every one can resume from.
        gradients = (self.boundaries.get((GRADIENT, number)) for number in range(len(self.batches)))
        self.output.save_state(index, gradients, self.batches, self.ranks.rank)
        self.ranks.send(self.sink.sums.values())
        if self.ranks.writes:
            self.output.scored(index, self.sink.take())
        else:
            self.sink.sums = {}
        self.output.forget_states(self.ranks.rank)


def _in_sweep(job: Job, source: Streamed, output: Output) -> None:
    """Score by what the weights receive, from the first block up; each block sees the pruned ones before it."""
    start = next(index for index in range(output.depth + 1) if not output.is_done(index))
    scores, bits, values = {}, {}, {}

    def score(name: str, inputs: Inputs) -> None:
        scores[name] = activation_score(output.weights[name], inputs, job.method)

    def choose(name: str, inputs: Inputs) -> torch.Tensor:
        weight = output.weights[name]
        kept, new = choose_in_sweep(weight, inputs, job.method, job.sparsity, job.pattern)
        new = new.to(weight.weight.dtype).masked_fill(~kept, 0)
        bits[name] = pack_bits(weight.canonical(kept).contiguous()).cpu()
        if job.updates:
            values[name] = weight.canonical(new)
        return new

    def done(index: int, outputs: list[torch.Tensor]) -> None:
        output.save_state(index, outputs, batches)
        if output.is_global:
            output.scored(index, scores)
        else:
            output.write(index, bits, values)
        output.forget_states()
        for parts in (scores, bits, values):
            parts.clear()

    batches = batches_on(source.device, job.samples)
    sweep(
        source.model,
        batches,
        output.weights,
        score if output.is_global else choose,
        gram=job.method == "sparsegpt",
        source=source,
        home=torch.device("cpu"),
        done=done,
        start=start,
        received=list(output.load_state(start - 1)) if start else (),
    )


def _without_samples(job: Job, source: Streamed, output: Output) -> None:
    """Score by magnitude or at random."""
    positions = {name: position for position, name in enumerate(output.weights)}
    seed = job.settings.get("seed", 0)

    def score(index: int) -> None:
        scores = {
            name: sample_free_score(output.weights[name], positions[name], job.method, seed)
            for name in output.names[index]
        }
        output.scored(index, scores)

    left = [index for index in range(output.depth + 1) if not output.is_done(index)]
    for index in source.visit([index for index in left if index < output.depth]):
        score(index)
    if output.depth in left:
        with source.outside():
            score(output.depth)
