"""The command line: what each command prints and writes."""

import json
import re
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from commands import POSITIONS, llama, saved, succeed, succeed_json
from transformers import AutoModelForCausalLM

import sparc3
from sparc3 import console, rules, scores, targets
from sparc3.allocate import ALLOCATIONS
from sparc3.compress import PRUNERS, default_settings
from sparc3.mask import Mask

LINEARS = 14  # of two Llama blocks


def test_prune_writes_a_model_that_plain_transformers_loads(room, base):
    stdout = succeed("prune", base, "--text", "train.txt", "--out", "out")
    names = {path.name for path in (room / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "mask.safetensors", "report.json"} <= names
    assert "perplexity.png" not in names
    assert "50.0%" in stdout
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (room / "out").iterdir())
    expected = sparc3.load(base).model
    mask = Mask.load("out/mask.safetensors")
    mask.apply(expected)
    assert mask.sparsity == 0.5
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained("out").eval()(ids).logits
        assert torch.equal(logits, expected(ids).logits)
    # The pattern's defaults hold where nothing was said.
    assert {key: mask.settings[key] for key in ("target", "reduce")} == {
        key: default_settings("row")[key] for key in ("target", "reduce")
    }
    assert mask.settings["rule"] == str(rules.Rule.parse(default_settings("row")["rule"]))
    assert mask.settings["length"] == POSITIONS - 1
    assert mask.settings["text"] == ["train.txt"]


@pytest.mark.parametrize("out", ["out", "a folder/with [bold] spaces"])
def test_the_next_three_commands_can_be_copied(room, base, out):
    (room / out).parent.mkdir(exist_ok=True)
    asked = ["--text", "train.txt", "--eval-text", "held.txt", "--length", 20, "--method", "wanda"]
    stdout = succeed("prune", base, *asked, "--out", out)
    following = [shlex.split(line) for line in stdout.split("Next:\n")[1].splitlines()]
    assert [command[0] for command in following] == ["sparc3"] * 3
    reported = json.loads((room / out / "report.json").read_text())["results"][0]["perplexity"]
    evaluated = succeed_json(*following[0][1:])
    # The same windows through the same zeros: only where the weights lie in memory differs.
    assert evaluated["perplexity"] == pytest.approx(reported, rel=1e-6)
    assert str(LINEARS) in succeed(*following[1][1:])
    assert succeed_json(*following[2][1:])["settings"]["pattern"] == "2:4"
    assert out in stdout


