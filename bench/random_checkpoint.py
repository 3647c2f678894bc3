"""Write a checkpoint of a Llama's shapes with random bf16 weights, tensor by tensor, and a tokenizer of single words.

    python bench/random_checkpoint.py 7b FOLDER          # 13.5 GB
    python bench/random_checkpoint.py 70b FOLDER 4       # Llama-3-70B's shapes, 4 blocks

The rows are pieces of one long row of random numbers, cut elsewhere for every tensor: enough for memory and time, and
cheap to make.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast

from sparc3.checkpoint import INDEX, write_tensors
from sparc3.weights import empty_model

SHAPES = {
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
SHARD_BYTES = 5 << 30
WORDS = 256


def tensor(index: int, shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    """bf16 of standard deviation 0.02, another for every index; ones for a vector (the norms)."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rows, columns = shape
    offsets = (torch.arange(rows) * 7919 + index * 104729) % (len(noise) - columns)
    return torch.stack([noise[offset : offset + columns] for offset in offsets.tolist()])


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    shape = SHAPES[name] | ({"num_hidden_layers": int(sys.argv[3])} if len(sys.argv) > 3 else {})
    config = LlamaConfig(**shape, tie_word_embeddings=False, max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(3, WORDS)}
    vocabulary |= {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    noise = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for key, empty in empty_model(config).state_dict().items():
        if size + empty.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = tuple(empty.shape)
        size += empty.nbytes
    weight_map, index = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            write_tensors(
                stream,
                {key: (torch.bfloat16, shape) for key, shape in shard.items()},
                (tensor(index + place, shape, noise) for place, shape in enumerate(shard.values())),
                {"format": "pt"},
            )
        weight_map |= dict.fromkeys(shard, file)
        index += len(shard)
        print(f"{folder / file}")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    main()
