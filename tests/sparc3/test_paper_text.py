"""The paper's loaders on files in the hub's own formats, against the published draws written out."""

import gzip
import json
import random

import pytest
import torch
import words

import sparc3
from sparc3.errors import InputError
from sparc3.paper_text import calibration_windows, hub_file, judging_windows

DOCUMENTS = [f"{'ab' * (n % 23)} é {n}" for n in range(200)]


@pytest.fixture
def shard(tmp_path):
    """As allenai/c4 stores them: gzipped JSON lines with text, timestamp and url."""
    path = tmp_path / "c4-train.00000-of-01024.json.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for text in DOCUMENTS:
            file.write(json.dumps({"text": text, "timestamp": "2019-04-25", "url": "http://x"}) + "\n")
    return path


@pytest.mark.parametrize("seed", [0, 3])
def test_c4_is_drawn_as_wanda_draws_it(shard, seed):
    tokenizer, length, count = words.tokenizer(), 20, 9
    random.seed(seed)
    expected = []
    for _ in range(count):
        while True:
            text = DOCUMENTS[random.randint(0, len(DOCUMENTS) - 1)]
            ids = [words.BOS, *words.ids(text)]
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        expected.append(ids[start : start + length])
    found = calibration_windows(tokenizer, str(shard), length, count, seed)
    assert found.tolist() == expected
    assert found.dtype == torch.int64


def test_documents_that_are_all_too_short_are_refused(shard):
    with pytest.raises(InputError, match="no document of it has more than 80 tokens"):
        calibration_windows(words.tokenizer(), str(shard), 80, 1, 0)


def test_the_hub_is_asked_for_the_published_shard(shard, monkeypatch):
    asked = []

    def download(*name, **options):
        asked.append((*name, options))
        return shard

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tokenizer = words.tokenizer()
    found = calibration_windows(tokenizer, "c4", 20, 2, 0)
    assert torch.equal(found, calibration_windows(tokenizer, str(shard), 20, 2, 0))
    assert asked == [("allenai/c4", "en/c4-train.00000-of-01024.json.gz", {"repo_type": "dataset"})]

    def fail(*name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(InputError, match=r"wikitext2: wikitext-2-raw-v1/test.* cannot be fetched: no route"):
        hub_file("wikitext2")


def test_wikitext_is_one_stream(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = ["", " = Title = \n", "", " some text é . \n", " more \n"]
    path = tmp_path / "test-00000-of-00001.parquet"
    parquet.write_table(pyarrow.table({"text": lines}), path)
    stream = [words.BOS, *words.ids("\n\n".join(lines))]
    found = judging_windows(words.tokenizer(), str(path), 7)
    assert found.tolist() == [stream[start : start + 7] for start in range(0, len(stream) // 7 * 7, 7)]
    assert judging_windows(words.tokenizer(), str(path), 7, 2).tolist() == found[:2].tolist()
    with pytest.raises(InputError, match="one window takes 500"):
        judging_windows(words.tokenizer(), str(path), 500)
    other = tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table({"line": lines}), other)
    with pytest.raises(InputError, match=r'other\.parquet: not a parquet file with a column "text"'):
        judging_windows(words.tokenizer(), str(other), 7)


def test_damaged_files_are_refused(tmp_path):
    broken = tmp_path / "broken.json.gz"
    for content in (b"not gzip", gzip.compress(b'{"line": "no text"}\n'), gzip.compress(b"{}{")):
        broken.write_bytes(content)
        with pytest.raises(InputError, match=r"broken\.json\.gz: not gzipped JSON lines"):
            calibration_windows(words.tokenizer(), str(broken), 5, 1, 0)
    with pytest.raises(InputError, match=r"missing\.json\.gz"):
        calibration_windows(words.tokenizer(), str(tmp_path / "missing.json.gz"), 5, 1, 0)


def test_other_text_is_cut_as_everywhere(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(DOCUMENTS))
    tokenizer = words.tokenizer()
    documents = sparc3.read_documents([str(text)])
    for seed in (0, 1):
        found = calibration_windows(tokenizer, str(text), 11, 5, seed)
        assert torch.equal(found, sparc3.windows(tokenizer, documents, 11, 5, seed))
    assert torch.equal(
        judging_windows(tokenizer, str(text), 11, 5), sparc3.windows(tokenizer, documents, 11, 5)
    )