def test_compare_measures_every_method_at_every_sparsity(room, base):
    asked = ["--text", "train.txt", "--eval-text", "held.txt"]
    asked += ["--compare", "wanda,magnitude,lrp", "--sparsities", "0.25,0.75", "--samples", 8]
    found = succeed_json("prune", base, *asked, "--method", "random", "--sparsity", 0.75, "--out", "out")
    rows = {(row["method"], row["sparsity"]): row for row in found["results"]}
    methods = ["wanda", "magnitude", "lrp", "random"]
    assert set(rows) == {(method, share) for method in methods for share in (0.25, 0.75)}
    assert len(found["results"]) == len(rows)
    assert all(("interval" in row) == (row["method"] != "wanda") for row in rows.values())
    assert (room / "out/perplexity.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((room / "out/report.json").read_text())
    assert {"out": "out", **report} == found
    assert found["settings"]["method"] == "random"
    assert found["sparsity"] == {"requested": 0.75, "achieved": 0.75}
    assert len(found["tensors"]) == LINEARS
    assert all(tensor["requested"] == tensor["achieved"] == 0.75 for tensor in found["tensors"].values())
    assert found["packages"]["torch"] == torch.__version__
    # What is in the table is what the folders measure: text, windows and length are the same.
    dense = succeed_json("evaluate", base, "--text", "held.txt")
    assert (dense["perplexity"], dense["tokens"], dense["context"]) == (
        pytest.approx(found["dense"]["perplexity"], rel=1e-6),
        found["dense"]["tokens"],
        POSITIONS,
    )
    pruned = succeed_json("evaluate", "out", "--text", "held.txt")
    assert pruned["perplexity"] == pytest.approx(rows["random", 0.75]["perplexity"], rel=1e-6)


def test_options_reach_the_library(room, base):
    options = {"target": "logit", "positions": "last", "reduce": "abs", "rule": "norm=gradient"}
    asked = [word for name, value in options.items() for word in (f"--{name}", value)]
    asked += ["--skip-first", "--include", "*mlp*", "--exclude", "*down*", "--exclude", "*.1.*"]
    asked += ["--samples", 5, "--length", 20, "--seed", 3, "--dtype", "bfloat16", "--pattern", "layer"]
    asked += ["--text", "train.txt", "--text", "held.txt", "--sparsity", 0.3]
    succeed("prune", base, *asked, "--out", "out")
    loaded = sparc3.load(base, dtype="bfloat16")
    documents = sparc3.read_documents(["train.txt", "held.txt"])
    samples = sparc3.windows(loaded.tokenizer, documents, 20, 5, 3)
    choice = {"include": ["*mlp*"], "exclude": ["*down*", "*.1.*"]}
    expected = sparc3.prune(loaded.model, samples, "lrp", 0.3, "layer", skip_first=True, **choice, **options)
    found = Mask.load("out/mask.safetensors")
    assert list(found.bits) == [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    assert all(torch.equal(found.bits[name], bits) for name, bits in expected.bits.items())
    assert found.fingerprint == expected.fingerprint
    used = {"samples": 5, "length": 20, "seed": 3, "text": ["train.txt", "held.txt"], "origin": str(base)}
    assert found.settings == expected.settings | used | choice | {"model": str(base), "note": ""}


def test_what_reads_no_text_needs_none(room, base):
    found = succeed_json("prune", base, "--method", "magnitude", "--pattern", "global", "--out", "out")
    assert found["dense"] is None
    assert found["settings"]["samples"] == 0
    assert {tensor["requested"] for tensor in found["tensors"].values()} == {None}
    assert "perplexity" not in found["results"][0]
    assert "evaluate out2 --text bundled" in succeed("prune", base, "--method", "random", "--out", "out2"), (
        "there is a command to measure it"
    )


def test_an_infinite_perplexity_is_valid_json(room):
    model = llama()
    model.lm_head.weight.data *= 1e6
    saved(model, room / "hopeless")
    asked = ["--text", "train.txt", "--eval-text", "held.txt", "--compare", "random", "--method", "magnitude"]
    assert "inf" in succeed("prune", "hopeless", *asked, "--out", "out")
    assert json.loads((room / "out/report.json").read_text())["dense"]["perplexity"] is None
    assert not (room / "out/perplexity.png").exists(), "no axis holds it"
    assert succeed_json("evaluate", "hopeless", "--text", "held.txt")["perplexity"] is None


def test_the_note_of_a_checkpoint_stands_beside_its_figures(room):
    saved(llama(), room / "noted")
    (room / "noted/sparc3_note.txt").write_text("dequantised from GGUF Q4_1")
    asked = ["--text", "train.txt", "--eval-text", "held.txt", "--method", "magnitude"]
    assert "Note: the model is dequantised from GGUF Q4_1" in succeed(
        "prune", "noted", *asked, "--out", "out"
    )
    assert json.loads((room / "out/report.json").read_text())["model"]["note"] == "dequantised from GGUF Q4_1"
    assert "dequantised from GGUF Q4_1" in succeed("evaluate", "out", "--text", "held.txt")
    succeed("mask", "apply", "noted", "out/mask.safetensors", "--out", "again")
    assert succeed_json("evaluate", "again", "--text", "held.txt")["note"] == "dequantised from GGUF Q4_1"


def test_evaluate_says_what_it_measured(room, base):
    found = succeed_json("evaluate", base, "--text", "held.txt", "--length", 30, "--samples", 7)
    assert (found["windows"], found["context"], found["tokens"]) == (7, 31, 7 * 30)
    loaded = sparc3.load(base)
    windows = sparc3.windows(loaded.tokenizer, sparc3.read_documents(["held.txt"]), 30, 7)
    assert found["perplexity"] == pytest.approx(sparc3.perplexity(loaded.model, windows).value, rel=1e-6)
    stdout = succeed("evaluate", base, "--text", "held.txt", "--length", 30, "--samples", 7)
    assert stdout == (
        f"perplexity {found['perplexity']:.5g}: 210 tokens predicted in 7 windows of 31 tokens, of held.txt\n"
    )


def test_mask_show(masks):
    mask = Mask.load(masks[0])
    found = succeed_json("mask", "show", masks[0])
    assert (found["weights"], found["sparsity"]) == (mask.total, mask.sparsity)
    assert found["settings"] == mask.settings
    assert found["tensors"]["model.layers.1.mlp.down_proj.weight"]["shape"] == [32, 48]
    stdout = succeed("mask", "show", masks[0])
    assert all(name in stdout for name in mask.bits)
    assert f"{mask.total} weights" in stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mask_apply_and_undo(room, base, dtype):
    asked = ["--method", "magnitude", "--dtype", dtype]
    succeed("prune", base, *asked, "--out", "pruned")
    mask = "pruned/mask.safetensors"
    applied = succeed_json("mask", "apply", base, mask, "--out", "applied")
    assert applied["sparsity"] == 0.5
    assert (room / "applied/model.safetensors").read_bytes() == (
        room / "pruned/model.safetensors"
    ).read_bytes()
    undone = succeed_json("mask", "undo", "pruned", mask, "--base", base, "--out", "undone")
    assert undone["restored"] == applied["weights"] // 2
    dense = sparc3.load(base, dtype=dtype).model.state_dict()
    back = sparc3.load("undone", dtype="auto").model.state_dict()
    assert dense.keys() == back.keys()
    assert all(torch.equal(dense[name], back[name]) for name in dense)
    assert not (room / "undone/mask.safetensors").exists()


def test_mask_combine_and_diff(room, masks):
    thirty, fifty = (Mask.load(path) for path in masks)
    assert (
        succeed_json("mask", "combine", *masks, "--how", "or", "--out", "or.st")["sparsity"]
        == thirty.sparsity
    )
    assert "Saved and.st" in succeed("mask", "combine", *masks, "--how", "and", "--out", "and.st")
    assert Mask.load("and.st").sparsity == fifty.sparsity
    found = succeed_json("mask", "diff", *masks)
    assert len(found["tensors"]) == LINEARS
    assert found["total"]["only_there"] == 0
    assert found["total"]["only_here"] == round((fifty.sparsity - thirty.sparsity) * fifty.total)
    assert sum(found["total"].values()) == fifty.total
    assert str(found["total"]["only_here"]) in succeed("mask", "diff", *masks).splitlines()[-2]


def test_info(monkeypatch):
    found = succeed_json("info")
    assert found["packages"]["torch"] == torch.__version__
    assert found["kernels"]["backends"]["reference"] == "available"
    assert torch.__version__ in succeed("info")
    monkeypatch.setenv("SPARC3_BACKEND", "reference")
    assert succeed("info").endswith("SPARC3_BACKEND forces the reference backend.\n")


@pytest.mark.parametrize(
    ("there", "cpu", "gpu"),
    [
        ((), "unpacked to dense", "unpacked to dense"),
        (("cpu",), "decoded in the product", "unpacked to dense"),
        (("cpu", "cuda"), "decoded in the product", "2:4 in bf16 and fp16 decoded in the product"),
    ],
)
def test_info_says_how_packed_weights_run(monkeypatch, there, cpu, gpu):
    backend = sys.modules["sparc3_kernels.backend"]
    monkeypatch.setattr(backend, "unavailable", lambda name: None if name in there else "not there")
    lines = {line.split("packed on ")[-1][:4]: line for line in succeed("info").splitlines()}
    assert cpu in lines["CPUs"]
    assert gpu in lines["GPUs"]


@pytest.mark.parametrize(
    ("version", "shown"),
    [
        ("12.4.99", "built with CUDA 12.4.99, needs NVIDIA driver 525 or later"),
        ("13.0.88", "built with CUDA 13.0.88, needs NVIDIA driver 580 or later"),
        ("14.1.2", "built with CUDA 14.1.2, needs NVIDIA driver of CUDA 14.1.2 or later"),
        ("", "its build noted no CUDA version"),
    ],
)
def test_info_names_the_least_driver(monkeypatch, tmp_path, version, shown):
    native = sys.modules["sparc3_kernels.native"]
    if reason := native.missing("sparc3_cuda"):
        pytest.skip(reason)  # loaded before its folder is another
    (tmp_path / "cmake").mkdir()
    note = f'set(sparc3_CUDA_VERSION "{version}")\n'
    (tmp_path / "cmake" / "sparc3Config.cmake").write_text(note)
    monkeypatch.setattr(native, "_NATIVE", tmp_path)
    lines = [" ".join(line.split()) for line in succeed("info").splitlines()]
    assert any("CUDA library" in line and shown in line for line in lines)


def test_info_says_why_it_runs_on_the_reference(monkeypatch):
    why = "no compiler was found at install time"
    monkeypatch.delenv("SPARC3_BACKEND", raising=False)
    # By its path, since the package's own name "backend" is the function.
    backend = sys.modules["sparc3_kernels.backend"]
    monkeypatch.setattr(backend, "unavailable", lambda name: None if name == "reference" else why)
    monkeypatch.setattr(sys.modules["sparc3_kernels.native"], "_load", lambda name: why)
    last = succeed("info").splitlines()[-1]
    assert last.startswith("Everything runs on the reference backend (plain torch, slower). Why: ")
    assert f"cpu: {why}" in last


def test_help_names_every_choice():
    stdout = succeed("prune", "--help")
    for choices in (PRUNERS, ALLOCATIONS, targets.TARGETS, targets.POSITIONS, scores.REDUCTIONS):
        for choice in choices:
            assert choice in stdout


@pytest.mark.parametrize("command", ["prune", "circuit", "correct", "bench decode"])
def test_help_fills_its_lines(command):
    above_the_tables = succeed(*command.split(), "--help").partition("\u256d")[0]
    for paragraph in re.split(r"\n\s*\n", above_the_tables.strip()):
        lines = [line.strip() for line in paragraph.split("\n")]
        # A line ends where the next word has no room in 78 columns.
        for line, following in pairwise(lines):
            assert len(line) + 1 + len(following.split()[0]) > 78


def test_help_and_version_need_nothing_heavy():
    code = (
        "import sys, sparc3.cli; print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    shown = subprocess.run([sys.executable, "-m", "sparc3", "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"sparc3 {sparc3.__version__}\n")


def test_the_default_is_the_bundled_model_with_its_own_text(room):
    asked = ["--method", "magnitude", "--compare", "wanda", "--samples", 8]
    found = succeed_json("prune", *asked, "--out", "out")
    assert found["model"]["name"] == "tiny-llama"
    assert found["settings"]["text"] == ["bundled"]
    assert found["settings"]["length"] == 127
    assert found["dense"]["text"] == ["bundled:held_out"]
    assert found["dense"]["context"] == 128
    dense = succeed_json("evaluate", "tiny-llama")
    assert dense["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=1e-6)


def test_progress_goes_to_a_terminal_only(monkeypatch, capsys):
    with console.progress("loading") as update:
        update(description="scoring", total=2)
        update(advance=1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.progress("loading") as update:
        update(description="scoring", total=2)
        update(advance=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "scoring" in captured.err
    assert "1/2" in captured.err
