"""sparc3 generate: the text is the model's, and the two speeds are there."""

import re

import pytest
import torch
import words
from commands import succeed, succeed_json
from test_cli_refusals import refuse
from transformers import AutoModelForCausalLM

from sparc3.generation import generate

PROMPT = "the cat sat"


def expected(folder, new):
    tokenizer, model = words.tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer(PROMPT, return_tensors="pt")
    found = model.generate(batch["input_ids"], max_new_tokens=new, do_sample=False)[0]
    return tokenizer.decode(found[batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_packed_and_dense_say_the_same(room, base, masks):
    succeed("export", base, "--mask", masks[1], "--format", "bitmap", "--out", "packed")
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 20)
    dense, packed = (succeed_json("generate", folder, *arguments) for folder in ("fifty", "packed"))
    assert (dense["packed"], packed["packed"]) == ({}, {"bitmap": 14})
    assert dense["text"] == packed["text"] == expected("fifty", 20)
    for found in (dense, packed):
        assert found["prefill"]["tokens"] == len(words.tokenizer()(PROMPT)["input_ids"])
        for part in ("prefill", "decode"):
            speed, seconds = found[part]["tokens_per_second"], found[part]["seconds"]
            assert speed == pytest.approx(found[part]["tokens"] / seconds)


def test_the_text_streams_and_the_speed_follows(room, base):
    out = succeed("generate", base, "--prompt", PROMPT, "--max-new-tokens", 20)
    text, _, speed = out.rpartition("\n\n")
    assert text == PROMPT + expected(base, 20)
    assert re.fullmatch(
        r"prefill [\d.]+ tokens/s \(12 tokens\), decode [\d.]+ tokens/s \(20 new tokens\)\n", speed
    )


def test_drawing_follows_the_seed(room, base):
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 20, "--temperature", 1.5)
    texts = [succeed_json("generate", base, *arguments, "--seed", seed)["text"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_one_token_has_no_decoding_speed(room, base):
    found = succeed_json("generate", base, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert found["decode"] == {"tokens": 0, "seconds": 0, "tokens_per_second": None}
    assert "decode" not in succeed("generate", base, "--prompt", PROMPT, "--max-new-tokens", 1)


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    class Spells:
        generation_config = type("", (), {"pad_token_id": 0})
        config = type("", (), {})
        device = "cpu"

        def __call__(self, ids, use_cache):
            return None

        def generate(self, ids, streamer, **options):
            streamer.put(ids)
            for byte in "é!".encode():
                streamer.put(torch.tensor([byte]))
            streamer.end()

    class Bytes:
        def __call__(self, text, return_tensors):
            from transformers import BatchEncoding

            return BatchEncoding({"input_ids": torch.tensor([[1]])})

        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    shown = []
    assert generate(Spells(), Bytes(), "x", show=shown.append).text == "é!"
    assert [piece for piece in shown if piece] == ["x", "é", "!"]


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("the prompt has 12 tokens and 64 are to follow, but the model has 48 positions", ()),
        ("dtype 'int4' is not known", ("--dtype", "int4")),
        ("temperature inf is not a finite number from 0 on", ("--temperature", "inf")),
    ],
)
def test_refusals(room, base, message, arguments):
    refuse(room, message, "generate", base, "--prompt", PROMPT, *arguments)
