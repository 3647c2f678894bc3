import json
import sys
from types import SimpleNamespace

import pytest
import torch
import words

from sparc3.errors import InputError
from sparc3.samples import HUB_DOCUMENTS, batches, prompts, read_documents, windows


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_every_line_of_a_text_file_is_a_document(tmp_path):
    first = write(tmp_path / "a.txt", "one\r\n\n  \n two \nthree")
    second = write(tmp_path / "b.cor", "four\n")
    assert read_documents([second, first]) == ["four", "one", " two ", "three"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_text_is_utf_8_or_else_latin_1(tmp_path, encoding):
    assert read_documents([write(tmp_path / "a.txt", "naïve £5\ncafé", encoding)]) == ["naïve £5", "café"]


def test_unicode_line_separators_do_not_cut_a_document(tmp_path):
    text = "one\x85still one\u2028and still\f"
    assert read_documents([write(tmp_path / "a.txt", text)]) == [text]
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert read_documents([write(tmp_path / "a.jsonl", line)]) == [text]


def test_jsonl_gives_its_text_fields(tmp_path):
    lines = [json.dumps({"text": "a\nb", "id": 1}), "", json.dumps({"text": " "}), json.dumps({"text": "c"})]
    assert read_documents([write(tmp_path / "a.jsonl", "\n".join(lines))]) == ["a\nb", "c"]


@pytest.mark.parametrize("line", ['{"text": 3}', '{"other": "x"}', '["text"]', '"text"', "{", "null"])
def test_a_bad_json_line_is_named(tmp_path, line):
    path = write(tmp_path / "a.jsonl", '{"text": "ok"}\n' + line)
    with pytest.raises(InputError, match=r"a\.jsonl:2: .*text"):
        read_documents([path])


def test_what_is_no_text_is_refused(tmp_path):
    for sources, message in [
        ([], "no text given"),
        ([str(tmp_path / "none.txt")], r"none\.txt: no such text file"),
        ([str(tmp_path)], "no such text file"),
        ([write(tmp_path / "empty.txt", "")], r"empty\.txt: no text"),
        ([write(tmp_path / "full.txt", "x"), write(tmp_path / "blank.txt", " \n\n")], r"blank\.txt: no text"),
        ([write(tmp_path / "binary.bin", "GGUF\0\0")], "not a text file"),
        (["hf:"], "no such text file"),
        (["c4:train:more"], "no such text file"),
    ]:
        with pytest.raises(InputError, match=message):
            read_documents(sources)


@pytest.mark.parametrize("source", ["c4", "wikitext2:test", "hf:someone/data"])
def test_a_hub_data_set_without_the_extra_says_what_to_install(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'sparc3\[data\]'"):
        read_documents([source])


@pytest.mark.parametrize(
    ("source", "name", "split"),
    [
        ("c4", ("allenai/c4",), "train"),
        ("c4:validation", ("allenai/c4",), "validation"),
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "train"),
        ("wikitext2:test", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test"),
        ("hf:a/b", ("a/b", None), "train"),
        ("hf:a/b:en", ("a/b", "en"), "train"),
        ("hf:a/b::dev", ("a/b", None), "dev"),
    ],
)
def test_hub_data_sets_are_streamed_and_cut_short(monkeypatch, source, name, split):
    asked = []

    def load_dataset(*name, streaming, split, **options):
        asked.append((name, streaming, split))
        return ({"text": f"document {i}" if i else ""} for i in range(10 * HUB_DOCUMENTS))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = read_documents([source])
    assert asked == [(name, True, split)]
    assert len(documents) == HUB_DOCUMENTS - 1  # the empty one is left out
    assert documents[-1] == f"document {HUB_DOCUMENTS - 1}"


def test_a_hub_data_set_that_cannot_be_read_says_so(monkeypatch):
    def load_dataset(*name, **options):
        if "columns" in name:
            return iter([{"content": "x"}])
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"hf:a/b: .*no route"):
        read_documents(["hf:a/b"])
    with pytest.raises(InputError, match='no column "text"'):
        read_documents(["hf:columns"])


DOCUMENTS = ["one", "naïve", "three four five", "6"]
STREAM = words.ids("one\nnaïve\nthree four five\n6\n")


@pytest.mark.parametrize("length", [1, 2, 7, len(STREAM) // 2 + 1, len(STREAM)])
def test_windows_are_the_stream_in_order_each_after_a_bos(length):
    found = windows(words.tokenizer(), DOCUMENTS, length)
    count = len(STREAM) // length
    assert found.dtype == torch.int64
    assert found.shape == (count, 1 + length)
    assert found[:, 0].tolist() == [words.BOS] * count
    assert found[:, 1:].flatten().tolist() == STREAM[: count * length]


def test_windows_have_no_bos_where_the_tokenizer_has_none():
    found = windows(words.tokenizer(bos=False), DOCUMENTS, 5)
    assert found.flatten().tolist() == STREAM[: len(found) * 5]


def test_a_seed_chooses_windows_once_each_and_always_the_same():
    tokenizer = words.tokenizer()
    text = ["".join(chr(65 + i % 50) + chr(65 + i // 50) for i in range(600))]
    everything = windows(tokenizer, text, 4).tolist()
    assert windows(tokenizer, text, 4, count=9).tolist() == everything[:9]
    chosen = windows(tokenizer, text, 4, count=9, seed=3).tolist()
    places = [everything.index(window) for window in chosen]
    assert places == sorted(set(places))
    assert places != list(range(9))
    assert windows(tokenizer, text, 4, count=9, seed=3).tolist() == chosen
    assert windows(tokenizer, text, 4, count=9, seed=4).tolist() != chosen


def test_a_choice_reaches_every_window():
    text = ["".join(chr(65 + i) for i in range(7))]
    firsts = [windows(words.tokenizer(), text, 1, count=1, seed=seed)[0, 1].item() for seed in range(200)]
    # 8 windows: 200 uniform draws miss one of them with a chance of 8 * (7/8)**200 = 2e-11.
    assert set(firsts) == set(words.ids(text[0] + "\n"))


@pytest.mark.parametrize("seed", [None, 0])
def test_more_windows_than_there_are_gives_all(seed):
    everything = windows(words.tokenizer(), DOCUMENTS, 5)
    assert torch.equal(windows(words.tokenizer(), DOCUMENTS, 5, count=1000, seed=seed), everything)


def test_windows_that_cannot_be_cut_are_refused():
    tokenizer = words.tokenizer()
    with pytest.raises(InputError, match=f"{len(STREAM)} tokens and one window takes {len(STREAM) + 1}"):
        windows(tokenizer, DOCUMENTS, len(STREAM) + 1)
    with pytest.raises(InputError, match="no text"):
        windows(tokenizer, [], 4)
    for length, count in [(0, None), (-1, None), (4, 0)]:
        with pytest.raises(InputError, match="at least 1"):
            windows(tokenizer, DOCUMENTS, length, count)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_batches_hold_every_window_once(size):
    everything = windows(words.tokenizer(), DOCUMENTS, 4)
    found = list(batches(everything, size))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), everything)
    assert {len(batch["input_ids"]) for batch in found[:-1]} <= {size}
    for batch in found:
        assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(InputError, match="batch size 0"):
        next(batches(torch.zeros(2, 3, dtype=torch.int64), 0))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [True, False])
def test_prompts_are_padded_and_masked(side, pad):
    texts = ["abc", "", "<s>de", "f\n"]
    batch = prompts(words.tokenizer(pad=pad), texts, side)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 4)
    for row, text in enumerate(["abc", "", "de", "f\n"]):
        mask = batch["attention_mask"][row].bool()
        real = [words.BOS, *words.ids(text)]
        assert batch["input_ids"][row, mask].tolist() == real
        padding = [False] * (4 - len(real))
        one = [True] * len(real)
        assert mask.tolist() == (padding + one if side == "left" else one + padding)
        assert set(batch["input_ids"][row, ~mask].tolist()) <= {words.PAD}


def test_prompts_without_a_bos_must_have_a_token():
    tokenizer = words.tokenizer(bos=False)
    assert prompts(tokenizer, ["ab"])["input_ids"].tolist() == [words.ids("ab")]
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        prompts(tokenizer, ["ab", ""])
    with pytest.raises(InputError, match="no prompts"):
        prompts(tokenizer, [])
    with pytest.raises(InputError, match="side 'middle'"):
        prompts(tokenizer, ["ab"], "middle")
