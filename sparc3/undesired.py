"""Continuations that show a behaviour: found by running prompts, and as batches that label what is undesired."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3.behaviours import Behaviour
from sparc3.continuations import Continuation, continuations
from sparc3.errors import InputError
from sparc3.samples import prompts
from sparc3.targets import Batch

# Continuations that are explained at once: some 70 tokens each.
_BATCH = 8
# Prompts that are run before it is looked whether enough of them show the behaviour.
_ROUND = 32


def find_shown(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    texts: Sequence[str],
    tokens: int = 50,
    enough: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Continuation], int]:
    """(Continuations that show the behaviour, prompts run), prompts in their order until ``enough`` are found.

    Raises:
        InputError: fewer than two continuations show it.
    """
    texts = list(dict.fromkeys(texts))
    found: list[Continuation] = []
    highest, run = 0.0, 0
    while run < len(texts) and (enough is None or len(found) < enough):
        said = continuations(model, tokenizer, texts[run : run + _ROUND], tokens, progress)
        run += len(said)
        scores = behaviour.scores(said)
        highest = max(highest, *scores)
        found += [one for one, score in zip(said, scores, strict=True) if score >= behaviour.threshold]
    if len(found) < 2:
        raise InputError(
            f"the model does not show {behaviour.name}: {len(found)} of {run} prompts have a continuation that does "
            f"(highest score {highest:.3g}, shown from {behaviour.threshold:g}), and at least 2 are needed. "
            "Nothing is pruned; give prompts that provoke it"
        )
    return found, run


def explained_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    behaviour: Behaviour,
    found: Sequence[Continuation],
) -> list[Batch]:
    """Prompts with their continuations on the model's device; labels are the tokens that carry the behaviour."""
    parts = [found[start : start + _BATCH] for start in range(0, len(found), _BATCH)]
    batches = [_batch(tokenizer, behaviour, part) for part in parts]
    return [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]


def _batch(tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour, part: Sequence[Continuation]) -> Batch:
    """input_ids, attention_mask and labels [B, T], padded on the right."""
    starts = prompts(tokenizer, [one.prompt for one in part], "right")
    lengths = starts["attention_mask"].sum(1).tolist()
    width = max(length + len(one.ids) for length, one in zip(lengths, part, strict=True))
    ids = torch.zeros(len(part), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (length, one) in enumerate(zip(lengths, part, strict=True)):
        end = length + len(one.ids)
        ids[row, :length] = starts["input_ids"][row, :length]
        ids[row, length:end] = torch.tensor(one.ids)
        mask[row, :end] = 1
        # The label of a position is the token after it.
        labels[row, length - 1 : end - 1] = torch.tensor(behaviour.labels(tokenizer, one))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
