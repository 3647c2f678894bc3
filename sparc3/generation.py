"""Continue a text, and say how fast: prefill and decoding apart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from sparc3.errors import InputError


@dataclass(frozen=True)
class Generated:
    """A continuation and its times.

    Attributes:
        text: the new text, without the prompt.
        prompt_tokens, new_tokens: numbers of tokens.
        prefill_seconds: from the start to the first new token.
        decode_seconds: from the first new token to the last.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_speed(self) -> float | None:
        """New tokens a second after the first one; None where there is only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


class _Clock(BaseStreamer):
    """Notes when each token comes, and hands on the text that has become certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None] | None) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._shown = 0

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 2:  # the prompt, before the model runs
            return
        self.times.append(time.perf_counter())
        self.tokens += value.tolist()
        self._hand_on(end=False)

    def end(self) -> None:
        self._hand_on(end=True)

    @property
    def text(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _hand_on(self, end: bool) -> None:
        if self.show is None:
            return
        text = self.text
        # A character may take several tokens; until the last one it decodes as U+FFFD.
        if end or not text.endswith("\ufffd"):
            self.show(text[self._shown :])
            self._shown = len(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    show: Callable[[str], None] | None = None,
) -> Generated:
    """Continue ``prompt`` with ``model.generate``; one warm-up token before the clock runs.

    Args:
        temperature: 0 takes the likeliest token every time.
        seed: of the sampling.
        show: called with the prompt, and then with pieces of the new text as they come.

    Raises:
        InputError: the prompt has no tokens, or more than the model has positions for, the new ones included; the
            temperature is no finite number from 0 on.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature {temperature} is not a finite number from 0 on")
    batch: Any = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = batch["input_ids"]
    if not ids.numel():
        raise InputError("the prompt is empty, and the tokenizer begins no text with a token of its own")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] + max_new_tokens > positions:
        raise InputError(
            f"the prompt has {ids.shape[1]} tokens and {max_new_tokens} are to follow, but the model has {positions} "
            "positions: shorten the prompt or lower --max-new-tokens"
        )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "attention_mask": torch.ones_like(ids)}
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature}
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = model.generation_config.eos_token_id
    with torch.no_grad():
        model(ids[:, :1], use_cache=False)
        torch.manual_seed(seed)
        if show is not None:
            show(prompt)
        clock, start = _Clock(tokenizer, show), time.perf_counter()
        model.generate(ids, streamer=clock, **options)  # type: ignore[operator]
    return Generated(
        clock.text,
        ids.shape[1],
        len(clock.tokens),
        clock.times[0] - start,
        clock.times[-1] - clock.times[0],
    )
