"""sparc3 prune block by block, from the command line, in one process and in several."""

import json
import os
import subprocess
import sys

import pytest
from commands import llama, run, saved, succeed, succeed_json

from sparc3.mask import Mask

# The model is never whole in memory, so that what measures perplexity is out.
STREAMED = ["--text", "train.txt", "--max-memory", "4GiB"]


def bits(folder):
    return {name: packed.tolist() for name, packed in Mask.load(f"{folder}/mask.safetensors").bits.items()}


def test_the_mask_and_its_settings_are_those_of_a_run_in_memory(room, base):
    for method, pattern in (("lrp", "row"), ("wanda", "2:4"), ("random", "global")):
        asked = ["--method", method, "--pattern", pattern, "--out"]
        succeed("prune", base, "--text", "train.txt", *asked, "whole", "--force")
        said = succeed("prune", base, *STREAMED, *asked, "streamed", "--force")
        assert (room / "streamed/mask.safetensors").read_bytes() == (
            room / "whole/mask.safetensors"
        ).read_bytes()
        assert said.index("at most at once") < said.index("pruned in")
        report = json.loads((room / "streamed/report.json").read_text())
        assert report["settings"] == Mask.load("streamed/mask.safetensors").settings
        assert report["streamed"]["peak_rss"] > report["streamed"]["plan"]["shape"]["block"]
        assert succeed_json("evaluate", "streamed", "--text", "held.txt")["perplexity"] > 1


def test_a_dry_run_needs_no_weights_and_writes_nothing(room, base):
    (room / "config").mkdir()
    (room / "config/config.json").write_text((base / "config.json").read_text())
    before = sorted(room.iterdir())
    said = succeed("prune", "config", "--dry-run", "--samples", 64, "--length", 40, "--out", "out")
    assert "2 blocks, 4 visits" in said
    found = succeed_json("prune", base, "--dry-run", "--samples", 64, "--length", 40, "--out", "out")
    assert found["plan"]["device"]["boundaries"] == 3 * 64 * 41 * 32 * 4
    assert found["seconds"] > 0
    gpu = succeed_json(
        "prune", "config", "--dry-run", "--device", "cuda", "--max-memory", "8GiB", "--out", "out"
    )
    assert set(gpu["plan"]["host"]) == {"process", "boundaries", "selection", "read buffers"}
    assert sorted(room.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-memory", "1MiB"], "--max-memory 1 MiB does not suffice: this needs "),
        (["--max-memory", "much"], "'much' is not a size"),
        (["--max-memory", "4GiB", "--eval-text", "held.txt"], "need the model in memory"),
        (["--max-memory", "4GiB", "--compare", "wanda"], "need the model in memory"),
        (["--max-memory", "4GiB", "--repair"], "need the model in memory"),
        (["--max-memory", "4GiB", "--method", "gblm"], "need the model in memory"),
        (["--offload-dir", "missing"], "the folder missing does not exist"),
        (["--resume", "--dtype", "int3"], "dtype 'int3' is not known"),
    ],
)
def test_refusals(room, base, options, message):
    before = sorted(room.iterdir())
    result = run("prune", base, "--text", "train.txt", *options, "--out", "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(room.iterdir()) == before


def test_the_least_memory_that_a_refusal_names_suffices(room, base):
    refused = run("prune", base, "--text", "train.txt", "--max-memory", "1MiB", "--dry-run", "--out", "out")
    least = refused.stderr.split("this needs ")[1].split()[0]
    # The process grows a little between the two commands, which run in it.
    succeed(
        "prune", base, "--text", "train.txt", "--max-memory", f"{int(least[:-3]) + 100}MiB", "--out", "out"
    )


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += ["-m", "sparc3", "prune", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


@pytest.fixture
def deep(room):
    # 3 batches of at most 2048 tokens.
    lines = (room / "train.txt").read_text()
    (room / "long.txt").write_text(lines * 12)
    return saved(llama(num_hidden_layers=5), room / "deep")


@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_give_the_mask_of_one(room, deep, processes):
    pattern = "global" if processes == 2 else "row"
    asked = ["--text", "long.txt", "--samples", 130, "--pattern", pattern, "--max-memory", "4GiB"]
    done = torchrun(processes, "deep", *asked, "--out", "many")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pruned in") == 1
    one = [sys.executable, "-m", "sparc3", "prune", "deep", *asked, "--out", "one"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, one)), check=True, capture_output=True, env=environment)
    for name in ("mask.safetensors", "model-00003-of-00006.safetensors"):
        assert (room / "many" / name).read_bytes() == (room / "one" / name).read_bytes()
    assert not list(room.glob(".*.unfinished"))


def test_one_process_that_fails_ends_all_with_its_error(room, deep):
    done = torchrun(2, "deep", "--text", "train.txt", "--samples", 2, "--max-memory", "4GiB", "--out", "out")
    assert done.returncode != 0
    assert "2 processes share 1 batches" in done.stderr
    assert not (room / "out").exists()
