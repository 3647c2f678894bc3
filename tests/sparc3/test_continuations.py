"""Greedy continuations: batches with a cache say what one prompt at a time without a cache does."""

import pytest
import tiny
import torch
import words

from sparc3.continuations import Continuation, continuations
from sparc3.errors import InputError

TEXTS = ["ab", "a longer prompt than that", "c", "middle one"]
TOKENS = 12


def one_by_one(model, text, tokens=TOKENS, stop=()):
    ids, said = [words.BOS, *words.ids(text)], []
    for _ in range(tokens):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        ids.append(token)
        said.append(token)
    return tuple(said)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "gpt2"])
def test_a_batch_says_what_each_prompt_alone_does(name):
    model = tiny.build(name, vocab_size=words.VOCABULARY)
    found = continuations(model, words.tokenizer(), TEXTS, TOKENS)
    assert [one.prompt for one in found] == TEXTS
    # Random weights rarely put two tokens within the rounding of a padded batch (1e-6).
    assert [one.ids for one in found] == [one_by_one(model, text, stop={words.EOS}) for text in TEXTS]
    decoded = words.tokenizer().decode(found[1].ids, skip_special_tokens=True)
    assert found[1].text == decoded


def test_the_end_of_a_text_is_not_part_of_it():
    model = tiny.build("llama", vocab_size=words.VOCABULARY)
    free = one_by_one(model, TEXTS[0])
    model.generation_config.eos_token_id = [words.EOS, free[4]]
    found = continuations(model, words.tokenizer(), TEXTS, TOKENS)
    assert found[0].ids == free[: free.index(free[4])]
    assert found[1].ids == one_by_one(model, TEXTS[1], stop={words.EOS, free[4]})


def test_settings_of_the_checkpoint_change_nothing():
    model = tiny.build("llama", vocab_size=words.VOCABULARY)
    plain = continuations(model, words.tokenizer(), TEXTS, TOKENS)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.do_sample, own.temperature = 5.0, 2, True, 9.0
    assert continuations(model, words.tokenizer(), TEXTS, TOKENS) == plain
    assert model.generation_config is own


def test_too_long_a_prompt_is_refused():
    model = tiny.build("llama", vocab_size=words.VOCABULARY)
    with pytest.raises(InputError, match=r"take 65 tokens .BOS included., but the model has 64"):
        continuations(model, words.tokenizer(), ["a" * 52], TOKENS)


def test_the_share_of_different_tokens():
    assert Continuation("", "", (5, 6, 5, 5)).distinct == 0.5
    assert Continuation("", "", ()).distinct == 1.0
