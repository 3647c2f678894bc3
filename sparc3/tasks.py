"""Tasks that a circuit is sought for: prompts with a right and a wrong answer, ranked on some, judged on others.

Every example is a pair of prompts of equally many tokens, the clean one and one that is corrupted so that the answer
changes, and answers of one token each. A model is measured by its logit difference after the prompt,

    d = log sum_right exp(logit) - log sum_wrong exp(logit),

which for one right and one wrong answer is the difference of their two logits (Wang et al. 2022, arXiv 2211.00593),
and for sets of them (greater-than) the log of the ratio of their probabilities.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparc3 import bundled_text
from sparc3.bundled_words import IOI_ENDINGS, NAMES
from sparc3.errors import InputError
from sparc3.samples import prompts
from sparc3.targets import Batch, TargetFunction

TASKS = ("ioi", "ioi:bundled", "greater-than")
# Prompts that go through a model at once: some 20 tokens each, and the engine takes the logits of all of them.
_BATCH = 16
# Drawn for every example that is kept, before a task is said not to fit the tokenizer.
_TRIES = 64

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "one line of a task file (.jsonl)",
    "type": "object",
    "required": ["prompt", "corrupted", "answer", "wrong"],
    "properties": {
        "prompt": {"type": "string", "description": "the text that the answer follows"},
        "corrupted": {
            "type": "string",
            "description": "the same text changed so that the answer is another one, of as many tokens",
        },
        "answer": {
            "type": ["string", "array"],
            "items": {"type": "string"},
            "description": "what should follow, with its leading space: one token each; a list if several are right",
        },
        "wrong": {
            "type": ["string", "array"],
            "items": {"type": "string"},
            "description": "what should not follow, as answer",
        },
        "group": {
            "type": "string",
            "description": "optional: examples of a group (a template) are all ranked on or all judged on",
        },
    },
    "example": {
        "prompt": "When Mary and John went to the store, John gave a drink to",
        "corrupted": "When Mary and John went to the store, Mary gave a drink to",
        "answer": " Mary",
        "wrong": " John",
        "group": "gave",
    },
}


@dataclass(frozen=True)
class Example:
    """A clean and a corrupted prompt, and what should and should not follow the clean one.

    Attributes:
        prompt, corrupted: of equally many tokens.
        answer, wrong: texts of one token each; ``right_ids`` and ``wrong_ids`` are those tokens after ``prompt``.
        group: examples of one group are all on the same side of a split.
    """

    prompt: str
    corrupted: str
    answer: tuple[str, ...]
    wrong: tuple[str, ...]
    right_ids: tuple[int, ...]
    wrong_ids: tuple[int, ...]
    group: str


@dataclass(frozen=True)
class Task:
    """Examples to rank components on, and others to judge the circuit on; no group is in both."""

    name: str
    ranking: tuple[Example, ...]
    judging: tuple[Example, ...]


def load_task(
    source: str, tokenizer: PreTrainedTokenizerBase, examples: int = 128, seed: int = 0, bundled: bool = False
) -> Task:
    """The task of a name or a file.

    Args:
        source: ``ioi`` (indirect objects), ``ioi:bundled`` (the same in the words of the bundled models),
            ``greater-than`` (years), or a .jsonl file, see ``SCHEMA``.
        tokenizer: of the model that is asked; only prompts that it cuts as the task needs are drawn.
        examples: at most so many on each side.
        seed: of the draw, and of which groups of a file are judged on.
        bundled: the model is a bundled one, so that ``ioi`` means ``ioi:bundled``.

    Raises:
        InputError: no such task or file, the tokenizer does not fit the task, or a line of the file is wrong.
    """
    if examples < 1:
        raise InputError(f"{examples} examples: at least 1")
    if source == "greater-than":
        draw: Callable[[random.Random, bool], Example] = _greater_than(tokenizer)
    elif source == "ioi:bundled" or (source == "ioi" and bundled):
        source, draw = "ioi:bundled", _bundled_ioi(tokenizer)
    elif source == "ioi":
        draw = _ioi(tokenizer)
    elif source.endswith(".jsonl"):
        return _from_file(Path(source), tokenizer, examples, seed)
    else:
        raise InputError(f"task {source!r} is not known; use {' | '.join(TASKS)} or a .jsonl file")
    sides = [_generate(draw, source, examples, seed, judging) for judging in (False, True)]
    return Task(source, *sides)


def make_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    corrupted: str,
    answer: Sequence[str],
    wrong: Sequence[str],
    group: str = "",
) -> Example:
    """An example with its answers' tokens.

    Raises:
        InputError: the two prompts are equal, have no or not equally many tokens, an answer is not a single token
            after the prompt, or a token is both right and wrong.
    """
    if prompt == corrupted:
        raise InputError("the prompt and the corrupted prompt are equal")
    texts = [prompt, corrupted, *(prompt + text for text in (*answer, *wrong))]
    clean, other, *continued = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not clean:
        raise InputError("the prompt has no tokens")
    if len(clean) != len(other):
        raise InputError(
            f"the prompt has {len(clean)} tokens and the corrupted prompt {len(other)}; they must be equally many"
        )
    for text, ids in zip((*answer, *wrong), continued, strict=True):
        if ids[:-1] != clean:
            pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
            raise InputError(
                f"the answer {text!r} is not a single token after the prompt (alone: {len(pieces)})"
            )
    right_ids = tuple(ids[-1] for ids in continued[: len(answer)])
    wrong_ids = tuple(ids[-1] for ids in continued[len(answer) :])
    if not right_ids or not wrong_ids:
        raise InputError("there must be at least one right and one wrong answer")
    if {*right_ids} & {*wrong_ids}:
        raise InputError("an answer is both right and wrong")
    return Example(prompt, corrupted, tuple(answer), tuple(wrong), right_ids, wrong_ids, group)


def task_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[Batch]:
    """Examples as batches on the model's device, padded on the left.

    Returns:
        input_ids, corrupted_ids, attention_mask (of both) [B, T]; right, wrong [B, A], -1 where a row has fewer.

    Raises:
        InputError: a prompt is longer than the model has positions.
    """
    found: list[Batch] = []
    limit = getattr(model.config, "max_position_embeddings", None)
    for start in range(0, len(examples), _BATCH):
        part = examples[start : start + _BATCH]
        batch = prompts(tokenizer, [example.prompt for example in part])
        length = batch["input_ids"].shape[1]
        if limit is not None and length > limit:
            raise InputError(
                f"a prompt has {length} tokens (BOS included), but the model has {limit} positions"
            )
        batch = {
            **batch,
            "corrupted_ids": prompts(tokenizer, [example.corrupted for example in part])["input_ids"],
            "right": _padded([example.right_ids for example in part]),
            "wrong": _padded([example.wrong_ids for example in part]),
        }
        found.append({name: value.to(model.device) for name, value in batch.items()})
    return found


def counterpart(batch: Batch) -> Batch:
    """The batch of the corrupted prompts."""
    return {**batch, "input_ids": batch["corrupted_ids"]}


def logit_difference(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[B]: the logit difference d at the last position of logits [B, T, V]; a target, see sparc3.targets."""
    last = _wide(logits[:, -1])
    right, wrong = (_log_sum_exp(last, batch[side]) for side in ("right", "wrong"))
    return right - wrong


