"""sparc3 reproduce in smoke scale: what it measures, shows beside the paper, keeps and refuses."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from commands import run, succeed, succeed_json
from PIL import Image

import sparc3
import sparc3.reproduce
from sparc3.errors import InputError
from sparc3.reproduce import EXPERIMENTS, Run, carried, configuration
from sparc3.reproduce_report import markdown, plot

PAPER = "TinyLlama-1.1B-intermediate-step-1431k-3T"


def read(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def scored(monkeypatch):
    """A stub in the place of lm-eval's harness: accuracies that tell the tasks apart."""
    asked = []

    def accuracies(model, tokenizer, tasks):
        asked.append(list(tasks))
        return {task: 0.25 + 0.5 * place for place, task in enumerate(tasks)}

    monkeypatch.setattr(sparc3.reproduce, "accuracies", accuracies)
    monkeypatch.setattr(sparc3.reproduce, "check_installed", lambda: None)
    return asked


def test_every_experiment_has_its_scales_and_says_what_is_open():
    for name in EXPERIMENTS:
        for scale in ("paper", "smoke"):
            config = configuration(name, scale)
            assert config["models"]
            assert config["open"]
            assert "2506.13727" in config["source"]


def test_table1(tmp_path, scored):
    out = tmp_path / "out"
    shown = succeed(
        "reproduce", "table1", "--scale", "smoke", "--out", out, "--task", "boolq", "--task", "rte"
    )
    found = read(out)
    assert {path.name for path in out.iterdir()} == {"report.json", "table.md", "plot.png"}
    assert (out / "table.md").read_text() in shown
    assert (out / "plot.png").stat().st_size > 5000
    assert [(row["method"], row["seed"]) for row in found["results"]] == [
        ("dense", 0), ("magnitude", 0), ("wanda", 0), ("lrp (paper)", 0), ("lrp", 0),
        ("wanda", 1), ("lrp (paper)", 1), ("lrp", 1),
    ]  # fmt: skip
    assert scored == [["boolq", "rte"]] * 8
    assert all(row["accuracy"] == {"boolq": 0.25, "rte": 0.75} for row in found["results"])
    # Every figure again, by hand.
    loaded = sparc3.load("tiny-llama")
    documents = {name: sparc3.read_documents([name]) for name in ("bundled", "bundled:held_out")}
    judged = sparc3.windows(loaded.tokenizer, documents["bundled:held_out"], 64, 8)
    settings = {
        "magnitude": {},
        "wanda": {},
        "lrp": {},
        "lrp (paper)": {"rule": "attnlrp", "target": "logit", "positions": "all", "reduce": "signed"},
    }
    for row in found["results"]:
        if row["method"] != "dense":
            drawn = sparc3.windows(loaded.tokenizer, documents["bundled"], 64, 4, seed=row["seed"])
            method = row["method"].split()[0]
            mask = sparc3.prune(loaded.model, drawn, method, 0.5, "row", **settings[row["method"]])
            mask.apply(loaded.model, keep=True)
        expected = sparc3.perplexity(loaded.model, judged).value
        if row["method"] != "dense":
            mask.undo(loaded.model)
        assert row["perplexity"] == pytest.approx(expected, rel=1e-6)
    table = (out / "table.md").read_text()
    assert "| tiny-llama | wanda |" in table
    assert "| 50.00 |" in table
    assert "What the paper leaves open" in table


def test_the_papers_figures_stand_beside_ours(tmp_path, scored):
    # A model folder by the paper's name, so that its column is filled.
    folder = tmp_path / PAPER
    loaded = sparc3.load("tiny-llama")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    text = ("--calibration", "bundled", "--judged", "bundled:held_out", "--length", 32, "--windows", 4)
    few = (*text, "--seeds", 1, "--dtype", "float32", "--model", folder)
    shown = succeed("reproduce", "table1", "--out", out, *few, "--samples", 2, "--task", "rte")
    rows = [
        [cell.strip() for cell in line.split("|")] for line in shown.splitlines() if f"| {PAPER} |" in line
    ]
    assert {row[2]: (row[4], row[6]) for row in rows} == {
        "dense": ("7.98", "48.74"),
        "magnitude": ("24.42", "41.38"),
        "wanda": ("11.52", "45.46"),
        "lrp (paper)": ("11.85", "44.71"),
        "lrp": ("", ""),
    }
    assert (out / "plot.png").stat().st_size > 5000


