"""What a run block by block prunes, and how; and what identifies it, so that another run is not mixed into it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparc3.checkpoint import Checkpoint, read_into
from sparc3.compress import default_settings
from sparc3.passes import in_sweep
from sparc3.report import as_json, versions
from sparc3.rules import Rule
from sparc3.samples import Batch
from sparc3.scores import check_settings


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
    allocate: str = "uniform"
    repair: bool = False

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings of sparc3.attribute, the pattern's defaults among them."""
        return {**default_settings(self.pattern), **self.settings}

    @property
    def rule(self) -> Rule:
        """What lrp and gradient go backwards by."""
        known = ("rule", "target", "positions", "reduce", "skip_first")
        return check_settings(
            self.method, **{name: value for name, value in self.chosen.items() if name in known}
        )

    def named_settings(self) -> dict[str, Any]:
        """What the mask says of how its scores were made; as sparc3.prune."""
        settings: dict[str, Any] = {"method": self.method}
        chosen = self.chosen
        if self.method in ("lrp", "gradient"):
            target = chosen.get("target", "logprob")
            settings |= {
                "rule": str(self.rule),
                "target": target if isinstance(target, str) else getattr(target, "__name__", "callable"),
                "positions": chosen.get("positions", "all"),
                "reduce": chosen.get("reduce", "abs"),
                "skip_first": chosen.get("skip_first", False),
            }
        elif self.method == "random":
            settings |= {"seed": chosen.get("seed", 0)}
        sequential = in_sweep(self.method, self.pattern)
        return settings | {"schedule": "sequential" if sequential else "one-shot"}

    @property
    def updates(self) -> str | None:
        """What changes the kept weights too."""
        if self.repair:
            return "least squares"
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
            "allocate": job.allocate,
            "repair": job.repair,
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
