"""Tasks: what is drawn, how it is split, what a file may hold, and the logit difference."""

import json
import math

import pytest
import torch
import words
from tiny import build

from sparc3 import bundled_text
from sparc3.errors import InputError
from sparc3.tasks import counterpart, load_task, logit_difference, make_example, task_batches


class WholeWords:
    """A tokenizer whose tokens are the words between spaces; digits are tokens of ``digits`` at once."""

    bos_token_id, pad_token_id = None, None

    def __init__(self, digits):
        self.digits, self.known = digits, {}

    def __call__(self, texts, **options):
        if isinstance(texts, str):
            return {"input_ids": self.cut(texts)}
        return {"input_ids": [self.cut(text) for text in texts]}

    def cut(self, text):
        pieces = []
        for word in text.split():
            if word.isdigit():
                pieces += [word[i : i + self.digits] for i in range(0, len(word), self.digits)]
            else:
                pieces.append(word)
        return [self.known.setdefault(piece, len(self.known)) for piece in pieces]


def example(line):
    return make_example(
        words.tokenizer(), line["prompt"], line["corrupted"], [line["answer"]], [line["wrong"]]
    )


LINE = {"prompt": "ab to c", "corrupted": "ab to d", "answer": "x", "wrong": "y"}


@pytest.mark.parametrize("source", ["ioi", "ioi:bundled"])
def test_ioi_swaps_the_giver_and_shares_no_name_or_template(source):
    task = load_task(source, WholeWords(2), 40, seed=3)
    sides = []
    for examples in (task.ranking, task.judging):
        assert len({one.prompt for one in examples}) == 40
        for one in examples:
            (answer,), (wrong,) = one.answer, one.wrong
            assert answer != wrong
            assert one.prompt.count(answer.strip()) == 1
            assert one.prompt.count(wrong.strip()) == 2
            # The giver is the last name; with the other one there the roles are swapped, and nothing else differs.
            before, _, after = one.prompt.rpartition(wrong.strip())
            assert one.corrupted == before + answer.strip() + after
        assert {
            one.prompt.index(one.answer[0].strip()) < one.prompt.index(one.wrong[0].strip())
            for one in examples
        } == {
            True,
            False,
        }
        sides.append(
            ({one.group for one in examples}, {name for one in examples for name in one.answer + one.wrong})
        )
    for ranked, judged in zip(*sides, strict=True):
        assert len(ranked) > 2
        assert len(judged) > 2
        assert not ranked & judged


def test_the_bundled_ioi_judges_pairs_that_never_met():
    task = load_task("ioi", WholeWords(2), 20, bundled=True)
    assert task.name == "ioi:bundled"
    for examples, held_out in ((task.ranking, False), (task.judging, True)):
        for one in examples:
            assert bundled_text.held_out_pair(one.answer[0].strip(), one.wrong[0].strip()) == held_out


def test_greater_than_knows_every_year_above_and_none_below():
    tokenizer = WholeWords(2)
    for one in load_task("greater-than", tokenizer, 30).judging:
        start, century = one.prompt.split()[6], one.prompt.split()[-1]
        assert start[:2] == century
        assert {*one.answer} == {f"{year:02}" for year in range(int(start[2:]) + 1, 100)}
        assert {*one.wrong} == {f"{year:02}" for year in range(int(start[2:]) + 1)}
        assert one.right_ids == tuple(tokenizer.known[year] for year in one.answer)
        assert one.corrupted == one.prompt.replace(start, f"{century}01")


def test_greater_than_takes_one_digit_where_digits_are_tokens():
    for one in load_task("greater-than", words.tokenizer(), 30).ranking:
        tens = int(one.prompt.split()[6][2])
        assert one.answer == tuple(str(digit) for digit in range(tens + 1, 10))
        assert one.wrong == tuple(str(digit) for digit in range(tens))
        assert one.right_ids == tuple(3 + ord(digit) for digit in one.answer)


def test_the_same_seed_draws_the_same_and_another_does_not():
    first, again, other = (load_task("ioi", WholeWords(2), 10, seed) for seed in (0, 0, 1))
    assert first == again
    assert {one.prompt for one in first.judging} != {one.prompt for one in other.judging}


def test_a_task_that_no_tokenizer_cuts_is_refused():
    # With tokens of bytes no name is a single token.
    with pytest.raises(InputError, match=r"task ioi does not fit this model's tokenizer: the \w+"):
        load_task("ioi", words.tokenizer(), 4)
    with pytest.raises(
        InputError, match=r"task 'io' is not known; use ioi \| ioi:bundled \| greater-than or"
    ):
        load_task("io", words.tokenizer())
    with pytest.raises(InputError, match="0 examples: at least 1"):
        load_task("ioi", words.tokenizer(), 0)


# Batches and the logit difference


