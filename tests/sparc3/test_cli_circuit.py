"""sparc3 circuit: what it prints, writes and refuses."""

import json
import re

import letters
import pytest
import torch
import words
from commands import run, succeed, succeed_json

import sparc3
from sparc3 import circuit as circuits
from sparc3 import circuit_settings
from sparc3.ablation import differences
from sparc3.agreement import agreement
from sparc3.circuit_page import circuit_page
from sparc3.mask import Mask
from sparc3.tasks import SCHEMA, load_task, task_batches

WRITTEN = {
    *("report.json", "circuit.html", "faithfulness.png", "relevance.png"),
    *("components.safetensors", "mib.json"),
}


@pytest.fixture
def asked(room, base):
    """The model and a task file that it does."""
    rows = letters.lines(sparc3.load(base).model)
    (room / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [base, "--task", "task.jsonl"]


def listing(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_holds_the_report_the_plot_and_the_mask(room, asked):
    stdout = succeed("circuit", *asked, "--unit", "neuron", "--compare", "gradient,random", "--out", "out")
    assert {path.name for path in (room / "out").iterdir()} == WRITTEN | {"mask.safetensors"}
    assert (room / "out/faithfulness.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((room / "out/report.json").read_text())
    assert [row["method"] for row in report["results"]] == ["lrp", "gradient", "random"]
    assert report["total"] == 96
    assert report["task"]["ranking"]["examples"] == report["task"]["judging"]["examples"] == 6
    assert not {*report["task"]["ranking"]["groups"]} & {*report["task"]["judging"]["groups"]}
    assert report["full"]["accuracy"] == 1
    chosen = report["circuit"]
    rest = {name: chosen[name] for name in ("components", "blocks")}
    assert chosen == {"method": "lrp", **report["results"][0]["sparsest"], **rest}
    assert len(chosen["components"]) == chosen["kept"]
    assert all(re.fullmatch(r"m[01]\.n\d+", name) for name in chosen["components"])
    assert f"circuit of lrp: {chosen['kept']} of 96 neurons" in stdout
    (row,) = (line.split() for line in stdout.splitlines() if line.startswith("lrp "))
    assert row[1:3] == [str(chosen["kept"]), f"{chosen['kept'] / 96:.2%}"]
    blind = report["empty"]["accuracy"] >= 0.9
    assert ("Note: with every neuron ablated the accuracy is still" in stdout) == blind
    assert "ranked on 6 examples, judged on 6 others" in stdout
    assert "Pearson" not in stdout


def test_where_faithfulness_is_undefined_the_circuit_is_judged_by_accuracy(room, base, asked):
    rows = letters.misleading_lines(sparc3.load(base).model)
    # Of a group, examples are all ranked on or all judged on: each third is of those that embeddings alone do.
    (room / "task.jsonl").write_text(
        "".join(json.dumps(row | {"group": str(n % 2)}) + "\n" for n, row in enumerate(rows))
    )
    command = ("circuit", *asked, "--unit", "weight", "--compare", "magnitude")
    found = succeed_json(*command, "--out", "out")
    full, empty = found["full"], found["empty"]
    assert empty["logit_difference"] > full["logit_difference"]
    assert (full["accuracy"], empty["accuracy"]) == (1, pytest.approx(1 / 3))
    assert found["circuit"]["accuracy"] >= 0.9
    note = (
        f"with every weight ablated the mean logit difference, {empty['logit_difference']:.3g}, is not below the "
        f"whole model's, {full['logit_difference']:.3g}, so that faithfulness, CPR and CMD are undefined; go by the "
        "accuracy, which falls from 1.000 to 0.333"
    )
    report = json.loads((room / "out/report.json").read_text())
    for row in report["results"]:
        assert (row["cpr"], row["cmd"]) == (None, None)
        assert {point["faithfulness"] for point in row["curve"]} == {None}
    stdout = succeed(*command, "--out", "shown")
    assert f"Note: {note}" in stdout
    (line,) = (line.split() for line in stdout.splitlines() if line.startswith("lrp "))
    assert line[-3:-1] == ["-", "-"]
    page = (room / "out/circuit.html").read_text()
    assert note.replace("'", "&#x27;") in page
    # From the file, where NaN is null, the page is the same.
    assert circuit_page(report, room / "out/faithfulness.png", room / "out/relevance.png") == page
    assert ", faithfulness -. The whole model" in page
    assert not re.search(r"\bnan\b", stdout + re.sub('src="[^"]*"', "", page))


@pytest.mark.parametrize("unit", ["weight", "neuron", "head"])
def test_the_mask_is_the_circuit_of_the_report(room, base, asked, unit):
    options = [
        "--unit",
        unit,
        "--rule",
        "attnlrp",
        "--by",
        "value",
        "--reduce",
        "signed",
        "--seed",
        2,
        "--keep",
        0.4,
    ]
    found = succeed_json("circuit", *asked, *options, "--out", "out")
    chosen = found["circuit"]
    assert chosen["fraction"] == 0.4
    mask = Mask.load("out/mask.safetensors")
    assert mask.settings["task"] == "task.jsonl"
    assert (mask.settings["unit"], mask.settings["method"], mask.settings["rule"]) == (unit, "lrp", "attnlrp")
    loaded = sparc3.load(base)
    mask.apply(loaded.model)
    task = load_task("task.jsonl", words.tokenizer(), seed=2)
    values = differences(loaded.model, task_batches(loaded.model, loaded.tokenizer, task.judging)).double()
    assert values.mean().item() == pytest.approx(chosen["logit_difference"], abs=1e-5)
    assert (values > 0).double().mean().item() == chosen["accuracy"]
    # And the library finds the same.
    search = circuits.Search(sparc3.load(base).model, words.tokenizer(), task, unit)
    expected = search.find("lrp", rule="attnlrp", by="value", reduce="signed")
    assert [point["faithfulness"] for point in found["results"][0]["curve"]] == pytest.approx(
        [point.faithfulness for point in expected.curve]
    )
    if unit == "weight":
        assert mask.total * (1 - mask.sparsity) == pytest.approx(chosen["kept"])
        assert "components" not in chosen


def test_rules_that_are_compared_are_said_with_what_they_needed(room, asked):
    options = ["--unit", "neuron", "--out", "out"]
    (row,) = succeed_json("circuit", *asked, *options)["results"]
    compared = row["settings"]["compared"]
    assert list(compared) == [
        str(sparc3.Rule.parse(rule)) for rule in circuit_settings.default_rules("neuron", "zero")
    ]
    assert compared[row["settings"]["rule"]] == min(compared.values())
    stdout = succeed("circuit", *asked, *options[:-1], "shown")
    best, other = sorted(compared.items(), key=lambda pair: pair[1])
    said = f"{best[1]:.2%} {best[0]}, {other[1]:.2%} {other[0]}"
    assert f"smallest circuit of the ranking examples by rule: {said}" in " ".join(stdout.split())
    assert said in (room / "shown" / "circuit.html").read_text()
    assert circuit_settings.compared({"compared": {}}).startswith("not compared")
    asked_for = succeed("circuit", *asked, "--unit", "neuron", "--rule", "attnlrp", "--out", "one")
    assert "by rule" not in asked_for
    both = succeed_json("circuit", *asked, "--unit", "neuron", "--rule", "attnlrp+gradient", "--out", "both")
    assert both["results"][0]["settings"]["rule"] == "attnlrp + gradient"
    # Tokens are explained by one rule.
    assert both["task"]["token_rule"] == "attnlrp"


def test_scores_agree_with_exact_ablation_where_it_is_compared(room, asked):
    options = ["--unit", "node", "--ablation", "patch", "--compare", "exact,random", "--out", "out"]
    found = succeed_json("circuit", *asked, *options)
    rows = {row["method"]: row for row in found["results"]}
    assert {path.name for path in (room / "out").iterdir()} == WRITTEN
    assert set(rows["lrp"]["scores"]) == {f"a{i}.h{j}" for i in range(2) for j in range(4)} | {"m0", "m1"}
    assert "agreement" not in rows["exact"]
    for method in ("lrp", "random"):
        scores, exact = (torch.tensor(list(rows[name]["scores"].values())) for name in (method, "exact"))
        assert rows[method]["agreement"] == pytest.approx(agreement(scores, exact), abs=1e-5)
    assert rows["lrp"]["settings"]["rule"] == str(sparc3.Rule.parse(circuit_settings.DEFAULT_RULE))
    stdout = succeed("circuit", *asked, *options[:-1], "shown")
    (line,) = (line.split() for line in stdout.splitlines() if line.startswith("lrp "))
    assert line[-3:-1] == [f"{rows['lrp']['agreement'][name]:.3f}" for name in ("pearson", "spearman")]
    assert "Spearman" in stdout


def test_force_replaces_a_circuit_but_nothing_else(room, asked):
    succeed("circuit", *asked, "--out", "out")
    before = listing(room)
    assert "out exists" in run("circuit", *asked, "--out", "out").stderr
    assert listing(room) == before
    succeed("circuit", *asked, "--ablation", "patch", "--out", "out", "--force")
    assert not (room / "out/mask.safetensors").exists()
    (room / "mine").mkdir()
    (room / "mine/notes.txt").write_text("mine")
    result = run("circuit", *asked, "--out", "mine", "--force")
    assert (result.exit_code, "mine holds no model or report" in result.stderr) == (2, True)
    assert (room / "mine/notes.txt").read_text() == "mine"


def test_the_schema_needs_nothing_else():
    assert json.loads(succeed("circuit", "--schema")) == SCHEMA
    line = SCHEMA["example"]
    assert set(line) == set(SCHEMA["properties"])
    assert set(SCHEMA["required"]) == {"prompt", "corrupted", "answer", "wrong"}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("task 'mcqa' is not known", ("--task", "mcqa")),
        ("missing.jsonl: cannot be read", ("--task", "missing.jsonl")),
        ("wrong.jsonl:2: no field 'wrong'", ("--task", "wrong.jsonl")),
        ("wide.jsonl:1: the answer 'xy' is not a single token", ("--task", "wide.jsonl")),
        ("equal.jsonl:1: the prompt and the corrupted prompt are equal", ("--task", "equal.jsonl")),
        ("task ioi does not fit this model's tokenizer", ("--task", "ioi")),
        ("never.jsonl: its right answers are not ahead", ("--task", "never.jsonl")),
        ("a prompt has 61 tokens (BOS included), but the model has 48 positions", ("--task", "long.jsonl")),
        ("unit 'edge' is not known", ("--unit", "edge")),
        ("method 'sparsegpt' is not known", ("--method", "sparsegpt")),
        ("method '' is not known", ("--compare", "random,")),
        ("exact ablation runs the model once", ("--unit", "neuron", "--method", "exact")),
        ("method 'activation' scores components", ("--unit", "weight", "--compare", "activation")),
        ("weights are ablated by zero alone", ("--unit", "weight", "--ablation", "patch")),
        ("target 'loss' is not known", ("--target", "loss")),
        ("ablation 'swap' is not known", ("--ablation", "swap")),
        ("ranking 'up' is not known", ("--by", "up")),
        ("rule 'lxt' is not known", ("--rule", "lxt")),
        ("reduce 'token-square' is not known for components", ("--reduce", "token-square")),
        ("--keep 1.5 is not a share", ("--keep", 1.5)),
        ("--keep nan is not a share", ("--keep", "nan")),
        ("the folder nowhere does not exist", ("--out", "nowhere/out")),
    ],
)
def test_refused(room, base, asked, message, arguments):
    line = json.loads((room / "task.jsonl").read_text().split("\n")[0])
    rows = [json.loads(row) for row in (room / "task.jsonl").read_text().splitlines()]
    files = {
        "wrong": [line, {key: value for key, value in line.items() if key != "wrong"}],
        "wide": [line | {"answer": "xy"}],
        "equal": [line | {"corrupted": line["prompt"]}],
        "never": [row | {"answer": row["wrong"], "wrong": row["answer"]} for row in rows],
        "long": [line | {"prompt": f"{n}" * 60, "corrupted": "z" * 60, "group": f"{n}"} for n in range(2)],
    }
    for name, content in files.items():
        (room / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    before = listing(room)
    out = () if "--out" in arguments else ("--out", "out")
    result = run("circuit", *asked, *arguments, *out)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert listing(room) == before
