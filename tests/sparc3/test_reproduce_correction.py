"""sparc3 reproduce toxicity and repetition, in smoke scale and on files in the hub's own format."""

import json

import pytest
import torch
from commands import run, succeed

import sparc3
from sparc3 import behaviours, bundled_text, scorers
from sparc3.correct import Correction
from sparc3.errors import InputError
from sparc3.paper_text import hub_file
from sparc3.reproduce import configuration
from sparc3.reproduce_correction import prompts_of
from sparc3.reproduce_report import plot


def rows(folder):
    return json.loads((folder / "report.json").read_text())["results"]


def again(config, behaviour, prompts, unit):
    """The smoke scale's correction of seed 0, from Python."""
    loaded = sparc3.load("tiny-opt")
    drawn = sparc3.windows(
        loaded.tokenizer, sparc3.read_documents(["bundled"]), config["length"], config["samples"], seed=0
    )
    held_out = sparc3.windows(
        loaded.tokenizer,
        sparc3.read_documents(["bundled:held_out"]),
        config["length"],
        config["windows"],
    )
    return Correction(
        loaded.model,
        loaded.tokenizer,
        behaviour,
        prompts,
        drawn,
        held_out,
        unit=unit,
        tokens=config["tokens"],
        examples=config["examples"],
        include=["*.fc1.*"] if unit == "weight" else [],
        seed=0,
    )


def test_toxicity(tmp_path):
    out = tmp_path / "out"
    shown = succeed("reproduce", "toxicity", "--scale", "smoke", "--out", out)
    assert {path.name for path in out.iterdir()} == {"report.json", "table.md", "plot.png"}
    assert (out / "plot.png").stat().st_size > 5000
    config, found = configuration("toxicity", "smoke"), rows(out)
    assert [row["method"] for row in found] == ["lrp (paper)", "lrp", "gradient", "activation", "random"]
    behaviour = behaviours.toxicity(behaviours.insult_scores, 0.9)
    correction = again(config, behaviour, bundled_text.insult_prompts(256), "neuron")
    for row in found:
        assert row["prompts"] == {"run": correction.run, "explained": 8, "judged": 8}
        assert row["before"] == correction.before.described()
        assert [point["count"] for point in row["sweep"]] == [4, 16]
    absolute = correction.find("lrp", contrast="absolute", counts=[4, 16], budget=None)
    assert found[1]["sweep"] == [point.described() for point in absolute.sweep]
    paper = correction.find("lrp", rule="attnlrp", counts=[4, 16], budget=None)
    assert found[0]["sweep"] == [point.described() for point in paper.sweep]
    assert "| tiny-opt | neuron | whole model | 0 |" in shown
    assert "| tiny-opt | neuron | random | 16 (" in shown
    assert "What the paper leaves open" in shown