def test_batches_align_clean_and_corrupted_on_the_left():
    lines = [LINE, {**LINE, "prompt": "longer ab to c", "corrupted": "longer ab to d"}]
    examples = [example(line) for line in lines] * 9
    first, second = task_batches(build("llama", vocab_size=words.VOCABULARY), words.tokenizer(), examples)
    assert first["input_ids"].shape == (16, 15)
    assert second["input_ids"].shape == (2, 15)
    for row, line in enumerate(lines):
        for ids, text in ((first["input_ids"], line["prompt"]), (first["corrupted_ids"], line["corrupted"])):
            real = first["attention_mask"][row].bool()
            assert ids[row, real].tolist() == [words.BOS, *words.ids(text)]
            assert real[-1]
    assert torch.equal(counterpart(first)["input_ids"], first["corrupted_ids"])
    assert torch.equal(counterpart(first)["attention_mask"], first["attention_mask"])


def test_a_prompt_longer_than_the_positions_is_refused():
    model = build("llama", vocab_size=words.VOCABULARY, max_position_embeddings=5)
    with pytest.raises(
        InputError, match=r"a prompt has 8 tokens \(BOS included\), but the model has 5 positions"
    ):
        task_batches(model, words.tokenizer(), [example(LINE)])


def test_the_logit_difference_by_hand():
    logits = torch.zeros(2, 3, 5)
    logits[0, -1] = torch.tensor([2.0, 0.5, 9.0, 9.0, 9.0])
    logits[1, -1] = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    logits[:, :-1] = 100.0  # other positions do not count
    batch = {"right": torch.tensor([[0, -1], [2, 3]]), "wrong": torch.tensor([[1, -1], [0, 1]])}
    sums = math.log(math.exp(3) + math.exp(4)) - math.log(math.exp(1) + math.exp(2))
    torch.testing.assert_close(logit_difference(logits, batch), torch.tensor([1.5, sums]))
    logits.requires_grad_()
    logit_difference(logits, batch).sum().backward()
    assert torch.equal(logits.grad[0, -1], torch.tensor([1.0, -1.0, 0, 0, 0]))


# Files


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_a_file_is_split_by_its_groups(tmp_path):
    lines = [
        {**LINE, "prompt": f"p{n} c", "corrupted": f"p{n} d", "group": f"g{n % 4}", "answer": ["x", "z"]}
        for n in range(10)
    ]
    task = load_task(write(tmp_path / "task.jsonl", *lines, ""), words.tokenizer(), seed=1)
    assert {one.prompt for one in task.ranking + task.judging} == {line["prompt"] for line in lines}
    assert not {one.group for one in task.ranking} & {one.group for one in task.judging}
    assert {len(task.ranking), len(task.judging)} <= {4, 5, 6}
    assert task.ranking[0].right_ids == (3 + ord("x"), 3 + ord("z"))
    few = load_task(str(tmp_path / "task.jsonl"), words.tokenizer(), 2, seed=1)
    assert (len(few.ranking), len(few.judging)) == (2, 2)


def test_equal_prompts_are_never_on_both_sides(tmp_path):
    lines = [LINE, LINE, {**LINE, "prompt": "q c", "corrupted": "q d"}]
    for seed in range(4):
        task = load_task(write(tmp_path / "task.jsonl", *lines), words.tokenizer(), seed=seed)
        assert not {one.prompt for one in task.ranking} & {one.prompt for one in task.judging}


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("not JSON", "{"),
        ("not a JSON object", "[1]"),
        ("no field 'wrong'", {key: LINE[key] for key in ("prompt", "corrupted", "answer")}),
        ("no field 'corrupted'", {key: LINE[key] for key in ("prompt", "wrong", "answer")}),
        ("the field 'prompt' is not a string", {**LINE, "prompt": 3}),
        ("the field 'answer' is neither a string nor a list of strings", {**LINE, "answer": [3]}),
        ("the field 'group' is not a string", {**LINE, "group": 3}),
        ("the answer 'xy' is not a single token after the prompt (alone: 2)", {**LINE, "answer": "xy"}),
        ("the answer '' is not a single token after the prompt (alone: 0)", {**LINE, "wrong": ["y", ""]}),
        ("the prompt and the corrupted prompt are equal", {**LINE, "corrupted": LINE["prompt"]}),
        ("the prompt has 7 tokens and the corrupted prompt 8", {**LINE, "corrupted": "ab to cd"}),
        ("the prompt has no tokens", {**LINE, "prompt": ""}),
        ("at least one right and one wrong answer", {**LINE, "wrong": []}),
        ("an answer is both right and wrong", {**LINE, "wrong": ["y", "x"]}),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path, message, line):
    path = write(tmp_path / "task.jsonl", LINE, "", line)
    with pytest.raises(InputError) as caught:
        load_task(path, words.tokenizer())
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)


def test_files_without_two_groups_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"task.jsonl: .* at least two groups"):
        load_task(write(tmp_path / "task.jsonl", LINE, LINE), words.tokenizer())
    with pytest.raises(InputError, match=r"task.jsonl: .* at least two lines"):
        load_task(write(tmp_path / "task.jsonl", ""), words.tokenizer())
    with pytest.raises(InputError, match=r"missing.jsonl: cannot be read"):
        load_task(str(tmp_path / "missing.jsonl"), words.tokenizer())
