"""Pruning block by block: a model that is larger than memory, read from disk and written back pruned.

The masks are those of ``sparc3.prune``, bit by bit. Each block is scored, selected from and written while its weights
are there; what is left of it then is its part of the mask. A threshold over the whole model needs every score first,
so pattern "global" leaves the scores on disk and goes through the blocks once more.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sparc3_kernels.select import apply_bits_, count_bits, pack_bits, select_stream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.boundaries import Boundaries, InMemory, OnDisk
from sparc3.checkpoint import INDEX, Checkpoint, Stored, read_header, read_into, write_tensors
from sparc3.compress import SEQUENTIAL, choose_in_sweep, default_settings
from sparc3.engine import GRADIENT, Blocks, Resume, attribute_batches
from sparc3.families import Prunable, blocks_of, family_of, prunable
from sparc3.inputs import Inputs
from sparc3.mask import fingerprint, mask_metadata
from sparc3.models import NOTE_FILE
from sparc3.plan import Plan
from sparc3.ranks import Ranks
from sparc3.report import as_json, versions
from sparc3.samples import Batch
from sparc3.schedules import activation_score, sweep
from sparc3.scores import (
    Accumulators,
    batches_on,
    check_explained,
    check_finite_scores,
    check_settings,
    sample_free_score,
)
from sparc3.select import as_stored, pruned_count, ranked, select_within
from sparc3.targets import TargetFunction
from sparc3.unfinished import Unfinished, note_of
from sparc3.weights import OUTSIDE, Streamed
from sparc3.wrap import wrap

# Scores that are read from disk at once: 16 MiB.
_SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Job:
    """What is pruned, and how; see sparc3.prune.

    Attributes:
        settings: of sparc3.attribute, over the pattern's default.
        described: more settings that the mask and the report name, plain JSON values.
    """

    method: str
    sparsity: float
    pattern: str
    samples: torch.Tensor | Sequence[Batch]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)

    @property
    def updates(self) -> str | None:
        """What changes the kept weights too."""
        return "sparsegpt" if self.method == "sparsegpt" else None


def identity_of(
    job: Job, model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device, processes: int = 1
) -> dict[str, Any]:
    """What a run depends on, plain JSON values: its bytes are the same where these are."""
    described = {
        name: value if isinstance(value, str | int | float | bool | None) else str(value)
        for name, value in job.settings.items()
    }
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "model": {
            "dtype": str(model.dtype),
            "config": _sha(as_json(config)),
            **_files(checkpoint),
        },
        "samples": _sha_samples(job.samples),
        "settings": {
            "method": job.method,
            "sparsity": job.sparsity,
            "pattern": job.pattern,
            "include": list(job.include),
            "exclude": list(job.exclude),
            **described,
        },
        "machine": {
            "device": device.type,
            "processes": processes,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "sparc3": versions()["packages"]["sparc3"],
        },
    }


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _files(checkpoint: Checkpoint) -> dict[str, str]:
    """{shard: a hash of its size, its header and 64 KiB from every tensor's place}."""
    files: dict[Path, Any] = {}
    for name, stored in sorted(checkpoint.tensors.items()):
        digest = files.setdefault(stored.file, hashlib.sha256(str(stored.file.stat().st_size).encode()))
        digest.update(f"{name} {stored.dtype} {stored.shape} {stored.begin}".encode())
        some = torch.empty(min(stored.bytes, 1 << 16), dtype=torch.uint8)
        read_into(stored.file, stored.begin + (stored.bytes - len(some)) // 2, some)
        digest.update(some.numpy().tobytes())
    return {file.name: digest.hexdigest() for file, digest in sorted(files.items())}


def _sha_samples(samples: torch.Tensor | Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in [{"input_ids": samples}] if isinstance(samples, torch.Tensor) else samples:
        for name, tensor in sorted(batch.items()):
            digest.update(
                f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes()
            )
    return digest.hexdigest()


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
    output = _Output(job, source, run)
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
    settings = _settings(job)
    if job.pattern == "global":
        output.select_globally()
    return output.finish(settings, tokenizer, report or {}, plan, start)


def _settings(job: Job) -> dict[str, Any]:
    """What the mask says of how it was made; as sparc3.prune."""
    settings: dict[str, Any] = {"method": job.method}
    chosen = {**default_settings(job.pattern), **job.settings}
    if job.method in ("lrp", "gradient"):
        target = chosen.get("target", "logprob")
        settings |= {
            "rule": str(_rule(job)),
            "target": target if isinstance(target, str) else getattr(target, "__name__", "callable"),
            "positions": chosen.get("positions", "all"),
            "reduce": chosen.get("reduce", "abs"),
            "skip_first": chosen.get("skip_first", False),
        }
    elif job.method == "random":
        settings |= {"seed": chosen.get("seed", 0)}
    sequential = job.method in SEQUENTIAL and job.pattern != "global"
    return settings | {"schedule": "sequential" if sequential else "one-shot"}


def _rule(job: Job) -> Any:
    chosen = {**default_settings(job.pattern), **job.settings}
    known = ("rule", "target", "positions", "reduce", "skip_first")
    return check_settings(job.method, **{name: chosen[name] for name in known if name in chosen})


def _boundaries(run: Unfinished, plan: Plan, ranks: Ranks) -> Boundaries:
    if not plan.on_disk:
        return InMemory(torch.device("cpu"))
    folder = run.scratch / f"boundaries-{ranks.rank}"
    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        left.unlink()
    return OnDisk(folder)


def _attribute(job: Job, source: Streamed, output: _Output, plan: Plan, ranks: Ranks) -> None:
    """Score by LRP or the gradient, from the last block down to the first."""
    chosen = {**default_settings(job.pattern), **job.settings}
    batches = list(ranks.share(batches_on(source.device, job.samples)))
    sink = Accumulators(output.weights, chosen.get("reduce", "abs"), chosen.get("skip_first", False), held=())
    boundaries = _boundaries(output.run, plan, ranks)
    depth = ranks.told(output.first_done())
    if depth is not None:
        for number, gradient in enumerate(output.load_state(depth, ranks.rank)):
            boundaries.put((GRADIENT, number), gradient.to(source.device))
    target: str | TargetFunction = chosen.get("target", "logprob")
    with wrap(source.model, _rule(job), output.weights, sink):
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
        self, batches: list[Batch], sink: Accumulators, boundaries: Boundaries, output: _Output, ranks: Ranks
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
        gradients = [self.boundaries.get((GRADIENT, number)) for number in range(len(self.batches))]
        self.output.save_state(index, gradients, self.ranks.rank)
        self.ranks.send(self.sink.sums.values())
        if self.ranks.writes:
            self.output.scored(index, self.sink.take())
        else:
            self.sink.sums = {}
        self.output.forget_states(self.ranks.rank)


def _in_sweep(job: Job, source: Streamed, output: _Output) -> None:
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
        output.save_state(index, outputs)
        if output.is_global:
            output.scored(index, scores)
        else:
            output.write(index, bits, values)
        output.forget_states()
        for parts in (scores, bits, values):
            parts.clear()

    sweep(
        source.model,
        batches_on(source.device, job.samples),
        output.weights,
        score if output.is_global else choose,
        gram=job.method == "sparsegpt",
        source=source,
        home=torch.device("cpu"),
        done=done,
        start=start,
        received=output.load_state(start - 1) if start else (),
    )


def _without_samples(job: Job, source: Streamed, output: _Output) -> None:
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


class _Output:
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

    def save_state(self, index: int, tensors: Sequence[torch.Tensor], rank: int = 0) -> None:
        """Keep what comes out of a block, for the next one."""
        named = {str(number): tensor.cpu() for number, tensor in enumerate(tensors)}
        self.run.save(self._file(f"state-{rank}", index), named)

    def load_state(self, index: int, rank: int = 0) -> list[torch.Tensor]:
        stored, _ = read_header(self._file(f"state-{rank}", index))
        return [stored[str(number)].read() for number in range(len(stored))]

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
        settings: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None,
        report: Mapping[str, Any],
        plan: Plan,
        start: float,
    ) -> dict[str, Any]:
        """Write what belongs to the whole model, and put the output in its place."""
        model, new = self.source.model, self.run.new
        settings = {
            **settings,
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
    try:
        import resource
    except ImportError:
        return None
    import sys

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _peak_device(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
