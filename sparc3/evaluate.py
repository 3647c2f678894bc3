"""Perplexity of a model on windows of text, and the difference of two models on the same windows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sparc3.engine import Blocks
from sparc3.errors import InputError
from sparc3.samples import batches

# Logits in flight, in elements: 64 MiB in fp32, whatever the vocabulary and the length of a window.
_LOGITS_IN_FLIGHT = 1 << 24


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts windows of text.

    Attributes:
        value: exp of the mean negative log-likelihood of the predicted tokens.
        tokens: how many were predicted.
        context: tokens in a window, the BOS token included.
        nll: [N] float64, the mean negative log-likelihood of each window, in nats per token.
    """

    value: float
    tokens: int
    context: int
    nll: torch.Tensor


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a causal language model; every token of a window but its first is predicted.

    The value is that of the plain ``labels=`` loss. Logits are reduced in fp32, a chunk of positions at a
    time, so memory does not grow with length times vocabulary.

    Args:
        windows: [N, T] int64, as sparc3.samples.windows returns them.
        progress: called with (windows done, N) after each batch.

    Raises:
        InputError: fewer than two tokens in a window, more than the model has positions for, a token outside
            its vocabulary, or an architecture that is not declared.
    """
    count, length = windows.shape
    check_fits(model, windows)
    blocks = Blocks(model)
    means: list[torch.Tensor] = []
    for batch in batches(windows, batch_size):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        hidden, calls = blocks.record(batch)
        for index, call in enumerate(calls):
            hidden = blocks.run(index, hidden, call)
        labels = batch["input_ids"][:, 1:]
        chunk = max(1, _LOGITS_IN_FLIGHT // (len(labels) * model.config.vocab_size))
        total = torch.zeros(len(labels), dtype=torch.float64)
        for positions in torch.arange(length - 1, device=model.device).split(chunk):
            logits = blocks.logits(hidden, batch, positions).float()
            nll = cross_entropy(logits.flatten(0, 1), labels[:, positions].flatten(), reduction="none")
            total += nll.view(len(labels), -1).double().sum(1).cpu()
        means.append(total / (length - 1))
        if progress is not None:
            progress(sum(map(len, means)), count)
    nll = torch.cat(means)
    return Perplexity(nll.mean().exp().item(), count * (length - 1), length, nll)


def paired_interval(a: Perplexity, b: Perplexity, level: float = 0.95) -> Interval:
    """Mean of a's negative log-likelihood minus b's over the same windows, with Student's t-interval.

    Negative: a predicts better. a is ahead where ``high < 0``. Pairing takes out how hard each window is,
    which varies far more than the models do. In nats per token; exp of it is the ratio of the perplexities.

    Raises:
        InputError: the two were not measured on equally many windows of the same length, at least two.
    """
    if a.nll.shape != b.nll.shape or a.context != b.context or len(a.nll) < 2:
        raise InputError(
            f"a paired interval needs the same windows twice, at least 2: {len(a.nll)} of {a.context} tokens "
            f"and {len(b.nll)} of {b.context}"
        )
    if not 0 < level < 1:
        raise InputError(f"confidence level {level}: between 0 and 1, as 0.95")
    return mean_interval((a.nll - b.nll).tolist(), level)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of at least two values, with Student's t-interval."""
    half = _t_quantile(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return Interval(mean, mean - half, mean + half)


def _t_quantile(level: float, dof: int) -> float:
    """t with P(|T| <= t) = level for Student's T, by bisection on the angle atan(t / sqrt(dof))."""
    low, high = 0.0, math.pi / 2
    # 60 halvings of pi/2 come below the spacing of doubles near it.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, dof) < level else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(dof)


def _t_central(angle: float, dof: int) -> float:
    """P(|T| <= sqrt(dof) tan angle): the sums of Abramowitz and Stegun, 26.7.3 (odd dof) and 26.7.4."""
    odd = dof % 2 == 1
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(1 if odd else 0, dof - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def check_fits(model: PreTrainedModel, windows: torch.Tensor) -> None:
    """InputError unless the model has positions and a vocabulary for windows [N, T], and T is at least 2."""
    length = windows.shape[1]
    if length < 2:
        raise InputError(f"windows of {length} tokens: perplexity needs at least 2")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(f"windows of {length} tokens (BOS included), but the model has {limit} positions")
    vocabulary = model.config.vocab_size
    if windows.max() >= vocabulary:
        raise InputError(f"token {windows.max()} is outside the model's vocabulary of {vocabulary}")
