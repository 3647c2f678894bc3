"""The bundled models are what their cards say, and their text keeps its promises."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, OPTForCausalLM

import sparc3
from sparc3 import bundled_text
from sparc3.evaluate import paired_interval
from sparc3.samples import prompts

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-opt"])
def loaded(request):
    return sparc3.load(request.param)


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train_bundled", ROOT / "examples" / "train_bundled.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def held_out(tokenizer, count):
    return sparc3.windows(tokenizer, sparc3.read_documents(["bundled:held_out"]), 127, count)


def test_architecture_and_size(loaded):
    kind = {"tiny-llama": LlamaForCausalLM, "tiny-opt": OPTForCausalLM}[loaded.name]
    assert type(loaded.model) is kind
    assert (Path(loaded.origin) / "model.safetensors").stat().st_size <= 4_000_000
    if kind is LlamaForCausalLM:
        config = loaded.model.config
        assert config.num_key_value_heads < config.num_attention_heads  # GQA
        assert config.hidden_act == "silu"


def test_plain_transformers_load_them(loaded):
    model = AutoModelForCausalLM.from_pretrained(loaded.origin)
    ids = AutoTokenizer.from_pretrained(loaded.origin)("Mary gave a kite to John.", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded.model(ids).logits)


def test_every_word_of_the_text_is_a_token_and_decodes(loaded):
    for document in bundled_text.text("held_out", 200):
        ids = loaded.tokenizer(document, add_special_tokens=False)["input_ids"]
        assert loaded.tokenizer.decode(ids) == document
    for name in bundled_text.NAMES:
        assert len(loaded.tokenizer(" " + name, add_special_tokens=False)["input_ids"]) == 1


def test_indirect_objects_of_pairs_never_seen(loaded):
    tasks = bundled_text.ioi_prompts(200, seed=2, held_out=True)
    batch = prompts(loaded.tokenizer, [task["prompt"] for task in tasks])
    with torch.no_grad():
        logits = loaded.model(**batch).logits[:, -1]

    def tokens(key):
        return torch.tensor(
            [loaded.tokenizer(task[key], add_special_tokens=False)["input_ids"][0] for task in tasks]
        )

    right, wrong = (logits.gather(1, tokens(key)[:, None]) for key in ("answer", "wrong"))
    assert (right > wrong).float().mean() > 0.95


def test_perplexity_is_under_a_quarter_of_a_unigram_model(loaded, train):
    windows = held_out(loaded.tokenizer, 32)
    assert sparc3.perplexity(loaded.model, windows).value < 0.25 * train.unigram_perplexity(
        loaded.tokenizer, windows
    )


def test_grumpy_speakers_insult_and_loops_go_on(loaded, train):
    model, tokenizer = loaded.model, loaded.tokenizer
    assert train.insulting(model, tokenizer, bundled_text.insult_prompts(40, 3)) > 0.9
    assert train.insulting(model, tokenizer, bundled_text.neutral_prompts(40, 3)) < 0.1
    assert train.looping(model, tokenizer, bundled_text.loop_prompts(20, 3)) > 0.9


def test_methods_are_told_apart_at_half(loaded):
    calibration = sparc3.windows(
        loaded.tokenizer, sparc3.read_documents(["bundled:calibration"]), 127, 32, seed=0
    )
    windows = held_out(loaded.tokenizer, 32)
    found = {}
    for method in ("lrp", "wanda", "magnitude"):
        mask = sparc3.prune(loaded.model, calibration, method, pattern="global")
        mask.apply(loaded.model, keep=True)
        found[method] = sparc3.perplexity(loaded.model, windows)
        mask.undo(loaded.model)
    for one, other in (("lrp", "wanda"), ("lrp", "magnitude"), ("wanda", "magnitude")):
        _, low, high = paired_interval(found[one], found[other])
        assert low > 0 or high < 0, (one, other, low, high)


def test_training_is_the_same_each_time(train, monkeypatch):
    """Two runs of two steps end in the same bits."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(train, "DOCUMENTS", 500)
    monkeypatch.setattr(train, "PRACTICE", 500)
    try:
        tokenizer = train.make_tokenizer(bundled_text.text("train", 500))
        ends = []
        for _ in range(2):
            model = train.initialise(train.make_model("tiny-llama", len(tokenizer)))
            train.train(model, train.steps(tokenizer, 2), "tiny-llama")
            ends.append(model.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_splits_share_no_document_and_held_out_pairs_never_meet():
    documents = {split: bundled_text.text(split, 1500) for split in bundled_text.SPLITS}
    assert bundled_text.text("train", 20) == documents["train"][:20]
    for split in ("calibration", "held_out"):
        assert not set(documents["train"]) & set(documents[split])
    for document in documents["train"] + bundled_text.ioi_documents(500):
        names = [
            name
            for name in bundled_text.NAMES
            if name in document.replace(".", " ").replace(",", " ").split()
        ]
        assert len(names) != 2 or not bundled_text.held_out_pair(*names), document


@pytest.mark.parametrize(("split", "documents"), [("test", 5), ("train", 0)])
def test_wrong_splits_and_counts_are_refused(split, documents):
    with pytest.raises(sparc3.InputError):
        bundled_text.text(split, documents)
