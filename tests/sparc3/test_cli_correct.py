"""sparc3 correct: what it prints, writes and refuses."""

import io
import json
import math
import re
import xml.dom.minidom

import pytest
import torch
from commands import run, saved, succeed, succeed_json
from matplotlib.figure import Figure
from test_correct import PROMPTS, shouting

import sparc3
from sparc3.cli_correct import _check_found
from sparc3.correct import Found
from sparc3.correction_report import correction_figure, label_axes
from sparc3.errors import InputError
from sparc3.mask import Mask
from sparc3.sweep import Measured


@pytest.fixture
def asked(room):
    """A model that shouts, and prompts after which it does."""
    saved(shouting(), room / "base")
    rows = [json.dumps({"prompt": prompt, "undesired": "@"}) for prompt in PROMPTS]
    (room / "prompts.jsonl").write_text("\n".join(rows))
    options = ["--behaviour", "answers", "--undesired", "prompts.jsonl", "--general", "train.txt"]
    return ["base", *options, "--tokens", 5, "--length", 16, "--samples", 8]


def listing(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_holds_the_model_the_report_the_plot_and_the_page(room, asked):
    succeed(
        "prune", "base", "--method", "magnitude", "--pattern", "layer", "--sparsity", 0.2, "--out", "small"
    )
    options = [
        "--count",
        2,
        "--points",
        2,
        "--compare",
        "random,lrp:set-difference,lrp:absolute",
        "--eval-text",
        "held.txt",
    ]
    stdout = succeed("correct", *asked, *options, "--compression", "small/mask.safetensors", "--out", "out")
    names = {path.name for path in (room / "out").iterdir()}
    assert {"model.safetensors", "mask.safetensors", "report.json", "correction.png", "page.html"} <= names
    assert (room / "out/correction.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((room / "out/report.json").read_text())
    assert [[point["count"] for point in result["sweep"]] for result in report["results"]] == [[1, 2]] * 4
    assert (report["before"]["shown"], report["after"]["shown"], report["after"]["count"]) == (1.0, 0.0, 2)
    assert report["prompts"] == {"run": 24, "explained": 12, "judged": 12, "tokens": 5}
    assert set(report["combined"]) == {"compressed", "compressed and corrected"}
    assert report["combined"]["compressed and corrected"]["shown"] == 0.0
    compressed = Mask.load("small/mask.safetensors")
    assert report["combined"]["compressed"]["fraction"] == compressed.sparsity
    assert report["combined"]["compressed"]["count"] == round(compressed.sparsity * compressed.total)
    # What was removed, by layer, is what the mask says.
    mask = Mask.load("out/mask.safetensors")
    lost = sum(layer["weights"] for layer in report["removed"]["by_layer"].values())
    assert lost == round(mask.sparsity * mask.total) == 2 * 3 * 32
    assert "m1.n17" in report["removed"]["by_layer"]["1"]["components"]
    assert mask.settings["behaviour"] == "answers"
    for line in (
        "whole model",
        "lrp:set-difference *",
        "lrp:absolute",
        "24 prompts run; explained on 12",
        "compressed and corrected, in weights",
    ):
        assert line in stdout
    assert "nan" not in stdout
    # The page is one file that loads nothing, with both sides of a sample.
    text = (room / "out/page.html").read_text()
    xml.dom.minidom.parseString(text)
    assert "http" not in text.replace("http://www.w3.org", "").replace("http-equiv", "").split("<svg")[0]
    assert "compressed and corrected, in weights" in text
    sample = report["samples"][0]
    assert "@" in sample["before"]
    assert "@" not in sample["after"]
    assert f'<td class="text">{sample["prompt"]}</td>' in text
    # And undone it is the base again.
    succeed("mask", "undo", "out", "out/mask.safetensors", "--base", "base", "--out", "restored")
    restored, base = (sparc3.load(name).model.state_dict() for name in ("./restored", "./base"))
    assert all(torch.equal(restored[name], tensor) for name, tensor in base.items())


def test_numbers_of_points_that_lie_together_are_not_written_over_each_other():
    counts = {0: 0.0, 1: 0.0001, 2: 0.0002, 40: 0.0201, 50: 0.0202, 60: 0.5}
    before, *sweep = (
        {"count": count, "shown": 1.0, "increase": increase} for count, increase in counts.items()
    )
    report = {
        "model": {"name": "some/model", "note": ""},
        "behaviour": {"name": "answers"},
        "unit": "neuron",
        "budget": 0.01,
        "before": before,
        "after": sweep[2],
        "results": [{"settings": {"method": "lrp"}, "sweep": sweep}],
    }
    drawn = io.StringIO()
    correction_figure(report).savefig(drawn, format="svg")
    # Matplotlib writes each text as a comment beside its outlines.
    written = re.findall("<!-- ([0-9]+) -->", drawn.getvalue())
    assert written == ["40", "60", "2"]


def test_the_budget_chooses(room, asked):
    found = succeed_json(
        "correct", *asked, "--budget", 10, "--unit", "weight", "--include", "*mlp*", "--out", "out"
    )
    sweep = found["results"][0]["sweep"]
    assert found["after"] == sweep[-1]
    assert all("mlp" in name for layer in found["removed"]["by_layer"].values() for name in layer["tensors"])
    assert found["after"]["count"] == sum(layer["weights"] for layer in found["removed"]["by_layer"].values())
    assert found["budget"] == 10


def test_fewer_than_asked_for_are_removed_where_the_others_cost_too_much(room, asked):
    options = ["--count", 80, "--points", 1, "--budget", 0.001]
    stdout = succeed("correct", *asked, *options, "--out", "out")
    count = json.loads((room / "out/report.json").read_text())["after"]["count"]
    assert 0 < count < 80
    assert f"Note: 80 were to be removed, but only {count} cost no more" in stdout
    stdout = succeed("correct", *asked, *options, "--no-spare", "--out", "all")
    assert json.loads((room / "all/report.json").read_text())["after"]["count"] == 80
    assert "Note: 80" not in stdout


@pytest.mark.parametrize(
    ("options", "falls"), [(("--method", "random", "--count", 1), False), (("--count", 6), True)]
)
def test_it_says_where_the_behaviour_does_not_fall(room, asked, options, falls):
    stdout = succeed("correct", *asked, *options, "--points", 1, "--no-spare", "--out", "out")
    report = json.loads((room / "out/report.json").read_text())
    assert (report["after"]["shown"] < report["before"]["shown"]) == falls
    assert ("Note: the behaviour is shown as often as before" in stdout) != falls


@pytest.mark.parametrize("chosen", [True, False])
def test_a_model_that_breaks_is_not_saved_and_no_count_is_advised(chosen):
    broken = Measured(9, 0.1, 1.0, 1.0, 5.0, 0.2, float("nan"), float("nan"), ())
    found = Found({}, {}, (broken,), broken if chosen else None, Mask({}, {}))
    with pytest.raises(InputError, match=r"without 9 neurons the model breaks \(perplexity nan\)") as told:
        _check_found(found, "neuron", 0.01)
    assert "--count" not in str(told.value)


def test_a_model_without_the_behaviour_is_left_alone(room, asked):
    rows = [json.dumps({"prompt": prompt, "undesired": "never"}) for prompt in PROMPTS]
    (room / "prompts.jsonl").write_text("\n".join(rows))
    before = listing(room)
    result = run("correct", *asked, "--out", "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the model does not show answers: 0 of 24 prompts" in result.stderr
    assert "Nothing is pruned" in result.stderr
    assert listing(room) == before


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("behaviour 'anger' is not known", ("--behaviour", "anger")),
        ("wrong.jsonl:2: not a JSON object", ("--undesired", "wrong.jsonl")),
        ("empty.txt: no prompts in it", ("--undesired", "empty.txt")),
        ("none.jsonl: cannot be read", ("--undesired", "none.jsonl")),
        ("nothing is undesired after the prompt", ("--undesired", "plain.txt")),
        ("--scorer scores toxicity, not answers", ("--scorer", "math:sqrt")),
        ("scorer math:pi is not callable", ("--behaviour", "toxicity", "--scorer", "math:pi")),
        ("unit 'layer' is not known", ("--unit", "layer")),
        ("method 'activation' does not score weights", ("--unit", "weight", "--compare", "activation")),
        ("contrast 'sum' is not known", ("--compare", "lrp:sum")),
        ("target 'odds' is not known", ("--target", "odds")),
        ("rule 'lxt' is not known", ("--rule", "lxt")),
        ("give one of them", ("--count", 3, "--fraction", 0.1)),
        ("--fraction 1.0 is not a share", ("--fraction", 1)),
        ("999 neurons cannot be removed", ("--count", 999)),
        ("do not fit unit neuron", ("--include", "*mlp*")),
        ("nothing is pruned: give --count", ("--budget", 0, "--points", 1, "--unit", "head")),
        ("cannot read a mask", ("--compression", "plain.txt")),
        ("none.txt: no such text file", ("--general", "none.txt")),
        ("the folder nowhere does not exist", ("--out", "nowhere/out")),
        ("the model has 64", ("--tokens", 80)),
    ],
)
def test_refused(room, asked, message, arguments):
    (room / "wrong.jsonl").write_text('{"prompt": "a", "undesired": "b"}\n{"text": "a"}\n')
    (room / "empty.txt").write_text("\n \n")
    (room / "plain.txt").write_text("one prompt\n")
    before = listing(room)
    out = () if "--out" in arguments else ("--out", "out")
    result = run("correct", *asked, *arguments, *out)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert listing(room) == before


def test_other_models_have_no_prompts_of_their_own(room, asked):
    result = run("correct", "base", "--behaviour", "insults", "--general", "train.txt", "--out", "out")
    assert "no prompts that provoke insults: give a file as --undesired" in result.stderr


@pytest.mark.parametrize(
    ("increases", "scale"),
    [
        ([], "linear"),
        ([0.1, -0.002], "linear"),
        ([0.2, math.nan], "symlog"),
        ([math.inf, 0.0], "linear"),
        ([1.8e9, math.inf, -0.003], "symlog"),
    ],
)
def test_a_broken_model_does_not_scale_the_others_to_nothing(increases, scale, tmp_path):
    figure = Figure()
    axes = figure.subplots()
    axes.plot(increases, [0.5] * len(increases), "o")
    label_axes(axes, increases, "loops")
    figure.savefig(tmp_path / "plot.png")
    assert axes.get_xscale() == scale
    left, right = axes.get_xlim()
    assert all(left < increase < right for increase in increases if math.isfinite(increase))
    if scale == "symlog":
        assert axes.get_xlabel().endswith("(logarithmic beyond 1 %)")
        # The budget's 1 % is a good part of the axis from its left end, and few decades are written.
        start, budget, end = axes.transData.transform([(left, 0), (0.01, 0), (right, 0)])[:, 0]
        assert budget - start > 0.1 * (end - start)
        assert len(axes.get_xticks()) <= 10
