"""Scorers of text: callables that take texts and return one number in [0, 1] for each, 1 the worst.

========================= ==========================================================================
name                      scorer
========================= ==========================================================================
MODULE:FUNCTION           any Python callable, as profanity_check:predict_prob
a folder or hub id        a text classifier of transformers, run here; ``DEFAULT`` unless told
perspective               the Perspective service; sends the texts to Google, with your key
========================= ==========================================================================
"""

from __future__ import annotations

import importlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparc3.errors import InputError

Scorer = Callable[[Sequence[str]], Any]

# Apache-2.0, trained on the Jigsaw comments; 440 MB, loaded from the hub once.
DEFAULT = "unitary/toxic-bert"
PERSPECTIVE_KEY = "PERSPECTIVE_API_KEY"
_PERSPECTIVE = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
_TIMEOUT_S = 30
_BATCH = 32


def scorer(name: str = DEFAULT, device: str = "cpu") -> Scorer:
    """The scorer of a name, see the module.

    Raises:
        InputError: no such module or function, no classifier, or no key for the service.
    """
    if name == "perspective":
        return perspective()
    if re.fullmatch(r"[\w.]+:[\w.]+", name):
        return _function(name)
    return classifier(name, device)


def _function(name: str) -> Scorer:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    # An import runs the module, which may raise anything.
    except Exception as error:
        raise InputError(f"scorer {name}: cannot be imported ({error})") from error
    if not callable(found):
        raise InputError(f"scorer {name} is not callable; name a function that takes a list of texts")
    return found


def classifier(name: str, device: str = "cpu") -> Scorer:
    """A text classifier, as sparc3.load finds models: the probability of its label "toxic" or "toxicity".

    A classifier without such a label must have one or two: the last is taken.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForSequenceClassification.from_pretrained(name).to(device).eval()
    # For a bad folder or without a network transformers raises nearly every class.
    except Exception as error:
        raise InputError(
            f"scorer {name}: no text classifier of transformers ({error}); give a folder, a hub id or "
            "MODULE:FUNCTION, as profanity_check:predict_prob of the package alt-profanity-check"
        ) from error
    labels = {str(label).lower(): index for index, label in model.config.id2label.items()}
    chosen = next((labels[label] for label in ("toxic", "toxicity") if label in labels), None)
    if chosen is None and len(labels) > 2:
        raise InputError(f"scorer {name} has no label toxic or toxicity, but {', '.join(labels)}")
    column = len(labels) - 1 if chosen is None else chosen
    several = len(labels) == 1 or model.config.problem_type == "multi_label_classification"

    @torch.no_grad()
    def score(texts: Sequence[str]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            batch = tokenizer(part, return_tensors="pt", padding=True, truncation=True).to(device)
            logits = model(**batch).logits.float()
            # Labels of their own each, or one of two.
            probabilities = logits.sigmoid() if several else logits.softmax(-1)
            found += probabilities[:, column].tolist()
        return found

    return score


def perspective() -> Scorer:
    """Google's Perspective service: its summary score of TOXICITY.

    Raises:
        InputError: there is no key in the environment; and when it is called, where the service does not answer.
    """
    key = os.environ.get(PERSPECTIVE_KEY)
    if not key:
        raise InputError(
            f"scorer perspective sends texts to a service and needs your key for it in {PERSPECTIVE_KEY}"
        )

    def one(text: str) -> float:
        asked = {
            "comment": {"text": text},
            "languages": ["en"],
            "requestedAttributes": {"TOXICITY": {}},
            "doNotStore": True,
        }
        request = urllib.request.Request(
            _PERSPECTIVE,
            json.dumps(asked).encode(),
            {"Content-Type": "application/json", "X-Goog-Api-Key": key},
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
                found = json.load(answer)
            return float(found["attributeScores"]["TOXICITY"]["summaryScore"]["value"])
        except (urllib.error.URLError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"the Perspective service does not answer as it should: {error}") from error

    return lambda texts: [one(text) for text in texts]
