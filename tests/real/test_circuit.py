"""The circuit of indirect objects in real models, at reduced size, from the command line to every file."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sparc3.cli import app


def test_a_circuit_of_mlps_from_the_command_line(real_model, tmp_path):
    out = tmp_path / "out"
    words = [
        "circuit",
        real_model.origin,
        "--unit",
        "mlp",
        "--ablation",
        "patch",
        "--examples",
        "6",
        "--keep",
        "0.5",
    ]
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    # Both models do the task: 0.98 and 1 of 64 examples.
    assert report["full"]["accuracy"] > 0.8
    assert report["full"]["logit_difference"] > 1 > report["empty"]["logit_difference"]
    (row,) = report["results"]
    assert row["curve"][-1]["faithfulness"] == pytest.approx(1, abs=1e-4)
    config = real_model.model.config
    blocks, heads = config.num_hidden_layers, config.num_attention_heads
    assert report["circuit"]["kept"] == (blocks + 1) // 2
    tensors = load_file(out / "components.safetensors")
    assert len(tensors) == 2 * blocks
    assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in tensors.values())
    graph = json.loads((out / "mib.json").read_text())
    assert graph["cfg"]["d_model"] == config.hidden_size
    assert len(graph["nodes"]) == blocks * (heads + 1) + 2
    dropped = [name for name, node in graph["nodes"].items() if not node["in_graph"]]
    assert len(dropped) == blocks - report["circuit"]["kept"]
    for sample in report["task"]["samples"]:
        text = "".join(one["token"] for one in sample["tokens"] if not one["special"])
        assert text.strip() == sample["prompt"]
    assert (out / "circuit.html").read_text().count('class="tokens"') == len(report["task"]["samples"])