def test_samples(tmp_path):
    found = succeed_json("reproduce", "samples", "--scale", "smoke", "--out", tmp_path / "out")
    assert [(row["count"], row["method"]) for row in found["results"]] == [
        (count, method) for count in (2, 4) for method in ("wanda", "lrp (paper)", "lrp")
    ]
    assert all(math.isfinite(row["perplexity"]) for row in found["results"])


def test_concentration(tmp_path):
    found = succeed_json("reproduce", "concentration", "--scale", "smoke", "--out", tmp_path / "out")
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for row in found["results"]:
        assert set(row["kinds"]) == kinds
        for shares in row["kinds"].values():
            assert 0 < shares["0.5"] < shares["0.9"] < shares["0.99"] <= 1


def test_carried_is_counted_right():
    generator = np.random.default_rng(0)
    tensors = {f"blocks.{n}.mlp.fc1.weight": generator.normal(size=(3, 5)) ** 3 for n in range(2)}
    tensors["blocks.0.attn.q.weight"] = np.array([[4.0, -3.0, -np.inf, 2.0, 1.0]])
    found = carried({name: torch.tensor(values) for name, values in tensors.items()})
    assert found["q"] == {"0.5": 2 / 5, "0.9": 3 / 5, "0.99": 4 / 5}
    values = np.sort(np.abs(np.concatenate([tensors[f"blocks.{n}.mlp.fc1.weight"].ravel() for n in (0, 1)])))[
        ::-1
    ]
    for share in (0.5, 0.9, 0.99):
        count = next(n for n in range(1, 31) if values[:n].sum() >= share * values.sum())
        assert found["fc1"][f"{share:g}"] == count / 30


def test_ioi(tmp_path):
    out = tmp_path / "out"
    shown = succeed("reproduce", "ioi", "--scale", "smoke", "--out", out)
    found = read(out)["results"]
    units = configuration("ioi", "smoke")["units"]
    assert [(row["unit"], row["method"]) for row in found] == [
        (unit, method) for unit, methods in units.items() for method in methods
    ]
    for row in found:
        assert row["curve"][-1]["fraction"] == 1.0
        assert 0 < row["sparsest"]["fraction"] <= 1
    assert "| head | lrp |" in shown


def test_models_stand_apart_in_tables_and_plots(tmp_path):
    config = configuration("ioi", "smoke", models=["hub/one", "hub/two"])
    results = [
        {
            "key": f"{model} | {unit}",
            "model": model,
            "unit": unit,
            "method": "lrp",
            "seed": 0,
            "curve": [{"fraction": share, "accuracy": share} for share in (0.1, 1.0)],
            "sparsest": {"fraction": kept},
            "cpr": kept / 2,
        }
        for model, kept in (("hub/one", 0.25), ("hub/two", 0.5))
        for unit in config["units"]
    ]
    table = markdown("ioi", config, results)
    assert "| one | head | lrp | 25.00 % | 0.12 | 1 |" in table
    assert "| two | head | lrp | 50.00 % | 0.25 | 1 |" in table
    # Null where faithfulness is undefined.
    undefined = markdown("ioi", config, [row | {"cpr": None} for row in results])
    assert "| one | head | lrp | 25.00 % | - | 1 |" in undefined
    plot("ioi", config, results, tmp_path / "plot.png")
    image = Image.open(tmp_path / "plot.png")
    # Three units beside each other, two models below each other, 150 dots an inch.
    assert image.size == ((1.2 + 4.2 * 3) * 150, 4.2 * 2 * 150)


