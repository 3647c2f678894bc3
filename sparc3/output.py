"""The output of a run block by block: the pruned model's shards and its mask, each written when it is known."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sparc3_kernels.select import apply_bits_, count_bits
from transformers import PreTrainedTokenizerBase

from sparc3.checkpoint import INDEX, read_header, write_tensors
from sparc3.families import Prunable, blocks_of, family_of, prunable
from sparc3.job import Job
from sparc3.mask import fingerprint, mask_metadata
from sparc3.models import NOTE_FILE
from sparc3.passes import SWEEP, passes
from sparc3.pieces import Pieces
from sparc3.plan import Plan
from sparc3.report import as_json, versions
from sparc3.unfinished import Unfinished
from sparc3.weights import OUTSIDE, Streamed


class Output:
    """The pruned model and its mask, block by block; a block's index, or their number for what is outside of them.

    Attributes:
        names: {index: names of its prunable weights}, in model order.
        block_of: {name: index}.
        masks: the parts of the mask; a block whose part is there is finished.
    """

    def __init__(self, job: Job, source: Streamed, run: Unfinished) -> None:
        self.job, self.source, self.run = job, source, run
        self.weights: dict[str, Prunable] = prunable(source.model, job.include, job.exclude)
        prefix = family_of(source.model).blocks
        self.depth = len(blocks_of(source.model))
        self.names: dict[int, list[str]] = {index: [] for index in range(self.depth + 1)}
        self.block_of: dict[str, int] = {}
        for name in self.weights:
            inside = name.startswith(f"{prefix}.")
            index = int(name.removeprefix(f"{prefix}.").split(".")[0]) if inside else self.depth
            self.names[index].append(name)
            self.block_of[name] = index
        upwards = SWEEP in passes(job.method, job.pattern, job.allocate, job.repair)
        self.masks = Pieces(run, "mask", self.depth, upwards)

    # One block ----------------------------------------------------------------------------------------------------

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
        self.masks.save(index, bits, note)

    def _group(self, index: int) -> int:
        return OUTSIDE if index == self.depth else index

    def _shard(self, index: int) -> str:
        number = 1 if index == self.depth else index + 2
        return f"model-{number:05d}-of-{self.depth + 1:05d}.safetensors"

    # All blocks ---------------------------------------------------------------------------------------------------

    def finish(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        report: Mapping[str, Any],
        plan: Plan,
        start: float,
        budgets: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Write what belongs to the whole model, and put the output in its place.

        Args:
            start: of the run, by time.perf_counter.
            budgets: the share that was pruned of each tensor, where they differ.
        """
        model, new = self.source.model, self.run.new
        settings = {
            **self.job.named_settings(),
            "sparsity": self.job.sparsity,
            "pattern": self.job.pattern,
            "by": "magnitude",
            **({} if budgets is None else {"budgets": dict(budgets)}),
            **({"updates": self.job.updates} if self.job.updates else {}),
            **({} if budgets is None else {"allocate": self.job.allocate}),
            **self.job.described,
        }
        notes = [self.masks.note(index) for index in range(self.depth + 1)]
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
        each = None if self.job.pattern == "global" else self.job.sparsity
        tensors = {
            name: {
                "shape": list(weight.weight.shape),
                "requested": each if budgets is None else budgets[name],
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
            for name, stored in self.masks.stored(index).items()
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
