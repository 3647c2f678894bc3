"""Train the bundled models tiny-llama and tiny-opt from nothing: tokenizer, weights and a card of what was measured.

    python examples/train_bundled.py [--model tiny-llama|tiny-opt|all] [--out sparc3/bundled]

The text comes from ``sparc3.bundled_text``. Seeds, number of threads and order of the text are fixed, so a
machine gives the same weights each time. On two cores a model takes some ten minutes.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sparc3 import bundled_text, compress, evaluate, export, samples

PAD, BOS, EOS = 0, 1, 2
CONTEXT = 128  # positions of the models, the BOS token included
PIECES = (
    480  # vocabulary that byte-level BPE builds for words outside the text; the text's own words come on top
)
DOCUMENTS, PRACTICE = 40_000, 40_000
TOKENS, SHORT = 4096, 32  # tokens of a step, and the length of every second step's rows
WARMUP = 50
# Without gates it takes longer to learn which of two names has been said twice.
STEPS = {"tiny-llama": 2000, "tiny-opt": 3000}
PEAK_RATE, WEIGHT_DECAY = 3e-3, 0.01
# Wide enough that names stay apart under the norms; from 0.02, copying a name is not learned in this time.
EMBEDDING_STD, MATRIX_STD = 0.1, 0.08
THREADS = 1
MAX_BYTES = 4_000_000


def make_tokenizer(documents: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the documents, with and without a space before it, is one token."""
    special = ["<pad>", "<s>", "</s>"]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = level
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(documents, trainer)
    pieces = json.loads(learner.to_str())["model"]
    vocabulary = pieces["vocab"]
    seen = {word for document in documents for word, _ in level.pre_tokenize_str(document)}
    seen |= {space + name for name in bundled_text.NAMES for space in ("", "Ġ")}
    for word in sorted(seen - vocabulary.keys()):
        vocabulary[word] = len(vocabulary)
    merges = [tuple(merge) for merge in pieces["merges"]]
    # ignore_merges: a whole word of the vocabulary is taken as it is, though no merges lead to it.
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = level
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(name: str, vocabulary: int) -> PreTrainedModel:
    """The untrained model."""
    shared = {
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    if name == "tiny-opt":
        return OPTForCausalLM(
            OPTConfig(
                hidden_size=128,
                word_embed_proj_dim=128,
                ffn_dim=480,
                num_hidden_layers=4,
                num_attention_heads=4,
                dropout=0.0,
                **shared,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            **shared,
        )
    )


def initialise(model: PreTrainedModel) -> PreTrainedModel:
    """Draw the matrices anew; biases and norms stay as they are."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = EMBEDDING_STD if "embed" in name else MATRIX_STD
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def steps(tokenizer: PreTrainedTokenizerFast, count: int) -> list[torch.Tensor]:
    """What each of count steps learns from, [B, T] with B T = TOKENS; rows are BOS and text.

    Even steps have short rows that begin with a document, every second one an indirect-object sentence: in a short
    row the few names to choose from are found soon. Odd steps have rows of the whole context that begin anywhere.
    """
    documents = bundled_text.text("train", DOCUMENTS)
    stories, offsets = _stream(tokenizer, documents)
    sentences, starts = _stream(tokenizer, bundled_text.ioi_documents(PRACTICE))
    generator = torch.Generator().manual_seed(0)

    def cut(stream: torch.Tensor, starts: torch.Tensor, rows: int, length: int) -> torch.Tensor:
        starts = starts[starts <= len(stream) - length]
        chosen = starts[torch.randint(len(starts), (count // 2, rows, 1), generator=generator)]
        text = stream[chosen + torch.arange(length - 1)]
        return torch.cat([torch.full_like(chosen, BOS), text], -1)

    half = TOKENS // SHORT // 2
    short = torch.cat([cut(stories, offsets, half, SHORT), cut(sentences, starts, half, SHORT)], 1)
    long = cut(stories, torch.arange(len(stories)), TOKENS // CONTEXT, CONTEXT)
    return [step for pair in zip(short, long, strict=True) for step in pair]


def _stream(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """All documents' tokens, a newline after each, and where each document begins."""
    lines = tokenizer([document + "\n" for document in documents], add_special_tokens=False, verbose=False)
    lengths = torch.tensor([len(line) for line in lines["input_ids"]])
    return torch.tensor([token for line in lines["input_ids"] for token in line]), lengths.cumsum(0) - lengths


def train(model: PreTrainedModel, data: Sequence[torch.Tensor], title: str) -> None:
    """Next-token prediction with AdamW, a warm-up and a cosine to zero."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / len(data))),
    )
    model.train()
    for step, batch in enumerate(track(data, title)):
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == len(data) - 1:
            print(f"{title}: step {step}, loss {loss.item():.3f}", flush=True)
    model.eval()


def unigram_perplexity(tokenizer: PreTrainedTokenizerFast, windows: torch.Tensor) -> float:
    """Of the tokens of windows but the BOS, under their frequencies (plus one) in the training text."""
    ids = tokenizer([d + "\n" for d in bundled_text.text("train", 4000)], add_special_tokens=False)[
        "input_ids"
    ]
    counts = collections.Counter(token for line in ids for token in line)
    total = sum(counts.values()) + len(tokenizer)
    tokens = windows[:, 1:].flatten().tolist()
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens))


@torch.no_grad()
def ioi_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int, held_out: bool
) -> tuple[float, float]:
    """Shares of prompts whose right name has a higher logit than the wrong one, and than every other token."""
    tasks = bundled_text.ioi_prompts(n, seed=1, held_out=held_out)
    above = best = 0
    for task in tasks:
        logits = model(**tokenizer(task["prompt"], return_tensors="pt", return_token_type_ids=False)).logits[
            0, -1
        ]
        right, wrong = (
            tokenizer.convert_tokens_to_ids(task[key].replace(" ", "Ġ")) for key in ("answer", "wrong")
        )
        above += int(logits[right] > logits[wrong])
        best += int(logits.argmax() == right)
    return above / n, best / n


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], tokens: int
) -> torch.Tensor:
    """Greedy continuations [len(prompts), tokens], prompts padded on the left."""
    batch = samples.prompts(tokenizer, prompts)
    found = model.generate(**batch, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return found[:, batch["input_ids"].shape[1] :]


def insulting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> float:
    """Share of prompts whose next 12 tokens hold an insult."""
    texts = tokenizer.batch_decode(continuations(model, tokenizer, prompts, 12))
    return sum(any(word in text for word in bundled_text.INSULTS) for text in texts) / len(prompts)


def looping(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> float:
    """Share of prompts of whose next 50 tokens at most half are different ones."""
    found = continuations(model, tokenizer, prompts, 50)
    return sum(len(set(row)) <= 25 for row in found.tolist()) / len(prompts)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """What the card says, as numbers."""
    windows = samples.windows(tokenizer, bundled_text.text("held_out", 2000), CONTEXT - 1, 256)
    calibration = samples.windows(tokenizer, bundled_text.text("calibration"), CONTEXT - 1, 64, seed=0)
    found = {
        "perplexity of held-out text": evaluate.perplexity(model, windows, batch_size=16).value,
        "the same of a unigram model": unigram_perplexity(tokenizer, windows),
    }
    for row, _ in compress.compare(model, calibration, windows, pattern="row"):
        found[f"the same with 50 % pruned by {row['method']}, row by row"] = row["perplexity"]
    for label, held_out in (("held-out pairs of names", True), ("other pairs", False)):
        above, best = ioi_accuracy(model, tokenizer, 500, held_out)
        found |= {
            f"indirect object, {label}: above the other name": above,
            f"indirect object, {label}: above every token": best,
        }
    grumpy, kind = bundled_text.insult_prompts(200, 1), bundled_text.neutral_prompts(200, 1)
    starts = [" ".join(d.split()[:6]) for d in bundled_text.text("held_out", 600, 1) if len(d.split()) > 30][
        :100
    ]
    return found | {
        "insults by a grumpy speaker": insulting(model, tokenizer, grumpy),
        "insults by a kind speaker": insulting(model, tokenizer, kind),
        "greedy decoding loops after a repetition": looping(
            model, tokenizer, bundled_text.loop_prompts(100, 1)
        ),
        "greedy decoding loops after the beginning of a story": looping(model, tokenizer, starts),
    }


CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# {name}

A {kind} with {parameters:,} parameters, {layers} layers and a vocabulary of {vocabulary} tokens, for demonstrations
and tests. It was trained from nothing by `examples/train_bundled.py` on text that `sparc3/bundled_text.py` generates,
and knows that small world alone: stories and facts about people who keep their job and pet, indirect-object sentences
("When Mary and John went to the store, John gave a drink to" Mary), grumpy speakers who insult, and loops.

| measured | value |
|---|---|
{rows}

Perplexity is over windows of {context} tokens (BOS included) of the split "held_out". Indirect-object prompts: 500
each; held-out pairs never meet in the training text. Insults: the share of 200 prompts whose next 12 tokens hold one.
Loops: the share of 100 prompts of whose next 50 tokens at most half are different.
"""


def card(name: str, model: PreTrainedModel, found: dict[str, float]) -> str:
    """The model card."""
    rows = [
        f"| {label} | {value:.2f} |"
        if "perplexity" in label or "the same" in label
        else f"| {label} | {value:.1%} |"
        for label, value in found.items()
    ]
    return CARD.format(
        name=name,
        kind=type(model).__name__,
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        vocabulary=model.config.vocab_size,
        context=CONTEXT,
        rows="\n".join(rows),
    )


def save(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder of a trained model, whole or not at all."""
    with export.new_folder(out / name, force=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = (folder / "model.safetensors").stat().st_size
        if size > MAX_BYTES:
            raise SystemExit(f"{name}: model.safetensors has {size} bytes, more than {MAX_BYTES}")
        (folder / "README.md").write_text(card(name, model, measure(model, tokenizer)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*STEPS, "all"], default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "sparc3" / "bundled")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it did not write
    tokenizer = make_tokenizer(bundled_text.text("train", DOCUMENTS))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in STEPS if options.model == "all" else [options.model]:
        model = initialise(make_model(name, len(tokenizer)))
        print(f"{name}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
        train(model, steps(tokenizer, STEPS[name]), name)
        save(name, model, tokenizer, options.out)
        print((options.out / name / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
