"""Prune a model from Python, and look at the relevance of its parts.

python examples/prune_in_python.py [--model tiny-llama] [--text bundled] [--out pruned]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sparc3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny-llama", help="a folder, a hub id, a .gguf file or a bundled model"
    )
    parser.add_argument("--text", default="bundled", help="a text file, bundled, c4, wikitext2 or hf:NAME")
    parser.add_argument("--out", type=Path, default=Path("pruned"), help="folder to write; it must not exist")
    options = parser.parse_args()

    loaded = sparc3.load(options.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    samples = sparc3.windows(tokenizer, sparc3.read_documents([options.text]), length=127, count=32, seed=0)

    scores = sparc3.attribute(model, samples, method="lrp", reduce="token-square")
    mask = scores.select(0.5, "row")
    dense = sparc3.perplexity(model, samples)
    mask.apply(model, keep=True)  # zeros in place
    pruned = sparc3.perplexity(model, samples)
    mask.undo(model)  # and back, bit for bit
    sparc3.save_pretrained(model, mask, options.out, tokenizer, note=loaded.note)
    print(f"{mask}: perplexity {dense.value:.4g} -> {pruned.value:.4g} on the text it was scored with")
    print(f"saved {options.out}")

    prompt = tokenizer("When Mary and John went to the store, John gave a drink to", return_tensors="pt")
    with sparc3.relevance(model, rule="attnlrp", target="logit", positions="last") as r:
        r.backward(prompt)
    tokens = zip(tokenizer.convert_ids_to_tokens(prompt["input_ids"][0]), r.tokens[0].tolist(), strict=True)
    print("relevance of the prompt's tokens for the next one:")
    print("  ".join(f"{token} {relevance:+.3f}" for token, relevance in tokens))


if __name__ == "__main__":
    main()