def test_repetition(tmp_path):
    out = tmp_path / "out"
    shown = succeed("reproduce", "repetition", "--scale", "smoke", "--out", out)
    config, found = configuration("repetition", "smoke"), rows(out)
    assert [(row["unit"], row["method"]) for row in found] == [
        (unit, method) for unit in ("weight", "neuron") for method in config["units"][unit]
    ]
    correction = again(config, behaviours.repetition(), bundled_text.loop_prompts(256), "weight")
    expected = correction.find("lrp", rule="attnlrp", counts=[100, 400], budget=None)
    assert found[0]["before"] == correction.before.described()
    assert found[0]["sweep"] == [point.described() for point in expected.sweep]
    # Of fc1 alone.
    assert correction.total == sum(
        weight.numel()
        for name, weight in sparc3.load("tiny-opt").model.named_parameters()
        if name.endswith("fc1.weight")
    )
    assert "| tiny-opt | weight | lrp | 400 (" in shown
    # An infinite perplexity, which a report has as null, leaves a gap.
    found[0]["sweep"][0]["perplexity"] = None
    plot("repetition", config, found, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes() != (out / "plot.png").read_bytes()


def test_what_the_paper_finds_stands_beside_its_own_method(tmp_path):
    out = tmp_path / "out"
    few = ("--model", "tiny-opt", "--prompts", "bundled", "--calibration", "bundled", "--judged", "bundled")
    few += ("--length", 32, "--samples", 4, "--windows", 2, "--seeds", 1)
    shown = succeed("reproduce", "repetition", *few, "--out", out)
    beside = [
        [cell.strip() for cell in line.split("|")]
        for line in shown.splitlines()
        if "repetition falls" in line
    ]
    assert [(row[2], row[3], row[4].split()[0]) for row in beside] == [
        ("weight", "lrp (paper)", "7000"),
        ("neuron", "lrp (paper)", "20"),
    ]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    real, calls = Correction.find, []

    def twice(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(Correction, "find", twice)
    command = ("reproduce", "toxicity", "--scale", "smoke")
    assert run(*command, "--out", out).exit_code == 130
    assert len(rows(out)) == 2
    succeed(*command, "--out", out)
    assert len(calls) == 3 + 3
    succeed(*command, "--out", whole)
    assert rows(out) == rows(whole)
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()


def test_the_service_without_a_key_ends_the_run_before_any_model(tmp_path, monkeypatch):
    monkeypatch.delenv(scorers.PERSPECTIVE_KEY, raising=False)
    monkeypatch.setattr("sparc3.reproduce.load", lambda *arguments, **options: 1 / 0)
    found = run(
        "reproduce", "toxicity", "--scale", "smoke", "--scorer", "perspective", "--out", tmp_path / "out"
    )
    assert (found.exit_code, found.stdout) == (2, "")
    assert "needs your key for it in PERSPECTIVE_API_KEY" in found.stderr
    found = run("reproduce", "repetition", "--scorer", "perspective", "--out", tmp_path / "out")
    assert "repetition has no setting scorer" in found.stderr


# A line of allenai/real-toxicity-prompts, with all of its fields.
def line(text, challenging):
    scores = {"profanity": 0.5, "sexually_explicit": None, "identity_attack": 0.1, "flirtation": 0.2}
    scores |= {"threat": 0.1, "insult": 0.3, "severe_toxicity": 0.2, "toxicity": 0.9}
    row = {"filename": "0.txt", "begin": 0, "end": 9, "challenging": challenging}
    return json.dumps(row | {"prompt": {"text": text, **scores}, "continuation": {"text": " x", **scores}})


def test_the_challenging_prompts_of_the_hubs_file(tmp_path, monkeypatch):
    path = tmp_path / "prompts.jsonl"
    lines = [line("you", True), line("mild", False), line("é so", True), "", line("you", True)]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert prompts_of("toxicity", str(path)) == ["you", "é so"]
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *name, **options: asked.append((*name, options)) or path
    )
    assert prompts_of("toxicity", "real-toxicity-prompts") == ["you", "é so"]
    assert asked == [("allenai/real-toxicity-prompts", "prompts.jsonl", {"repo_type": "dataset"})]
    assert hub_file(str(path)) == path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": {"text": "a"}}', "not JSON lines with"),
        ('{"challenging": true, "prompt": "a"}', "not JSON lines with"),
        ('{"challenging"', "not JSON lines with"),
        (line("a", False), "no prompt in it is challenging"),
    ],
)
def test_damaged_files_of_prompts_are_refused(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        prompts_of("toxicity", str(path))


def test_prompts_of_our_own_and_of_the_user(tmp_path):
    loops = prompts_of("repetition", "loops")
    assert len(loops) == len(set(loops)) == 160
    (tmp_path / "mine.txt").write_text("one\ntwo\n")
    assert prompts_of("repetition", str(tmp_path / "mine.txt")) == ["one", "two"]
    with pytest.raises(InputError, match="cannot be read"):
        prompts_of("repetition", str(tmp_path / "none.txt"))


def test_insults_are_scored_for_the_bundled_models():
    word = bundled_text.INSULTS[0]
    assert behaviours.insult_scores([f"You {word.upper()}!", f"un{word}ed", ""]) == [1.0, 0.0, 0.0]
    assert torch.as_tensor(behaviours.insult_scores([])).shape == (0,)


def test_prompts_that_cannot_be_read_leave_no_folder_behind(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    words = ("toxicity", "--scale", "smoke", "--prompts", tmp_path / "empty.txt", "--out", tmp_path / "out")
    found = run("reproduce", *words)
    assert (found.exit_code, found.stdout) == (2, "")
    assert "no prompts in it" in found.stderr
    assert not (tmp_path / "out").exists()
