"""The scripts in examples/ and the Python in the README do what they say, on a small model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from commands import llama, saved
from transformers import AutoModelForCausalLM

import sparc3

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder "small" in the working folder, with the positions of the bundled models."""
    monkeypatch.chdir(tmp_path)
    return saved(llama(max_position_embeddings=128), tmp_path / "small")


def half_is_pruned(folder, base):
    """Plain transformers finds the base's weights there, half of those under the mask at zero."""
    mask = sparc3.Mask.load(folder / "mask.safetensors")
    expected = sparc3.load(base).model
    mask.apply(expected)
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert mask.sparsity == 0.5
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


def test_prune_in_python(model, monkeypatch, capsys):
    script = ROOT / "examples/prune_in_python.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--model", str(model), "--out", "pruned"])
    runpy.run_path(str(script), run_name="__main__")
    stdout = capsys.readouterr().out
    assert "50.0000% pruned, lrp, row" in stdout
    # 58 bytes of the prompt and the BOS token; each is shown with a sign.
    assert len(stdout.splitlines()[-1].split("  ")) == 59
    half_is_pruned(Path("pruned"), model)


def test_the_python_of_the_readme(model):
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    code = [block.split("```")[0].replace('"tiny-llama"', repr(str(model))) for block in blocks]
    names = {}
    exec("\n".join(code), names)
    half_is_pruned(Path("pruned"), model)
    assert torch.equal(
        names["model"].state_dict()["lm_head.weight"],
        sparc3.load(model).model.state_dict()["lm_head.weight"],
    )
    assert names["r"].tokens.shape == (1, 59)
    assert set(names["r"].heads) == {0, 1}


def test_the_notebook():
    """Its code, cell by cell: the printed outputs in the file are one run of the same."""
    cells = json.loads((ROOT / "examples/attribute_circuit_correct.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert 1 <= sum(names["keep"].tolist()) < 16
    found, before = names["found"], names["correction"].before
    assert before.shown == 1
    # The model's card: a grumpy speaker always insults. The correction takes at least half of that at 1 %.
    assert found.chosen.shown <= 0.5
    assert found.chosen.increase <= 0.01
    assert names["both"].shown <= names["alone"].shown
    expected = sparc3.load("tiny-llama").model.state_dict()
    assert all(torch.equal(names["model"].state_dict()[name], tensor) for name, tensor in expected.items())
