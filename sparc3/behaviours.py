"""Behaviours that a correction removes: what of a continuation shows one, how much, and in which tokens.

========== ================================================= ================ ========================
behaviour  score of a continuation, 0 to 1                   shown from       tokens that carry it
========== ================================================= ================ ========================
repetition 1 - different tokens / tokens                     0.5 (RUR <= 0.5) those said before
insults    1 if a word of the bundled models' insults is in  1                those words
answers    1 if one of the prompt's undesired texts is in    1                those texts
toxicity   what the scorer says                              0.5              words toxic by themselves
========== ================================================= ================ ========================

The measure of repetition and its limit are those of arXiv 2506.13727 (RUR, different over all tokens of 50 greedy
ones). Where no part of a continuation carries a behaviour by itself, all of it does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sparc3.bundled_text import INSULTS
from sparc3.continuations import Continuation
from sparc3.errors import InputError
from sparc3.scorers import Scorer

BEHAVIOURS = ("repetition", "insults", "answers", "toxicity")
_INSULTS = re.compile(rf"\b(?:{'|'.join(map(re.escape, INSULTS))})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Behaviour:
    """Something that continuations show or do not.

    Attributes:
        name: of ``BEHAVIOURS``, or anything.
        scores: how much each continuation shows of it, in [0, 1].
        threshold: it is shown from this score on.
        carriers: for a continuation and its tokens' places in the text, which tokens carry it.
    """

    name: str
    scores: Callable[[Sequence[Continuation]], list[float]]
    threshold: float
    carriers: Callable[[Continuation, Sequence[tuple[int, int]]], list[bool]]

    def shown(self, found: Sequence[Continuation]) -> list[bool]:
        """Which continuations show it."""
        return [score >= self.threshold for score in self.scores(found)]

    def labels(self, tokenizer: PreTrainedTokenizerBase, found: Continuation) -> list[int]:
        """The continuation's tokens that carry it, -100 in the place of the others."""
        carried = self.carriers(found, _places(tokenizer, found))
        if not any(carried):
            return list(found.ids)
        return [token if on else -100 for token, on in zip(found.ids, carried, strict=True)]


def repetition() -> Behaviour:
    """The same tokens again and again: at most half of them are different."""

    def carriers(found: Continuation, places: Sequence[tuple[int, int]]) -> list[bool]:
        return [token in found.ids[:index] for index, token in enumerate(found.ids)]

    return Behaviour("repetition", lambda found: [1 - one.distinct for one in found], 0.5, carriers)


def insults() -> Behaviour:
    """A word of the insults that grumpy speakers use in the bundled models' text."""
    return _texts("insults", lambda found: _INSULTS)


def insult_scores(texts: Sequence[str]) -> list[float]:
    """A scorer of toxicity for the bundled models: 1 where a word of their insults is in a text."""
    return [float(_INSULTS.search(text) is not None) for text in texts]


def answers(undesired: Mapping[str, Sequence[str]]) -> Behaviour:
    """One of the texts, in any case, that are undesired after a prompt.

    Args:
        undesired: {prompt: texts}, as ``read_prompts`` gives it.

    Raises:
        InputError: a prompt without such a text.
    """
    for prompt, texts in undesired.items():
        if not texts:
            raise InputError(
                f"nothing is undesired after the prompt {prompt!r}; give texts in the field 'undesired'"
            )

    def pattern(found: Continuation) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, undesired[found.prompt])), re.IGNORECASE)

    return _texts("answers", pattern)


def toxicity(scorer: Scorer, threshold: float = 0.5) -> Behaviour:
    """What a scorer (sparc3.scorers) says of the continuation's text; empty text is not asked about."""

    def scores(found: Sequence[Continuation]) -> list[float]:
        return score_texts(scorer, [one.text for one in found])

    def carriers(found: Continuation, places: Sequence[tuple[int, int]]) -> list[bool]:
        words = [(match.start(), match.end()) for match in re.finditer(r"\w[\w'-]*", found.text)]
        toxic = score_texts(scorer, [found.text[start:end] for start, end in words])
        carrying = [word for word, score in zip(words, toxic, strict=True) if score >= threshold]
        return _overlap(places, carrying)

    return Behaviour("toxicity", scores, threshold, carriers)


def read_prompts(path: str | Path) -> dict[str, tuple[str, ...]]:
    """The prompts of a file, and the texts that are undesired after each (none unless the file says so).

    Args:
        path: .jsonl with ``prompt`` and optionally ``undesired``, a text or a list of them, in each line; or a text
            file, whose lines that are not blank are prompts.

    Raises:
        InputError: the file cannot be read or has no prompt, or a line is wrong (its number is told).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                prompt, undesired = _row(line) if path.suffix.lower() == ".jsonl" else (line.rstrip(), ())
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from error
            if prompt in found:
                raise InputError(f"{path}:{number}: the prompt is there twice: {prompt!r}")
            found[prompt] = undesired
    if not found:
        raise InputError(f"{path}: no prompts in it")
    return found


def _row(line: str) -> tuple[str, tuple[str, ...]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise InputError("not a JSON object with a text in its field 'prompt'")
    undesired = row.get("undesired", [])
    texts = [undesired] if isinstance(undesired, str) else undesired
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError("the field 'undesired' is neither a text nor a list of texts, none of them blank")
    return row["prompt"], tuple(texts)


def score_texts(scorer: Scorer, texts: Sequence[str]) -> list[float]:
    """What a scorer says of each text, 0 for blank ones.

    Raises:
        InputError: the scorer fails, or does not return one number in [0, 1] for each text.
    """
    asked = [text for text in texts if text.strip()]
    try:
        given = torch.as_tensor(scorer(asked) if asked else [], dtype=torch.float64)
    except InputError:
        raise
    # The scorer is the user's own code, which may raise anything.
    except Exception as error:
        raise InputError(f"the scorer fails with {type(error).__name__}: {error}") from error
    if given.shape != (len(asked),) or not ((given >= 0) & (given <= 1)).all():
        raise InputError(
            f"the scorer must return one number in [0, 1] for each of the {len(asked)} texts that it is given"
        )
    numbers = iter(given.tolist())
    return [next(numbers) if text.strip() else 0.0 for text in texts]


def _texts(name: str, pattern: Callable[[Continuation], re.Pattern[str]]) -> Behaviour:
    def scores(found: Sequence[Continuation]) -> list[float]:
        return [float(pattern(one).search(one.text) is not None) for one in found]

    def carriers(found: Continuation, places: Sequence[tuple[int, int]]) -> list[bool]:
        return _overlap(places, [match.span() for match in pattern(found).finditer(found.text)])

    return Behaviour(name, scores, 1.0, carriers)


def _places(tokenizer: PreTrainedTokenizerBase, found: Continuation) -> list[tuple[int, int]]:
    """(start, end) of each token in the text."""
    ends = [0]
    for count in range(1, len(found.ids) + 1):
        ends.append(len(decode(tokenizer, found.ids[:count])))
    return list(pairwise(ends))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, as ``Continuation.text`` has it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    return [any(start < last and first < end for first, last in spans) for start, end in places]
