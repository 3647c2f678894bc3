"""Text from files and data sets, and what the models get of it: windows of tokens, or padded prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from sparc3.errors import InputError
from sparc3.targets import Batch

# Documents taken from a hub data set: of C4, whose documents have some 500 tokens, 4 million tokens.
HUB_DOCUMENTS = 8192


def read_documents(sources: Sequence[str]) -> list[str]:
    """The documents of all sources, in order; none is empty.

    Args:
        sources: each one of
            a text file: every line that is not blank is a document (UTF-8, or Latin-1 where it is not that);
            a ``.jsonl`` file: the field "text" of every line;
            ``bundled`` or ``bundled:SPLIT``: the text of the bundled models, split "train" unless told;
            ``c4[:validation]``, ``wikitext2[:SPLIT]`` or ``hf:NAME[:CONFIG[:SPLIT]]``: the column "text" of a
            data set of the hub, its first ``HUB_DOCUMENTS`` documents, split "train" unless told.

    Raises:
        InputError: a source is missing, is no text, has no field "text" or nothing in it, or needs an extra.
    """
    documents: list[str] = []
    for source in sources:
        found = [text for text in _read(str(source)) if text.strip()]
        if not found:
            raise InputError(f"{source}: no text in it")
        documents += found
    if not documents:
        raise InputError("no text given: name a .txt or .jsonl file, or bundled, c4, wikitext2 or hf:NAME")
    return documents


def windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    length: int,
    count: int | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Consecutive windows of the documents' tokens, without overlap.

    The documents are one stream, a newline after each; what is left at its end is dropped.

    Args:
        length: tokens of text in a window.
        count: at most so many windows (all there are, where there are fewer); None takes all.
        seed: which of them: None the first ones, else a random choice, in the order of the text.

    Returns:
        [N, 1 + length] int64, the BOS token in column 0; [N, length] where the tokenizer has no BOS.

    Raises:
        InputError: length or count below 1, no documents, or fewer tokens than one window.
    """
    if length < 1 or (count is not None and count < 1):
        raise InputError(f"windows need a length and a count of at least 1, not {length} and {count}")
    if not documents:
        raise InputError("no text to cut into windows")
    lines = [document + "\n" for document in documents]
    # verbose would warn of documents longer than the model's context, which the windows cut.
    ids = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor(list(itertools.chain.from_iterable(ids)), dtype=torch.int64)
    available = len(stream) // length
    if available == 0:
        raise InputError(
            f"the text has {len(stream)} tokens and one window takes {length}: "
            "give more text or a smaller length"
        )
    cut = stream[: available * length].view(available, length)
    if count is not None and count < available:
        cut = cut[_choice(available, count, seed)]
    if tokenizer.bos_token_id is None:
        return cut.clone()
    return torch.cat([torch.full((len(cut), 1), tokenizer.bos_token_id), cut], dim=1)


def batches(windows: torch.Tensor, batch_size: int) -> Iterator[Batch]:
    """Windows [N, T] as batches of at most batch_size samples, nothing padded.

    Yields:
        input_ids [B, T] and attention_mask [B, T], both int64.
    """
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: at least 1")
    for part in windows.split(batch_size):
        yield {"input_ids": part, "attention_mask": torch.ones_like(part)}


def prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], side: str = "left") -> Batch:
    """Texts of different lengths as one padded batch, each beginning with exactly one BOS where there is one.

    Args:
        side: where the padding goes, "left" or "right".

    Returns:
        input_ids [B, T] and attention_mask [B, T] (0 on padding), both int64.

    Raises:
        InputError: no texts, a text without a token, or another side.
    """
    if side not in ("left", "right"):
        raise InputError(f"padding side {side!r}: left or right")
    if not texts:
        raise InputError("no prompts given")
    bos = tokenizer.bos_token_id
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    # A chat template writes the BOS into the text.
    rows = [ids if bos is None or ids[:1] == [bos] else [bos, *ids] for ids in rows]
    if [] in rows:
        raise InputError(f"prompt {rows.index([])} has no tokens")
    width = max(map(len, rows))
    # The mask hides padding, so any token of the vocabulary serves where the tokenizer names none.
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids = torch.full((len(rows), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        place = slice(width - len(ids), width) if side == "left" else slice(len(ids))
        input_ids[row, place] = torch.tensor(ids)
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _choice(available: int, count: int, seed: int | None) -> torch.Tensor:
    """count of the indices below available, ascending."""
    if seed is None:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:count].sort().values


def _read(source: str) -> list[str]:
    name, *rest = source.split(":")
    if name == "bundled" and len(rest) < 2:
        from sparc3 import bundled_text

        return bundled_text.text(rest[0] if rest else "train")
    if name == "c4" and len(rest) < 2:
        split = rest[0] if rest else "train"
        shards = {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        }
        return _hub(source, "allenai/c4", split=split, data_files=shards)
    if name == "wikitext2" and len(rest) < 2:
        return _hub(source, "Salesforce/wikitext", "wikitext-2-raw-v1", split=rest[0] if rest else "train")
    if name == "hf" and 1 <= len(rest) <= 3 and rest[0]:
        config = rest[1] if len(rest) > 1 else None
        return _hub(source, rest[0], config or None, split=rest[2] if len(rest) > 2 else "train")
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"{source}: no such text file, nor bundled, c4, wikitext2 or hf:NAME[:CONFIG[:SPLIT]]"
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error})") from error
    if b"\0" in raw:
        raise InputError(f"{source}: not a text file (it holds NUL bytes); use UTF-8 text or .jsonl")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    # Not splitlines(): it also breaks at characters such as NEL, which JSON and Latin-1 text may hold.
    lines = text.replace("\r\n", "\n").split("\n")
    return _json_texts(source, lines) if path.suffix.lower() == ".jsonl" else lines


def _json_texts(source: str, lines: list[str]) -> list[str]:
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f'{source}:{number}: not a JSON object with a field "text"') from error
        if not isinstance(text, str):
            raise InputError(f'{source}:{number}: the field "text" is not a string')
        texts.append(text)
    return texts


def _hub(source: str, *name: str | None, **options: object) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{source}: data sets of the hub need a package more: pip install 'sparc3[data]'"
        ) from error
    try:
        rows = itertools.islice(datasets.load_dataset(*name, streaming=True, **options), HUB_DOCUMENTS)
        return [row["text"] for row in rows]
    except KeyError as error:
        raise InputError(f'{source}: the data set has no column "text"') from error
    # Each data set and version of the library raises its own classes when the hub, name or split is missing.
    except Exception as error:
        raise InputError(f"{source}: the data set cannot be read (it needs the network): {error}") from error
