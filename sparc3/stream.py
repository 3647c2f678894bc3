"""Pruning block by block: a model that is larger than memory, read from disk and written back pruned.

The masks are those of ``sparc3.prune``, bit by bit. Each block is scored, selected from and written while its weights
are there; what is left of it then is its part of the mask. What needs all blocks first (a threshold over the model,
shares of the blocks, gradients for GBLM, a mask to repair) leaves that on disk and goes through the blocks once more.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from sparc3_kernels.select import count_bits, pack_bits, select_stream, unpack_bits
from transformers import PreTrainedTokenizerBase

from sparc3.allocate import outliers, owl_shares
from sparc3.checkpoint import Stored, read_into
from sparc3.choose import choose
from sparc3.compress import default_settings
from sparc3.inputs import Inputs
from sparc3.job import Job
from sparc3.output import Output
from sparc3.passes import in_sweep
from sparc3.pieces import Pieces
from sparc3.plan import Plan
from sparc3.ranks import Ranks
from sparc3.rules import Rule
from sparc3.schedules import GBLM_SETTINGS, activation_score, gblm_gradients_
from sparc3.scores import check_finite_scores, sample_free_score
from sparc3.select import as_stored, pruned_count, ranked, select_within
from sparc3.streamed_passes import Passes, Take
from sparc3.unfinished import Unfinished
from sparc3.weights import Streamed

# Scores that are read from disk at once: 16 MiB.
_SCORES_AT_ONCE = 1 << 22


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
    passes = Passes(source, output.weights, output.names, run, plan, job.samples, ranks)
    pruning = _Pruning(job, output, passes)
    pruning.run()
    return output.finish(tokenizer, report or {}, plan, start, pruning.budgets) if ranks.writes else None


class _Pruning:
    """One run; the attributes are those of ``prune_by_block``, and the budgets where there are some."""

    def __init__(self, job: Job, output: Output, passes: Passes) -> None:
        self.job, self.output, self.passes = job, output, passes
        self.budgets: dict[str, float] | None = None

    def run(self) -> None:
        if self.job.allocate != "uniform":
            self.budgets = self._allocate()
        if in_sweep(self.job.method, self.job.pattern):
            self._sweep(gradients=self._gradients() if self.job.method == "gblm" else None)
            return
        chosen = self.passes.pieces("chosen", upwards=False) if self.job.repair else self.output.masks
        if self.job.pattern == "global":
            self._select_globally(chosen)
        else:
            self._score(chosen, lambda index, scores: self._select(index, scores, chosen))
        if self.job.repair:
            self._sweep(given=chosen)

    # Scores ------------------------------------------------------------------------------------------------------

    def _score(self, pieces: Pieces, take: Take) -> None:
        """The method's scores of the dense model."""
        job = self.job
        if job.method in ("lrp", "gradient"):
            self.passes.backward(pieces, job.rule, job.chosen, take)
        elif job.method in ("wanda", "ria"):
            self._score_by_inputs(pieces, job.method, take)
        elif self.passes.ranks.writes:
            self._score_without_samples(pieces, take)

    def _score_by_inputs(self, pieces: Pieces, method: str, take: Take) -> None:
        scores: dict[str, torch.Tensor] = {}

        def visit(name: str, inputs: Inputs) -> None:
            scores[name] = activation_score(self.output.weights[name], inputs, method)

        def done(index: int) -> None:
            take(index, dict(scores))
            scores.clear()

        self.passes.sweep(pieces, visit, done, prunes=False)

    def _score_without_samples(self, pieces: Pieces, take: Take) -> None:
        weights, seed = self.output.weights, self.job.settings.get("seed", 0)
        positions = {name: position for position, name in enumerate(weights)}

        def visit(index: int) -> None:
            names = self.output.names[index]
            take(
                index,
                {
                    name: sample_free_score(weights[name], positions[name], self.job.method, seed)
                    for name in names
                },
            )

        self.passes.visit(pieces.left(), visit)

    def _keep_ranked(self, pieces: Pieces) -> Take:
        """Leaves a block's scores, as they are ranked, on disk."""

        def take(index: int, scores: dict[str, torch.Tensor]) -> None:
            check_finite_scores(scores, self.output.weights)
            pieces.save(
                index,
                {name: ranked(scores.pop(name).cpu(), "magnitude") for name in self.output.names[index]},
            )

        return take

    def _gradients(self) -> Pieces:
        """|W| ||G||_2 of every weight, for GBLM."""
        pieces = self.passes.pieces("gradients", upwards=False)

        def take(index: int, scores: dict[str, torch.Tensor]) -> None:
            check_finite_scores(scores, self.output.weights)
            found = {name: gblm_gradients_(tensor, self.passes.batches) for name, tensor in scores.items()}
            pieces.save(index, found)

        self.passes.backward(pieces, Rule.parse("gradient"), GBLM_SETTINGS, take)
        return pieces

    # Shares ------------------------------------------------------------------------------------------------------

    def _allocate(self) -> dict[str, float] | None:
        """The share to prune of every tensor, None in a process that does not write; kept for a run that goes on."""
        kept = self.output.run.scratch / "budgets.json"
        ranks = self.passes.ranks
        if not ranks.told(kept.is_file()):
            pieces, find = self._outliers() if self.job.allocate == "owl" else self._relevance()
            if ranks.writes:
                with self.output.run.write(kept) as file:
                    file.write(json.dumps(find()).encode())
                pieces.remove()
            ranks.told(None)
        return json.loads(kept.read_text(encoding="utf-8")) if ranks.writes else None

    def _outliers(self) -> tuple[Pieces, Callable[[], dict[str, float]]]:
        pieces, output = self.passes.pieces("outliers"), self.output

        def take(index: int, scores: dict[str, torch.Tensor]) -> None:
            check_finite_scores(scores, output.weights)
            names = output.names[index]
            density = outliers([scores[name] for name in names]) if names and index < output.depth else None
            pieces.save(index, {}, density)

        def find() -> dict[str, float]:
            within = [index for index in range(output.depth) if output.names[index]]
            sizes = [
                sum(output.weights[name].weight.numel() for name in output.names[index]) for index in within
            ]
            shares = owl_shares([pieces.note(index) for index in within], sizes, self.job.sparsity)
            of_block = dict(zip(within, shares, strict=True))
            return {name: of_block.get(index, self.job.sparsity) for name, index in output.block_of.items()}

        self._score_by_inputs(pieces, "wanda", take)
        return pieces, find

    def _relevance(self) -> tuple[Pieces, Callable[[], dict[str, float]]]:
        pieces, settings = self.passes.pieces("relevance", upwards=False), default_settings("global")

        def find() -> dict[str, float]:
            masks = self._globally(pieces)
            kept: dict[str, int] = {}
            for names in self.output.names.values():
                kept |= {name: sum(map(count_bits, self._parts(name, masks))) for name in names}
            next(masks, None)  # the check that the scores did not change
            return {
                name: 1 - kept[name] / weight.weight.numel() for name, weight in self.output.weights.items()
            }

        self.passes.backward(pieces, Rule.parse(settings["rule"]), settings, self._keep_ranked(pieces))
        return pieces, find

    # Masks -------------------------------------------------------------------------------------------------------

    def _select(self, index: int, scores: dict[str, torch.Tensor], chosen: Pieces) -> None:
        """Take the scores [..., out, in] of a block whose weights are in the model."""
        check_finite_scores(scores, self.output.weights)
        bits = {}
        for name in self.output.names[index]:
            weight, tensor = self.output.weights[name], scores.pop(name).cpu()
            packed = select_within(tensor, self._share(name), self.job.pattern)
            bits[name] = as_stored(packed, tensor.shape, weight.transposed)
        self._keep(index, bits, chosen)

    def _share(self, name: str) -> float:
        return self.job.sparsity if self.budgets is None else self.budgets[name]

    def _keep(self, index: int, bits: Mapping[str, torch.Tensor], chosen: Pieces) -> None:
        if self.job.repair:
            chosen.save(index, bits)
        else:
            self.output.write(index, bits)

    def _select_globally(self, chosen: Pieces) -> None:
        """Find the threshold over all scores on disk, then go through every block."""
        scores = self.passes.pieces("scores", upwards=self.job.method in ("wanda", "ria"))
        self._score(scores, self._keep_ranked(scores))
        if not self.passes.ranks.writes:
            return
        left = chosen.left()
        masks = self._globally(scores)
        for index in range(self.output.depth + 1):
            if index not in left:
                self._masks_of(index, masks)  # what ties they keep counts for the blocks that follow
            elif self.job.repair:
                chosen.save(index, self._masks_of(index, masks))
        if not self.job.repair:
            self.passes.visit(left, lambda index: self.output.write(index, self._masks_of(index, masks)))
        next(masks, None)  # the check that the scores did not change comes after the last one

    def _globally(self, pieces: Pieces) -> Iterator[torch.Tensor]:
        """Packed masks over chunks of all scores on disk, in model order."""
        total = sum(weight.weight.numel() for weight in self.output.weights.values())
        return select_stream(lambda: self._chunks(pieces), pruned_count(self.job.sparsity, total))

    def _chunks(self, pieces: Pieces) -> Iterator[torch.Tensor]:
        for index, names in self.output.names.items():
            stored = pieces.stored(index)
            for name in names:
                yield from _read_in_chunks(stored[name])

    def _parts(self, name: str, masks: Iterator[torch.Tensor]) -> list[torch.Tensor]:
        count = self.output.weights[name].weight.numel()
        return [next(masks) for _ in range(0, count, _SCORES_AT_ONCE)]

    def _masks_of(self, index: int, masks: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        bits = {}
        for name in self.output.names[index]:
            weight = self.output.weights[name]
            shape = weight.canonical(torch.empty(weight.weight.shape, device="meta")).shape
            bits[name] = as_stored(torch.cat(self._parts(name, masks)), shape, weight.transposed)
        return bits

    # The sweep ---------------------------------------------------------------------------------------------------

    def _sweep(self, gradients: Pieces | None = None, given: Pieces | None = None) -> None:
        """Choose or repair, from the first block up; each block sees the pruned ones before it."""
        job, output = self.job, self.output
        samples = sum(len(batch["input_ids"]) for batch in self.passes.batches)
        bits: dict[str, torch.Tensor] = {}
        values: dict[str, torch.Tensor] = {}

        def of(pieces: Pieces | None, name: str) -> torch.Tensor | None:
            return None if pieces is None else pieces.stored(output.block_of[name])[name].read()

        def visit(name: str, inputs: Inputs) -> torch.Tensor:
            weight, packed, gradient = output.weights[name], of(given, name), of(gradients, name)
            device = weight.weight.device
            kept, new = choose(
                weight,
                inputs,
                job.method,
                self._share(name),
                job.pattern,
                given=None
                if packed is None
                else weight.canonical(unpack_bits(packed, weight.weight.shape)).to(device),
                gradients=None if gradient is None else gradient.to(device),
                samples=samples,
                repair=job.repair,
            )
            bits[name] = pack_bits(weight.canonical(kept).contiguous()).cpu()
            if job.updates:
                values[name] = weight.canonical(new)
            return new

        def take(index: int) -> None:
            output.write(index, bits, values)
            bits.clear()
            values.clear()

        self.passes.sweep(output.masks, visit, take, gram=job.updates is not None)


def _read_in_chunks(stored: Stored) -> Iterator[torch.Tensor]:
    count = math.prod(stored.shape)
    for first in range(0, count, _SCORES_AT_ONCE):
        chunk = torch.empty(min(_SCORES_AT_ONCE, count - first))
        read_into(stored.file, stored.begin + first * chunk.itemsize, chunk)
        yield chunk
