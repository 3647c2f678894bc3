"""The output of a run block by block: shards, masks and what a resumed run needs, each written when it is known.

A threshold over the whole model needs every score first, so pattern "global" leaves the scores on disk and goes
through the blocks once more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sparc3_kernels.select import apply_bits_, count_bits, select_stream
from transformers import PreTrainedTokenizerBase

from sparc3.checkpoint import INDEX, Stored, read_header, read_into, write_tensors
from sparc3.compress import SEQUENTIAL
from sparc3.families import Prunable, blocks_of, family_of, prunable
from sparc3.job import Job
from sparc3.mask import fingerprint, mask_metadata
from sparc3.models import NOTE_FILE
from sparc3.plan import Plan
from sparc3.report import as_json, versions
from sparc3.samples import Batch
from sparc3.scores import check_finite_scores
from sparc3.select import as_stored, pruned_count, ranked, select_within
from sparc3.unfinished import Unfinished, note_of
from sparc3.weights import OUTSIDE, Streamed

# Scores that are read from disk at once: 16 MiB.
_SCORES_AT_ONCE = 1 << 22


class Output:
    """The pruned model and its mask, block by block; a block's index, or their number for what is outside of them.

    Attributes:
        names: {index: names of its prunable weights}, in model order.
    """

    def __init__(self, job: Job, source: Streamed, run: Unfinished) -> None:
        self.job, self.source, self.run = job, source, run
        self.weights: dict[str, Prunable] = prunable(source.model, job.include, job.exclude)
        prefix = family_of(source.model).blocks
        self.depth = len(blocks_of(source.model))
        self.names: dict[int, list[str]] = {index: [] for index in range(self.depth + 1)}
        for name in self.weights:
            inside = name.startswith(f"{prefix}.")
            index = int(name.removeprefix(f"{prefix}.").split(".")[0]) if inside else self.depth
            self.names[index].append(name)
        self.is_global = job.pattern == "global"

    # Progress of the run ------------------------------------------------------------------------------------------

    def _file(self, kind: str, index: int) -> Path:
        return self.run.scratch / f"{kind}-{index:05d}.safetensors"

    def is_done(self, index: int) -> bool:
        """Whether a block's scores need not be made again."""
        return self._file("scores" if self.is_global else "mask", index).is_file()

    def is_scored(self) -> bool:
        return all(map(self.is_done, range(self.depth + 1)))

    def first_done(self) -> int | None:
        """The lowest block from which on all blocks above are done."""
        done = None
        for index in range(self.depth, -1, -1):
            if not self.is_done(index):
                break
            done = index
        return done

    def save_state(
        self, index: int, tensors: Iterable[torch.Tensor], batches: Sequence[Batch], rank: int = 0
    ) -> None:
        """Keep what comes out of a block, for the next one; of all batches it may be more than memory holds."""
        model = self.source.model
        shapes = {
            str(number): (model.dtype, (*batch["input_ids"].shape, model.config.hidden_size))
            for number, batch in enumerate(batches)
        }
        with self.run.write(self._file(f"state-{rank}", index)) as file:
            write_tensors(file, shapes, tensors, {})

    def load_state(self, index: int, rank: int = 0) -> Iterator[torch.Tensor]:
        stored, _ = read_header(self._file(f"state-{rank}", index))
        for number in range(len(stored)):
            yield stored[str(number)].read()

    def forget_states(self, rank: int = 0) -> None:
        """Remove what blocks left that were done before the one that is done last."""
        done = [index for index in range(self.depth + 1) if self.is_done(index)]
        last = (max if self.job.method in SEQUENTIAL else min)(done, default=None)
        for index in done:
            if index != last:
                self._file(f"state-{rank}", index).unlink(missing_ok=True)

    # One block ----------------------------------------------------------------------------------------------------

    def scored(self, index: int, scores: dict[str, torch.Tensor]) -> None:
        """Take the scores [..., out, in] of a block whose weights are in the model."""
        check_finite_scores(scores, self.weights)
        if self.is_global:
            keys = {name: ranked(scores.pop(name).cpu(), "magnitude") for name in list(scores)}
            self.run.save(self._file("scores", index), keys)
            return
        bits = {}
        for name in self.names[index]:
            weight, tensor = self.weights[name], scores.pop(name).cpu()
            packed = select_within(tensor, self.job.sparsity, self.job.pattern)
            bits[name] = as_stored(packed, tensor.shape, weight.transposed)
        self.write(index, bits)

    def write(
        self, index: int, bits: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor] = {}
    ) -> None:
        """Write a block's pruned weights, then its part of the mask, which says that the block is done.

        Args:
            values: the weights as stored, where kept ones changed too.
        """
        identity = fingerprint(self.source.model, {name: self.weights[name].weight for name in bits})
        kept = {name: count_bits(packed) for name, packed in bits.items()}
        for name, packed in bits.items():
            weight = self.weights[name].weight.detach()
            if name in values:
                weight.copy_(values[name])
            else:
                apply_bits_(weight, packed.to(weight.device))
        self.run.save(
            self.run.new / self._shard(index), self.source.held(self._group(index)), None, {"format": "pt"}
        )
        note = {"tensors": identity["tensors"], "kept": kept}
        self.run.save(self._file("mask", index), bits, note)

    def _group(self, index: int) -> int:
        return OUTSIDE if index == self.depth else index

    def _shard(self, index: int) -> str:
        number = 1 if index == self.depth else index + 2
        return f"model-{number:05d}-of-{self.depth + 1:05d}.safetensors"

    # All blocks ---------------------------------------------------------------------------------------------------

    def select_globally(self) -> None:
        """Find the threshold over all scores on disk, and write every block."""
        total = sum(weight.weight.numel() for weight in self.weights.values())
        order = [index for index in range(self.depth + 1) if not self._file("mask", index).is_file()]
        masks = select_stream(self._chunks, pruned_count(self.job.sparsity, total))
        for index in range(self.depth + 1):
            if index not in order:
                self._masks_of(index, masks)  # what ties they keep counts for the blocks that follow
        for index in self.source.visit([index for index in order if index < self.depth]):
            self.write(index, self._masks_of(index, masks))
        if self.depth in order:
            with self.source.outside():
                self.write(self.depth, self._masks_of(self.depth, masks))
        next(masks, None)  # the check that the scores did not change comes after the last one

    def _stored_scores(self, index: int) -> dict[str, Stored]:
        return read_header(self._file("scores", index))[0]

    def _chunks(self) -> Iterator[torch.Tensor]:
        for index, names in self.names.items():
            stored = self._stored_scores(index)
            for name in names:
                count, begin = math.prod(stored[name].shape), stored[name].begin
                for first in range(0, count, _SCORES_AT_ONCE):
                    chunk = torch.empty(min(_SCORES_AT_ONCE, count - first))
                    read_into(stored[name].file, begin + first * chunk.itemsize, chunk)
                    yield chunk

    def _masks_of(self, index: int, masks: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        bits = {}
        for name in self.names[index]:
            weight = self.weights[name]
            shape = weight.canonical(torch.empty(weight.weight.shape, device="meta")).shape
            parts = [next(masks) for _ in range(0, math.prod(shape), _SCORES_AT_ONCE)]
            bits[name] = as_stored(torch.cat(parts), shape, weight.transposed)
        return bits

    def finish(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        report: Mapping[str, Any],
        plan: Plan,
        start: float,
    ) -> dict[str, Any]:
        """Write what belongs to the whole model, and put the output in its place."""
        model, new = self.source.model, self.run.new
        settings = {
            **self.job.named_settings(),
            "sparsity": self.job.sparsity,
            "pattern": self.job.pattern,
            "by": "magnitude",
            **({"updates": self.job.updates} if self.job.updates else {}),
            **self.job.described,
        }
        notes = [note_of(self._file("mask", index)) for index in range(self.depth + 1)]
        kept = {name: count for note in notes for name, count in note["kept"].items()}
        identity = fingerprint(model, {})
        identity["tensors"] = {name: entry for note in notes for name, entry in note["tensors"].items()}
        self._write_mask(identity, settings)
        self._write_index()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(new)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if note := self.job.described.get("note"):
            (new / NOTE_FILE).write_text(note, encoding="utf-8")
        each = None if self.is_global else self.job.sparsity
        tensors = {
            name: {
                "shape": list(weight.weight.shape),
                "requested": each,
                "achieved": 1 - kept[name] / weight.weight.numel(),
            }
            for name, weight in self.weights.items()
        }
        total = sum(weight.weight.numel() for weight in self.weights.values())
        described = {
            **report,
            "settings": settings,
            "sparsity": {"requested": self.job.sparsity, "achieved": 1 - sum(kept.values()) / total},
            "tensors": tensors,
            "streamed": {
                "identity": self.run.identity,
                "plan": plan.as_json(),
                "seconds": time.perf_counter() - start,
                "peak_rss": peak_rss(),
                "peak_device": _peak_device(self.source.device),
            },
            **versions(),
        }
        with self.run.write(new / "report.json") as file:
            file.write((as_json(described) + "\n").encode())
        self.run.finish()
        return described

    def _write_mask(self, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """mask.safetensors out of the blocks' parts, as Mask.save writes it."""
        parts = {
            name: stored
            for index in range(self.depth + 1)
            for name, stored in read_header(self._file("mask", index))[0].items()
        }
        shapes = {name: tuple(weight.weight.shape) for name, weight in self.weights.items()}
        ordered = sorted(parts)  # as safetensors orders tensors of one type
        with self.run.write(self.run.new / "mask.safetensors") as file:
            write_tensors(
                file,
                {name: (parts[name].dtype, parts[name].shape) for name in ordered},
                (parts[name].read() for name in ordered),
                mask_metadata(shapes, identity, settings),
            )

    def _write_index(self) -> None:
        weight_map, size = {}, 0
        for index in range(self.depth + 1):
            for name, stored in read_header(self.run.new / self._shard(index))[0].items():
                weight_map[name] = self._shard(index)
                size += stored.bytes
        with self.run.write(self.run.new / INDEX) as file:
            file.write(as_json({"metadata": {"total_size": size}, "weight_map": weight_map}).encode())


def peak_rss() -> int | None:
    """The most bytes that this process had resident so far; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands ru_maxrss on from the process that started this one, if that was larger.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    import sys

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _peak_device(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
