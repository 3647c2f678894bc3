"""sparc3 prune block by block, from the command line."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import llama, run, saved, succeed, succeed_json

from sparc3.mask import Mask

# The model is never whole in memory, so that what measures perplexity is out.
STREAMED = ["--text", "train.txt", "--max-memory", "4GiB"]


def bits(folder):
    return {name: packed.tolist() for name, packed in Mask.load(f"{folder}/mask.safetensors").bits.items()}


def test_the_mask_and_its_settings_are_those_of_a_run_in_memory(room, base):
    for method, pattern, more in (
        ("lrp", "row", ["--repair", "--allocate", "owl"]),
        ("wanda", "2:4", []),
        ("gblm", "layer", ["--allocate", "relevance"]),
        ("random", "global", []),
    ):
        asked = ["--method", method, "--pattern", pattern, *more, "--out"]
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
    said = succeed("prune", "config", "--dry-run", "--samples", 64, "--length", 40)
    assert "2 blocks, 4 visits" in said
    found = succeed_json("prune", base, "--dry-run", "--samples", 64, "--length", 40, "--out", "out")
    assert found["plan"]["device"]["boundaries"] == 3 * 64 * 41 * 32 * 4
    assert found["seconds"] > 0
    gpu = succeed_json("prune", "config", "--dry-run", "--device", "cuda", "--max-memory", "8GiB")
    assert set(gpu["plan"]["host"]) == {
        *("process", "boundaries", "conversion", "allocator", "selection", "read buffers")
    }
    assert sorted(room.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-memory", "1MiB"], "--max-memory 1 MiB does not suffice: this needs "),
        (["--max-memory", "much"], "'much' is not a size"),
        (["--max-memory", "4GiB", "--eval-text", "held.txt"], "need the model in memory"),
        (["--max-memory", "4GiB", "--compare", "wanda"], "need the model in memory"),
        *(
            (
                [*where, "--method", method, "--pattern", "global"],
                f"{method} selects inside the forward sweep",
            )
            for method in ("gblm", "sparsegpt")
            for where in ([], ["--max-memory", "4GiB"])
        ),
        (["--max-memory", "4GiB", "--allocate", "owl", "--pattern", "2:4"], "2:4 fixes the share"),
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


def test_an_output_folder_is_asked_for(room, base):
    result = run("prune", base, "--text", "train.txt")
    assert result.exit_code == 2
    assert "--out" in result.stderr


def test_a_finished_run_is_not_done_again(room, base):
    asked = ["prune", base, *STREAMED, "--resume", "--out", "out"]
    succeed(*asked)
    before = {path.name: path.read_bytes() for path in (room / "out").iterdir()}
    assert "out is complete already." in succeed(*asked)
    assert succeed_json(*asked)["settings"]["pattern"] == "row"
    other = run(*asked, "--sparsity", 0.3)
    assert other.exit_code == 2
    assert "out is finished, and it is of another run: settings.sparsity was 0.5 and is 0.3" in other.stderr
    assert {path.name: path.read_bytes() for path in (room / "out").iterdir()} == before
    succeed(*asked, "--sparsity", 0.3, "--force")
    assert Mask.load("out/mask.safetensors").settings["sparsity"] == 0.3


@pytest.mark.parametrize("folder", ["--out", "--offload-dir"])
def test_a_disk_without_space_is_refused_at_the_start(room, base, monkeypatch, folder):
    (room / "full").mkdir()
    place = {"--out": room, "--offload-dir": room / "full"}[folder]
    usage = shutil.disk_usage(room)
    monkeypatch.setattr(
        "sparc3.unfinished.shutil.disk_usage",
        lambda path: usage._replace(free=5 << 10 if Path(path).resolve() == place.resolve() else 1 << 40),
    )
    monkeypatch.setattr("sparc3.unfinished._disk_of", str)
    before = sorted(room.iterdir())
    result = run("prune", base, *STREAMED, "--offload-dir", "full", "--out", "out")
    assert result.exit_code == 2
    needed = re.search(
        rf"the disk of {folder} has 5 KiB free and this needs (\d+)MiB at least", result.stderr
    )
    assert needed
    assert int(needed[1]) > 0
    assert sorted(room.iterdir()) == before
    assert not list((room / "full").iterdir())


def test_the_least_memory_that_a_refusal_names_suffices(room, base):
    refused = run("prune", base, "--text", "train.txt", "--max-memory", "1MiB", "--dry-run", "--out", "out")
    least = refused.stderr.split("this needs ")[1].split()[0]
    # The process grows a little between the two commands, which run in it.
    succeed(
        "prune", base, "--text", "train.txt", "--max-memory", f"{int(least[:-3]) + 100}MiB", "--out", "out"
    )


@pytest.mark.parametrize(
    "how",
    [
        *(["--method", method] for method in ("lrp", "wanda", "gblm", "magnitude")),
        ["--method", "random", "--repair"],
    ],
    ids=" ".join,
)
def test_no_more_is_resident_than_was_planned(room, how):
    # Blocks of 50 MB: what a process takes besides, which the plan allows 64 MiB for, is small beside the peak.
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2}
    saved(llama(**shape), room / "wide")
    command = [
        "prune",
        "wide",
        "--text",
        "train.txt",
        "--samples",
        2,
        "--max-memory",
        "8GiB",
        *how,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "sparc3", *map(str, command), "--json", "--out", "out"], capture_output=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["streamed"]
    planned = found["plan"]["totals"]["device"]
    assert found["plan"]["device"]["process"] + found["plan"]["shape"]["block"] < found["peak_rss"] <= planned
