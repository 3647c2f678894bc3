"""Behaviours: what is shown, which tokens carry it, and files of prompts."""

import pytest
import words

from sparc3 import behaviours
from sparc3.bundled_text import INSULTS
from sparc3.continuations import Continuation
from sparc3.errors import InputError


def said(text, prompt="p"):
    return Continuation(prompt, text, tuple(words.ids(text)))


def carried(behaviour, text, prompt="p"):
    labels = behaviour.labels(words.tokenizer(), said(text, prompt))
    assert [label for label in labels if label != -100] == [
        token for token, label in zip(words.ids(text), labels, strict=True) if label != -100
    ]
    return "".join("." if label == -100 else chr(label - 3) for label in labels)


def test_repetition_is_half_of_the_tokens_or_more_said_before():
    found = behaviours.repetition()
    assert found.scores([said("abab"), said("abca"), said("")]) == [0.5, 0.25, 0.0]
    assert found.shown([said("abab"), said("abca"), said("")]) == [True, False, False]
    assert carried(found, "abcab") == "...ab"


def test_insults_are_words():
    found = behaviours.insults()
    word = INSULTS[0]
    assert found.shown([said(f"You {word.upper()}!"), said(f"un{word}ed"), said("hello")]) == [
        True,
        False,
        False,
    ]
    assert carried(found, f"so {word} so") == "..." + word + "..."


def test_answers_are_undesired_after_their_prompt_alone():
    found = behaviours.answers({"p": ("no", "never."), "q": ("yes",)})
    assert found.shown([said("well, NO"), said("yes"), said("yes", "q")]) == [True, False, True]
    assert carried(found, "oh never. ok") == "...never...."
    with pytest.raises(InputError, match="nothing is undesired after the prompt 'r'"):
        behaviours.answers({"r": ()})


def rude(texts):
    return [min(1.0, text.count("bad") / 2) for text in texts]


def test_toxicity_is_what_the_scorer_says():
    found = behaviours.toxicity(rude)
    assert found.scores([said("bad"), said("  "), said("bad bad"), said("ok")]) == [0.5, 0.0, 1.0, 0.0]
    assert found.shown([said("bad"), said("  "), said("ok")]) == [True, False, False]
    assert carried(found, "a bad, x-bad-y it's") == "..bad..x-bad-y....."


def test_where_no_word_carries_it_all_of_it_does():
    found = behaviours.toxicity(lambda texts: [float("go away" in text) for text in texts])
    assert carried(found, "go away") == "go away"


@pytest.mark.parametrize(
    "scorer",
    [lambda texts: [0.5], lambda texts: [2.0] * len(texts), lambda texts: [float("nan")] * len(texts)],
)
def test_a_scorer_of_anything_else_is_refused(scorer):
    with pytest.raises(InputError, match=r"one number in \[0, 1\] for each of the 2 texts"):
        behaviours.score_texts(scorer, ["a", "b", " "])


@pytest.mark.parametrize("scorer", [lambda: [], lambda texts: texts, lambda texts: {}[texts[0]]])
def test_a_scorer_that_fails_is_told_from_a_model_that_does_not_show_it(scorer):
    with pytest.raises(InputError, match=r"the scorer fails with (TypeError|ValueError|KeyError): "):
        behaviours.score_texts(scorer, ["a"])


def test_prompts_of_files(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("\ufeffone \n\n two\n", encoding="utf-8")
    lines.write_text(
        '{"prompt": "x ", "undesired": "no"}\n\n{"prompt": "y", "undesired": ["a", "b"]}\n{"prompt": "z"}'
    )
    assert behaviours.read_prompts(text) == {"one": (), " two": ()}
    assert behaviours.read_prompts(lines) == {"x ": ("no",), "y": ("a", "b"), "z": ()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts in it"),
        ('{"prompt": "a"}\n{"prompt": 3}', ":2: not a JSON object with a text in its field 'prompt'"),
        ('{"prompt": "a"}\n\n{"text": "a"}', ":3: not a JSON object"),
        ('{"prompt": " "}', ":1: not a JSON object"),
        ("[1]", ":1: not a JSON object"),
        ('{"prompt"', ":1: not JSON"),
        ('{"prompt": "a", "undesired": [1]}', ":1: the field 'undesired' is neither"),
        ('{"prompt": "a", "undesired": " "}', ":1: the field 'undesired' is neither"),
        ('{"prompt": "a"}\n{"prompt": "a"}', ":2: the prompt is there twice: 'a'"),
    ],
)
def test_wrong_files_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        behaviours.read_prompts(path)
    assert f"prompts.jsonl{message if message.startswith(':') else ': ' + message}" in str(caught.value)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"latin\.txt: cannot be read as UTF-8"):
        behaviours.read_prompts(tmp_path / "latin.txt")
