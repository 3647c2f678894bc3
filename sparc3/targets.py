"""What is explained: one scalar per sample, from the logits.

A named target is summed over the explained positions (all that have a next token, or the last one), which lets
the engine take it in chunks of positions without the logits of a whole sequence at once. A callable
``(logits [B, T, V], batch) -> [B]`` is taken over all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from sparc3.errors import InputError

Batch = Mapping[str, torch.Tensor]
TargetFunction = Callable[[torch.Tensor, Batch], torch.Tensor]


def _gather(values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return values.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    # cross_entropy's backward writes the logits' gradient once; gather - logsumexp writes it three times.
    return -F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


def _lead(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    chosen = labels.clamp(min=0).unsqueeze(-1)
    return _gather(logits, labels) - logits.scatter(-1, chosen, -torch.inf).amax(-1)


# name -> (logits [..., V] in at least fp32, labels [...], -100 where nothing is explained) -> [...]
TARGETS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "logit": _gather,
    "logit-mean": lambda logits, labels: _gather(logits, labels) - logits.mean(-1),
    "logprob": _log_probability,
    "lead": _lead,  # over the best other token
    "max-logit": lambda logits, labels: logits.amax(-1),
}
POSITIONS = ("all", "last")


def check_target(target: str | TargetFunction, positions: str) -> None:
    """InputError unless the target and the positions are known."""
    if isinstance(target, str) and target not in TARGETS:
        raise InputError(f"target {target!r} is not known; use {' | '.join(TARGETS)} or a callable")
    if positions not in POSITIONS:
        raise InputError(f"positions {positions!r} are not known; use {' | '.join(POSITIONS)}")


def next_tokens(batch: Batch, positions: str = "all") -> torch.Tensor:
    """The token to explain at each position, -100 where nothing is explained.

    Args:
        batch: input_ids [B, T], attention_mask [B, T] (optional), labels [B, T] (optional: taken as they are).
        positions: "all" real positions with a real next token, or the "last" one that has one. Where ``labels``
            are given, "last" keeps the last labelled position.

    Returns:
        [B, T] int64.
    """
    ids = batch["input_ids"]
    if "labels" in batch:
        labels = batch["labels"]
    else:
        mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)
        real = (mask[:, :-1] * mask[:, 1:]).bool()
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = torch.where(real, ids[:, 1:], labels[:, :-1])
    if positions == "last":
        order = torch.arange(labels.shape[1], device=labels.device)
        last = torch.where(labels >= 0, order, -1).amax(1, keepdim=True)
        labels = torch.where(order == last, labels, -100)
    return labels


def target_value(
    logits: torch.Tensor, batch: Batch, target: str | TargetFunction, positions: str = "all"
) -> torch.Tensor:
    """[B]: the explained scalar of each sample, from all its logits [B, T, V]."""
    if not isinstance(target, str):
        return target(logits, batch)
    labels = next_tokens(batch, positions)
    return explained(logits, labels, target)


def explained(logits: torch.Tensor, labels: torch.Tensor, target: str) -> torch.Tensor:
    """[B]: sum of a named target over the positions whose label is not -100; logits [B, C, V], labels [B, C]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return (TARGETS[target](wide, labels) * (labels >= 0)).sum(1)
