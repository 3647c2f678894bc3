"""Loops of SmolLM2 are found and corrected, at reduced size, from the command line to every file."""

import json

import pytest
import torch
from typer.testing import CliRunner

import sparc3
from sparc3.cli import app
from sparc3.mask import Mask

# What goes on after these is told by any language model.
LOOPS = (
    "ha ha ha ha ha ha ha ha",
    "yes yes yes yes yes yes yes",
    "one two one two one two",
    "A B A B A B A B",
)


def test_neurons_behind_loops_from_the_command_line(smollm2, background_text, lee, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(LOOPS))
    out = tmp_path / "out"
    words = [
        "correct",
        smollm2.origin,
        "--behaviour",
        "repetition",
        "--undesired",
        tmp_path / "prompts.txt",
    ]
    words += ["--general", background_text, "--eval-text", lee, "--unit", "neuron", "--contrast", "absolute"]
    words += ["--count", 20, "--points", 1, "--no-spare", "--tokens", 16, "--samples", 2, "--length", 32]
    with monkeypatch.context() as patched:
        # The fixture was loaded from the same file: loading it again takes seconds and shows nothing more.
        patched.setattr(sparc3, "load", lambda name, **settings: smollm2 if name == smollm2.origin else None)
        done = CliRunner().invoke(
            app, [*map(str, words), "--out", str(out), "--json"], catch_exceptions=False
        )
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert report["prompts"]["explained"] + report["prompts"]["judged"] >= 2
    assert report["before"]["shown"] == 1
    assert report["after"]["count"] == 20
    config = smollm2.model.config
    mask = Mask.load(out / "mask.safetensors")
    assert round(mask.sparsity * mask.total) == pytest.approx(20 * 3 * config.hidden_size, abs=100)
    loaded = sparc3.load(str(out))
    held_out = sparc3.windows(loaded.tokenizer, sparc3.read_documents([lee]), 32, 2)
    # The same model in the same precision: fp32 sums in another order at most.
    assert sparc3.perplexity(loaded.model, held_out).value == pytest.approx(
        report["after"]["perplexity"], rel=1e-4
    )
    corrected = loaded.model.state_dict()
    weights = smollm2.model.state_dict()
    for name in mask.shapes:
        assert torch.equal(corrected[name], weights[name] * mask.kept(name)), name
    sample = report["samples"][0]
    assert sample["prompt"] in LOOPS
    assert sample["prompt"] in (out / "page.html").read_text()
