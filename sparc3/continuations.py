"""Greedy continuations of prompts, in batches and with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparc3.errors import InputError
from sparc3.samples import prompts

_BATCH = 32


@dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt.

    Attributes:
        prompt, text: the text given, and what follows it.
        ids: the tokens that follow, without the one that ends a text.
    """

    prompt: str
    text: str
    ids: tuple[int, ...]

    @property
    def distinct(self) -> float:
        """Different tokens over all tokens (the paper's RUR), 1 where there are none."""
        return len({*self.ids}) / len(self.ids) if self.ids else 1.0


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tokens: int = 50,
    progress: Callable[[int], None] | None = None,
) -> list[Continuation]:
    """The greedy continuation of each text, of at most ``tokens`` tokens, in the order of the texts.

    Args:
        progress: called with the number of texts done since the last call.

    Raises:
        InputError: a text without tokens, or one that leaves the model no position for ``tokens`` more.
    """
    ends = model.generation_config.eos_token_id if model.generation_config else None
    stop = [ends] if isinstance(ends, int) else ends or []
    limit = getattr(model.config, "max_position_embeddings", None)
    # Texts of alike length together: least padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, Continuation] = {}
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        batch = prompts(tokenizer, [texts[index] for index in part])
        length = batch["input_ids"].shape[1] + tokens
        if limit is not None and length > limit:
            raise InputError(
                f"a prompt and its continuation take {length} tokens (BOS included), but the model has {limit} "
                "positions; give shorter prompts or fewer tokens"
            )
        for index, ids in zip(part, _greedy(model, batch, tokens, stop), strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            found[index] = Continuation(texts[index], text, tuple(ids))
        if progress is not None:
            progress(len(part))
    return [found[index] for index in range(len(texts))]


def _greedy(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], tokens: int, ends: Sequence[int]
) -> list[list[int]]:
    """Up to ``tokens`` most likely tokens for each row, up to the first of ``ends``."""
    pad = ends[0] if ends else 0
    settings = {
        "max_new_tokens": tokens,
        "do_sample": False,
        "eos_token_id": [*ends] or None,
        "pad_token_id": pad,
    }
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with _plain(model):
        generate: Any = model.generate
        rows = generate(**inputs, generation_config=GenerationConfig(**settings))
    found = []
    for row in rows[:, batch["input_ids"].shape[1] :].tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        found.append(row[:stop])
    return found


@contextmanager
def _plain(model: PreTrainedModel) -> Iterator[None]:
    """Within the context the checkpoint's own generation settings, such as a repetition penalty, are out of reach.

    ``generate`` fills what it is not given with them, and what a model says without them is what is measured.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
