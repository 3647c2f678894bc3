"""The whole path on real models: attribute, prune, compare, save, and load again with plain transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparc3
from sparc3.cli import app
from sparc3.families import prunable


@pytest.fixture(scope="module")
def samples(real_model, background_text):
    return sparc3.windows(real_model.tokenizer, sparc3.read_documents([background_text]), 32, 4, seed=0)


@pytest.fixture(scope="module")
def judged(real_model, lee):
    return sparc3.windows(real_model.tokenizer, sparc3.read_documents([lee]), 32, 4)


@pytest.mark.parametrize("pattern", ["row", "2:4", "global"])
def test_lrp_prunes_far_better_than_chance(real_model, samples, judged, pattern):
    model = real_model.model
    before = {name: weight.weight.detach().clone() for name, weight in prunable(model).items()}
    dense = sparc3.perplexity(model, judged).value
    found = {}
    for row, mask in sparc3.compare(model, samples, judged, ("lrp", "random"), pattern=pattern):
        found[row["method"]] = row["perplexity"]
        assert row["sparsity"] == pytest.approx(0.5, abs=1e-6)
        assert mask.settings["pattern"] == pattern
    for name, weight in prunable(model).items():
        assert torch.equal(weight.weight, before[name])
    # So few samples are no good choice, but random pruning leaves nothing at all.
    assert dense < found["lrp"] < found["random"] / 10


def test_pruned_folder_from_the_command_line(real_model, background_text, lee, tmp_path):
    out = tmp_path / "pruned"
    words = ["prune", real_model.origin, "--text", background_text, "--eval-text", lee, "--samples", "4"]
    done = CliRunner().invoke(
        app, [*words, "--length", "32", "--pattern", "2:4", "--out", str(out), "--json"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert report["results"][0]["sparsity"] == 0.5
    mask = sparc3.Mask.load(out / "mask.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = sparc3.windows(real_model.tokenizer, sparc3.read_documents([lee]), 32, 2)
    mask.apply(real_model.model, keep=True)
    try:
        with torch.no_grad():
            assert torch.equal(model(ids).logits, real_model.model(ids).logits)
    finally:
        mask.undo(real_model.model)
    for name in mask.bits:
        kept = mask.kept(name).view(-1, 4).sum(1)
        assert (kept == 2).all()
