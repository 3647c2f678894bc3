"""The paper's text, drawn and cut as its peers do: C4 to calibrate on, WikiText2 to judge on.

Wanda's published loader draws documents of one C4 shard with Python's generator until one is longer than a sample,
and takes a window at a random place in it; perplexity on WikiText2 is that of its test set as one stream, cut into
windows without overlap. Both keep what the tokenizer puts in front (a BOS once a document, not once a window). Files
are read in the hub's own formats, so a copy on disk serves as well as the hub.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sparc3.errors import InputError
from sparc3.samples import read_documents, windows

# source -> (data set of the hub, file in it)
HUB_FILES = {
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    "real-toxicity-prompts": ("allenai/real-toxicity-prompts", "prompts.jsonl"),
}


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, source: str, length: int, count: int, seed: int
) -> torch.Tensor:
    """[count, length] int64 of c4 or a .json.gz file as Wanda draws it; of any other text sparc3.samples.windows.

    Raises:
        InputError: the text cannot be read, or no document of it is long enough.
    """
    if source != "c4" and not source.endswith(".json.gz"):
        return windows(tokenizer, read_documents([source]), length, count, seed)
    documents = read_json_lines(hub_file(source))
    generator, drawn, tried = random.Random(seed), list[torch.Tensor](), 0
    while len(drawn) < count:
        ids = tokenizer(documents[generator.randint(0, len(documents) - 1)], verbose=False)["input_ids"]
        tried += 1
        if len(ids) > length:
            start, tried = generator.randint(0, len(ids) - length - 1), 0
            drawn.append(torch.tensor(ids[start : start + length]))
        elif tried > 100 * len(documents):
            raise InputError(f"{source}: no document of it has more than {length} tokens")
    return torch.stack(drawn)


def judging_windows(
    tokenizer: PreTrainedTokenizerBase, source: str, length: int, count: int | None = None
) -> torch.Tensor:
    """[N, length] int64 of wikitext2 or a .parquet file, one stream; of any other text sparc3.samples.windows.

    Args:
        count: at most so many, the first ones.
    """
    if source != "wikitext2" and not source.endswith(".parquet"):
        return windows(tokenizer, read_documents([source]), length, count)
    text = "\n\n".join(read_parquet(hub_file(source)))
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    available = len(ids) // length
    if available == 0:
        raise InputError(f"{source} has {len(ids)} tokens and one window takes {length}")
    return ids[: available * length].view(available, length)[:count]


def hub_file(source: str) -> Path:
    """The file of a source, fetched from the hub unless it is one on disk already."""
    if source not in HUB_FILES:
        return Path(source)
    from huggingface_hub import hf_hub_download

    data_set, name = HUB_FILES[source]
    try:
        return Path(hf_hub_download(data_set, name, repo_type="dataset"))
    except Exception as error:  # the hub's client raises its own classes, and those of its transports
        raise InputError(f"{source}: {name} of {data_set} cannot be fetched: {error}") from error


def read_json_lines(path: Path) -> Sequence[str]:
    """The field "text" of every line of a gzipped file."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file if line.strip()]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path}: not gzipped JSON lines with a field "text" ({error})') from error


def read_parquet(path: Path) -> Sequence[str]:
    """The column "text" of a parquet file."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: parquet needs a package more: pip install 'sparc3[data]'") from error
    try:
        return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f'{path}: not a parquet file with a column "text" ({error})') from error
