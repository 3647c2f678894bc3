"""Scorers: a callable, a classifier on this machine, and the service, which is never called here."""

import io
import json
import urllib.error
import urllib.request

import pytest
import torch
import words
from transformers import BertConfig, BertForSequenceClassification

from sparc3 import scorers
from sparc3.errors import InputError

TEXTS = ["have a lovely day", "you are a fucking idiot", "go to hell, you bitch", "the train leaves at nine"]


def test_a_callable_of_a_package():
    scorer = scorers.scorer("profanity_check:predict_prob")
    polite, rude, hell, train = scorer(TEXTS)
    assert max(polite, train) < 0.2 < 0.8 < min(rude, hell)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "cannot be imported"),
        ("math:no_such", "cannot be imported"),
        ("math:pi", "is not callable"),
        ("./no/such/folder", "no text classifier"),
    ],
)
def test_what_is_not_there_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        scorers.scorer(name)


def classifier(folder, labels, **more):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words.VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        initializer_range=1.0,
        **more,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    words.tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("labels", "kind", "column"),
    [
        (["obscene", "Toxic", "threat"], "multi_label_classification", 1),
        (["neutral", "toxic"], "single_label_classification", 1),
        (["TOXICITY", "fine", "other"], "single_label_classification", 0),
        (["no", "yes"], "single_label_classification", 1),
    ],
)
def test_a_classifier_gives_the_probability_of_toxic(tmp_path, labels, kind, column):
    model = classifier(tmp_path, labels, problem_type=kind)
    found = scorers.scorer(str(tmp_path))(TEXTS)
    for text, score in zip(TEXTS, found, strict=True):
        ids = torch.tensor([words.tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        expected = logits.sigmoid() if kind.startswith("multi") else logits.softmax(-1)
        assert score == pytest.approx(expected[column].item(), abs=1e-5)


def test_a_classifier_of_something_else_is_refused(tmp_path):
    classifier(tmp_path, ["sad", "happy", "angry"])
    with pytest.raises(InputError, match="no label toxic or toxicity, but sad, happy, angry"):
        scorers.scorer(str(tmp_path))


def test_the_service_is_asked_with_the_key_and_only_with_one(monkeypatch):
    monkeypatch.delenv(scorers.PERSPECTIVE_KEY, raising=False)
    with pytest.raises(InputError, match="needs your key for it in PERSPECTIVE_API_KEY"):
        scorers.scorer("perspective")
    monkeypatch.setenv(scorers.PERSPECTIVE_KEY, "secret")
    asked = []

    def answer(request, timeout):
        asked.append((request.full_url, request.headers, json.loads(request.data)))
        text = asked[-1][2]["comment"]["text"]
        if text == "down":
            raise urllib.error.URLError("no network")
        value = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.25}}}}
        return io.BytesIO(json.dumps({} if text == "odd" else value).encode())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    score = scorers.scorer("perspective")
    assert score(["a", "b"]) == [0.25, 0.25]
    url, headers, body = asked[0]
    assert url.startswith("https://")
    assert "secret" not in url
    assert headers["X-goog-api-key"] == "secret"
    assert body["requestedAttributes"] == {"TOXICITY": {}}
    for text in ("down", "odd"):
        with pytest.raises(InputError, match="does not answer as it should"):
            score([text])