@pytest.mark.parametrize("name", ["table1", "samples"])
def test_an_infinite_perplexity_which_a_report_has_as_null_leaves_a_gap(name, tmp_path):
    config = configuration(name, "smoke", models=["hub/one"])
    counts = config.get("counts", [2])
    results = [
        {"key": f"{method} {count}", "model": "hub/one", "method": method, "seed": 0, "count": count}
        | {"perplexity": None if method == "wanda" else 10.0 + count, "accuracy": {"rte": 0.5}}
        for method in ("wanda", "lrp")
        for count in counts
    ]
    assert "| - |" in next(
        line for line in markdown(name, config, results).splitlines() if "| wanda |" in line
    )
    plot(name, config, results, tmp_path / "plot.png")
    plot(name, config, [row for row in results if row["method"] == "lrp"], tmp_path / "other.png")
    # The gap's method has its name on the axis or in the legend all the same.
    assert (tmp_path / "plot.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_reduced_is_small_models_and_keeps_the_methods():
    for name in ("table1", "samples", "concentration", "ioi"):
        paper, reduced = configuration(name, "paper"), configuration(name, "reduced")
        assert set(reduced) - {"windows"} == set(paper) - {"windows"}
        assert [reduced.get(part) for part in ("methods", "units", "pattern")] == [
            paper.get(part) for part in ("methods", "units", "pattern")
        ]
        assert reduced["models"] == ["HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m"]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    real = sparc3.reproduce.evaluate_pruned
    calls = []

    def twice(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sparc3.reproduce, "evaluate_pruned", twice)
    command = ("reproduce", "samples", "--scale", "smoke")
    assert run(*command, "--out", out).exit_code == 130
    assert len(read(out)["results"]) == 2
    succeed(*command, "--out", out)
    assert len(calls) == 3 + 4
    succeed(*command, "--out", out)  # complete: nothing is measured
    assert len(calls) == 3 + 4
    succeed(*command, "--out", whole)
    assert read(out)["results"] == read(whole)["results"]
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()
    refused = run(*command, "--out", out, "--length", 32)
    assert refused.exit_code == 2
    assert "another experiment or other settings" in refused.stderr
    refused = run("reproduce", "concentration", "--scale", "smoke", "--out", out)
    assert refused.exit_code == 2
    assert "another experiment or other settings" in refused.stderr


def test_a_run_goes_on_with_more_models_seeds_and_counts(tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"

    def measured(folder, **changes):
        asked = Run.open("samples", "smoke", folder, **changes)
        asked.finish()
        return sorted((row["model"], row["count"], row["seed"], row["method"]) for row in asked.results)

    first = measured(out, counts=[2], models=["tiny-llama"])
    assert len(first) == 3
    # Fewer are asked for than are there, and others: all stand in one report, and nothing is measured twice.
    second = measured(out, counts=[4], models=["tiny-opt"], seeds=2)
    assert len(second) == 3 + 6
    assert {*first} < {*second}
    third = measured(out, counts=[2, 4], models=["tiny-llama", "tiny-opt"], seeds=2)
    assert len(third) == 2 * 2 * 2 * 3
    assert third == measured(whole, counts=[2, 4], models=["tiny-llama", "tiny-opt"], seeds=2)
    settings = read(out)["settings"]
    assert settings == read(whole)["settings"]
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()
    by_key = [{row["key"]: row["perplexity"] for row in read(folder)["results"]} for folder in (out, whole)]
    assert by_key[0] == by_key[1]
    # A complete run of less leaves what is there.
    measured(out, counts=[2], models=["tiny-llama"])
    assert read(out)["settings"] == settings
    assert (out / "table.md").read_text() == (whole / "table.md").read_text()


def test_wrong_words_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sparc3.reproduce, "load", lambda *arguments, **options: 1 / 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for name, text in [
        ("cut", '{"experiment": "samples", "res'),
        ("list", "[1]"),
        ("rows", '{"experiment": "samples", "settings": {"models": [], "seeds": 1}}'),
        ("seeds", '{"experiment": "samples", "settings": {"models": []}, "results": []}'),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(text)
    smoke = ("samples", "--scale", "smoke")
    for arguments, message in [
        (("table2",), "experiment 'table2' is not known; use table1 | "),
        (("ioi", "--scale", "tiny"), "scale 'tiny' is not known"),
        (("ioi", "--judged", "bundled"), "ioi has no setting judged"),
        (("samples", "--out", tmp_path / "mine"), "holds no report of this experiment"),
        (
            ("samples", "--out", tmp_path / "mine" / "notes.txt"),
            "notes.txt is a file; give a folder as --out",
        ),
        (("samples", "--out", tmp_path / "no" / "where"), "does not exist; make it first"),
        (
            (*smoke, "--out", tmp_path / "cut"),
            "report.json is not a report of sparc3 reproduce, or it is damaged",
        ),
        ((*smoke, "--out", tmp_path / "list"), "report.json is not a report of sparc3 reproduce"),
        ((*smoke, "--out", tmp_path / "rows"), "report.json is not a report of sparc3 reproduce"),
        ((*smoke, "--out", tmp_path / "seeds"), "or it is damaged ('seeds'); give another --out"),
        ((*smoke, "--model", "tiny-llama", "--model", "./tiny-lama"), "./tiny-lama: no such folder here"),
    ]:
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        found = run("reproduce", *arguments, *out)
        assert (found.exit_code, found.stdout) == (2, "")
        assert message in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["report.json", "table.md", "plot.png"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    run = Run.open("concentration", "smoke", tmp_path / "out")
    # As a full disk, a folder in the file's place is an OSError.
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(InputError, match=f"cannot write .*{name}"):
        run.finish()


def test_a_missing_harness_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'sparc3\[eval\]'"):
        Run.open("table1", "paper", tmp_path / "out")
