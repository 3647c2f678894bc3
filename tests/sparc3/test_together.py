"""sparc3 prune by several processes of torchrun: the mask of one process, and what is left when one is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import llama, saved

MANY_RUNS = Path(__file__).parent / "many_runs.py"
LOST_RANK = Path(__file__).parent / "lost_rank.py"


def torchrun(processes, *arguments, program=("-m", "sparc3")):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += [*program, "prune", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)


def alone(*arguments):
    command = [sys.executable, "-m", "sparc3", "prune", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)


def check_same(many, one):
    for name in ("mask.safetensors", "model-00003-of-00006.safetensors"):
        assert (many / name).read_bytes() == (one / name).read_bytes()


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
    alone("deep", *asked, "--out", "one")
    check_same(room / "many", room / "one")
    assert not list(room.glob(".*.unfinished"))


# The sweep with and without second moments, a forward over the dense model, a backward first.
SWEPT = [
    *(["--method", "wanda", "--pattern", pattern] for pattern in ("2:4", "global")),
    ["--method", "sparsegpt", "--allocate", "owl"],
    ["--method", "gblm", "--pattern", "layer"],
    ["--method", "lrp", "--allocate", "relevance", "--repair"],
]


@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_sweep_to_the_mask_of_one(room, deep, processes):
    # 4 batches: with 3 processes only the one that writes has one in the second turn.
    asked = ["--text", "long.txt", "--samples", 170, "--length", 40, "--max-memory", "4GiB"]
    done = torchrun(processes, "deep", *asked, program=(MANY_RUNS, "many", json.dumps(SWEPT)))
    assert done.returncode == 0, done.stderr
    for number, how in enumerate(SWEPT):
        alone("deep", *asked, *how, "--out", f"one-{number}")
        for file in sorted((room / f"one-{number}").glob("*.safetensors")):
            assert (room / f"many-{number}" / file.name).read_bytes() == file.read_bytes(), (how, file.name)
    assert not list(room.glob(".*.unfinished"))


def test_one_process_that_fails_ends_all_with_its_error(room, deep):
    done = torchrun(2, "deep", "--text", "train.txt", "--samples", 2, "--max-memory", "4GiB", "--out", "out")
    assert done.returncode != 0
    assert "2 processes share 1 batches" in done.stderr
    assert not list(room.glob("*out*"))


def test_a_process_that_is_lost_ends_all_and_loses_nothing_that_was_finished(room, deep):
    asked = [
        "deep",
        "--text",
        "long.txt",
        "--samples",
        130,
        "--max-memory",
        "4GiB",
        "--resume",
        "--out",
        "many",
    ]
    finished = set()
    # What is outside of the blocks, 5, comes first, then 4 down to 0. First one is lost that sends, then the writer.
    for rank, block, left in ((0, 2, {5, 4, 3}), (1, 0, {5, 4, 3, 2, 1})):
        done = torchrun(2, *asked, program=(LOST_RANK, rank, block))
        assert done.returncode != 0
        assert "SIGKILL" in done.stderr
        assert not (room / "many").exists()
        masks = (room / ".many.unfinished/scratch").glob("mask-*.safetensors")
        now = {int(path.stem.removeprefix("mask-")) for path in masks}
        # What the others had finished when they were ended may be less than what they were at, but is never lost.
        assert finished <= now <= left
        finished = now
    # The writer is killed with all blocks above in its hands.
    assert finished == {5, 4, 3, 2, 1}
    done = torchrun(2, *asked)
    assert done.returncode == 0, done.stderr
    alone(*asked[:-1], "one")
    check_same(room / "many", room / "one")
    assert not list(room.glob(".*.unfinished"))