def _right_logit(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return _log_sum_exp(_wide(logits[:, -1]), batch["right"])


def _right_logprob(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    return _right_logit(logits, batch) - _wide(logits[:, -1]).logsumexp(1)


# What relevance may explain of a task, beside what it is measured by: what is said for the right answers alone.
TASK_TARGETS: dict[str, TargetFunction] = {
    "difference": logit_difference,
    "logit": _right_logit,
    "logprob": _right_logprob,
}


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_sum_exp(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    chosen = logits.gather(1, tokens.clamp(min=0))
    return chosen.masked_fill(tokens < 0, -torch.inf).logsumexp(1)


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), -1)
    for row, ids in enumerate(rows):
        out[row, : len(ids)] = torch.tensor(ids)
    return out


def _generate(
    draw: Callable[[random.Random, bool], Example], name: str, count: int, seed: int, judging: bool
) -> tuple[Example, ...]:
    """``count`` different examples of one side; fewer where the task has no more."""
    rng = random.Random(f"{name} {judging} {seed}")
    found: dict[str, Example] = {}
    reason = ""
    for _ in range(_TRIES * count):
        try:
            example = draw(rng, judging)
        # This draw does not suit the tokenizer; another may.
        except InputError as error:
            reason = str(error)
            continue
        found.setdefault(example.prompt, example)
        if len(found) == count:
            break
    if not found:
        raise InputError(f"task {name} does not fit this model's tokenizer: {reason}")
    return tuple(found.values())


# Half of these templates, and half of the names, are ranked on and the other half judged on.
_IOI_TEMPLATES = (
    "Then, {a} and {b} went to the {place}. {s} gave a {thing} to",
    "When {a} and {b} went to the {place}, {s} gave a {thing} to",
    "Then, {a} and {b} were working at the {place}. {s} decided to give a {thing} to",
    "While {a} and {b} were working at the {place}, {s} gave a {thing} to",
    "Then, {a} and {b} had a long talk. Afterwards, {s} said to",
    "After {a} and {b} went to the {place}, {s} gave a {thing} to",
    "When {a} and {b} got a {thing} at the {place}, {s} decided to give it to",
    "Friends {a} and {b} found a {thing} at the {place}. {s} gave it to",
    "After the lunch, {a} and {b} went to the {place}. {s} gave a {thing} to",
    "Yesterday, {a} and {b} met at the {place}, and {s} handed a {thing} to",
)
_IOI_PLACES = (
    "store park school garden market library museum station hospital office restaurant house".split()
)
_IOI_THINGS = "drink book ring key letter basket ball kiss snack necklace computer bone".split()


def _ioi(tokenizer: PreTrainedTokenizerBase) -> Callable[[random.Random, bool], Example]:
    def draw(rng: random.Random, judging: bool) -> Example:
        template = rng.choice(_IOI_TEMPLATES[judging::2])
        a, b = rng.sample(NAMES[judging::2], 2)
        giver, other = rng.choice(((a, b), (b, a)))
        words = {"a": a, "b": b, "place": rng.choice(_IOI_PLACES), "thing": rng.choice(_IOI_THINGS)}
        clean, corrupted = (template.format(s=s, **words) for s in (giver, other))
        return make_example(tokenizer, clean, corrupted, [f" {other}"], [f" {giver}"], template)

    return draw


def _bundled_ioi(tokenizer: PreTrainedTokenizerBase) -> Callable[[random.Random, bool], Example]:
    """Pairs of names that the bundled models never saw together are judged on, and other verbs and names."""
    verbs = sorted({ending.split()[2] for ending in IOI_ENDINGS})

    def draw(rng: random.Random, judging: bool) -> Example:
        while True:
            (row,) = bundled_text.ioi_prompts(1, rng.randrange(1 << 48), held_out=judging)
            # The verb follows the giver, after the last comma.
            verb = row["prompt"].rsplit(", ", 1)[1].split()[1]
            names = [NAMES.index(row[side].strip()) for side in ("answer", "wrong")]
            if verbs.index(verb) % 2 == judging and all(name % 2 == judging for name in names):
                break
        return make_example(tokenizer, row["prompt"], row["corrupted"], [row["answer"]], [row["wrong"]], verb)

    return draw


_EVENTS = (
    "war voyage reign drought siege trial project debate strike journey famine dynasty truce peace plague "
    "expedition alliance rebellion campaign dispute".split()
)


def _greater_than(tokenizer: PreTrainedTokenizerBase) -> Callable[[random.Random, bool], Example]:
    """The end of a span of years (Hanna et al. 2023, arXiv 2305.00586): two digits, or one where each is a token."""

    def draw(rng: random.Random, judging: bool) -> Example:
        event = rng.choice(_EVENTS[judging::2])
        century, year = rng.randint(11, 18), rng.randint(12, 88)
        text = "The {0} lasted from the year {1}{2:02} to the year {1}"
        clean, corrupted = (text.format(event, century, y) for y in (year, 1))
        answers = [f"{y:02}" for y in range(year + 1, 100)], [f"{y:02}" for y in range(year + 1)]
        try:
            return make_example(tokenizer, clean, corrupted, *answers, event)
        except InputError:
            tens = year // 10
            digits = [str(digit) for digit in range(tens + 1, 10)], [str(digit) for digit in range(tens)]
            return make_example(tokenizer, clean, corrupted, *digits, event)

    return draw


def _from_file(path: Path, tokenizer: PreTrainedTokenizerBase, examples: int, seed: int) -> Task:
    groups: dict[str, list[Example]] = {}
    for example in _lines(path, tokenizer):
        groups.setdefault(example.group, []).append(example)
    if len(groups) < 2:
        raise InputError(
            f"{path}: components are ranked on some examples and judged on others, so there must be at least two "
            f"{'groups' if groups else 'lines'}"
        )
    order = list(groups)
    random.Random(seed).shuffle(order)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for group in order:
        # The smaller side first, so that neither stays empty.
        min(sides, key=len).extend(groups[group])
    ranking, judging = (tuple(side[:examples]) for side in sides)
    return Task(str(path), ranking, judging)


def _lines(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _parse(line, tokenizer)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from error


def _parse(line: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError("not a JSON object")
    missing = [name for name in SCHEMA["required"] if name not in row]
    if missing:
        raise InputError(f"no field {missing[0]!r} (sparc3 circuit --schema prints the format)")
    for name in ("prompt", "corrupted"):
        if not isinstance(row[name], str):
            raise InputError(f"the field {name!r} is not a string")
    answers = {name: [row[name]] if isinstance(row[name], str) else row[name] for name in ("answer", "wrong")}
    for name, texts in answers.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"the field {name!r} is neither a string nor a list of strings")
    group = row.get("group", row["prompt"])
    if not isinstance(group, str):
        raise InputError("the field 'group' is not a string")
    return make_example(
        tokenizer, row["prompt"], row["corrupted"], answers["answer"], answers["wrong"], group
    )
