"""Runs that are broken off and go on: the same bytes, and refusals where another run would be mixed in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed import job_of
from test_stream import CPU, SAMPLES, checkpoint, quiet, streamed  # noqa: F401

from sparc3.checkpoint import Checkpoint
from sparc3.errors import InputError
from sparc3.job import Job, identity_of
from sparc3.unfinished import Unfinished
from sparc3.weights import empty_model

HERE = Path(__file__).parent


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


KILLED = {
    "row": ("lrp", "row", 12, "write"),
    "global": ("lrp", "global", 12, "write"),
    "wanda": ("wanda", "row", 8, "write"),
    "magnitude": ("magnitude", "layer", 6, "write"),
    "repair": ("gblm", "repair", 12, "write"),
    "allocate": ("lrp", "relevance", 12, "write"),
    "time": ("lrp", "global", 8, "time"),
}


def test_killed_again_and_again_it_gives_the_same_bytes(tmp_path):
    folder = checkpoint(tmp_path / "model", num_hidden_layers=4)
    # One thread, as the processes that are killed have: they are forked.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (method, pattern, *_) in KILLED.items():
            streamed(folder, tmp_path / f"whole-{name}", job_of(method, pattern))
    finally:
        torch.set_num_threads(threads)
    cases = [",".join(map(str, (tmp_path / name, *case))) for name, case in KILLED.items()]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, HERE / "killed.py", folder, *cases]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    for name, killed in zip(KILLED, done.stdout.split(), strict=True):
        # A process that is killed from outside may have come to its end before.
        assert int(killed) >= (1 if KILLED[name][3] == "time" else KILLED[name][2] // 2)
        assert files(tmp_path / name) == files(tmp_path / f"whole-{name}")
        # A folder that is empty but for its lock is left by one that was killed in its very last step.
        assert {path.name for path in tmp_path.glob(f".{name}.unfinished/*")} <= {"lock"}


class Stop(Exception):
    pass


def broken_off(folder, out, job, after, **options):
    """A run that ends with an exception after some visits of blocks; returns how many blocks were done."""
    left = after

    def visited():
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop

    with pytest.raises(Stop):
        streamed(folder, out, job, visited=visited, **options)
    return len(list((out.parent / f".{out.name}.unfinished" / "scratch").glob("mask-*.safetensors")))


def visits(folder, out, job, **options):
    count = 0

    def visited():
        nonlocal count
        count += 1

    streamed(folder, out, job, visited=visited, **options)
    return count


def test_what_was_finished_is_not_done_again(tmp_path):
    folder = checkpoint(tmp_path / "model", num_hidden_layers=5)
    job = Job("lrp", 0.5, "row", SAMPLES)
    out = tmp_path / "out"
    # 5 forward, then 3 back: the head and three blocks are done.
    assert broken_off(folder, out, job, 8) == 4
    assert not out.exists()
    with pytest.raises(
        InputError, match=r"was broken off: go on with it with --resume, or give it up with --force"
    ):
        streamed(folder, out, job)
    # The two blocks that are left: one forward, two back.
    assert visits(folder, out, job, resume=True) == 3
    streamed(folder, tmp_path / "whole", job)
    assert files(out) == files(tmp_path / "whole")


def test_force_gives_a_broken_run_up(tmp_path):
    folder = checkpoint(tmp_path / "model", num_hidden_layers=3)
    out = tmp_path / "out"
    broken_off(folder, out, Job("lrp", 0.5, "row", SAMPLES), 5)
    job = Job("lrp", 0.7, "row", SAMPLES)
    assert visits(folder, out, job, force=True) == 6
    streamed(folder, tmp_path / "whole", job)
    assert files(out) == files(tmp_path / "whole")


def test_resume_begins_where_nothing_was_begun(tmp_path):
    folder = checkpoint(tmp_path / "model")
    job = Job("magnitude", 0.5, "row", [])
    assert visits(folder, tmp_path / "out", job, resume=True) == 2


def test_another_run_is_refused_with_what_changed(tmp_path):
    folder = checkpoint(tmp_path / "model", num_hidden_layers=3)
    out = tmp_path / "out"
    broken_off(folder, out, Job("lrp", 0.5, "row", SAMPLES), 4)
    for job, changed in (
        (Job("lrp", 0.6, "row", SAMPLES), r"settings.sparsity was 0.5 and is 0.6"),
        (Job("lrp", 0.5, "layer", SAMPLES), r'settings.pattern was "row" and is "layer"'),
        (
            Job("lrp", 0.5, "row", SAMPLES, settings={"reduce": "abs"}),
            r'settings.reduce was null and is "abs"',
        ),
        (Job("lrp", 0.5, "row", SAMPLES[:1]), r"samples was"),
        (Job("lrp", 0.5, "row", SAMPLES, exclude=["*mlp*"]), r"settings.exclude was"),
    ):
        with pytest.raises(InputError, match=f"another one: {changed}"):
            streamed(folder, out, job, resume=True)
    other = checkpoint(tmp_path / "other", num_hidden_layers=3, seed=1)
    with pytest.raises(InputError, match=r"another one: model.model-00001-of"):
        streamed(other, out, Job("lrp", 0.5, "row", SAMPLES), resume=True)
    streamed(folder, out, Job("lrp", 0.5, "row", SAMPLES), resume=True)


def test_two_processes_do_not_write_one_output(tmp_path):
    folder = checkpoint(tmp_path / "model")
    job = Job("magnitude", 0.5, "row", [])
    model = empty_model(folder)
    identity = identity_of(job, model, Checkpoint(folder), CPU)
    first = Unfinished(tmp_path / "out", identity)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(InputError, match="another process is writing"):
            Unfinished(tmp_path / "out", identity, **options)
    del first
    streamed(folder, tmp_path / "out", job, resume=True)


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "model", num_hidden_layers=4)
    job, out = Job("lrp", 0.5, "row", SAMPLES), tmp_path / "out"
    import errno

    import sparc3.unfinished

    written, original = 0, sparc3.unfinished.write_tensors

    def full(file, *rest):
        nonlocal written
        written += 1
        original(file, *rest)
        if written == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sparc3.unfinished, "write_tensors", full)
    with pytest.raises(
        InputError, match=r"cannot write .*: No space left on device; what is finished is kept"
    ):
        streamed(folder, out, job)
    assert not out.exists()
    monkeypatch.undo()
    assert visits(folder, out, job, resume=True) < 8
    streamed(folder, tmp_path / "whole", job)
    assert files(out) == files(tmp_path / "whole")


def test_scratch_files_go_where_they_are_told(tmp_path):
    folder = checkpoint(tmp_path / "model")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    job = Job("lrp", 0.5, "global", SAMPLES)
    with pytest.raises(Stop):
        streamed(folder, tmp_path / "out", job, scratch=scratch, visited=stop_at(4))
    (inside,) = scratch.iterdir()
    assert {path.name for path in inside.iterdir()} >= {
        "scores-00002.safetensors",
        "scores-00001.safetensors",
    }
    streamed(folder, tmp_path / "out", job, scratch=scratch, resume=True)
    assert not list(scratch.iterdir())
    streamed(folder, tmp_path / "whole", job)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def stop_at(visit):
    left = visit

    def visited():
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop

    return visited


def test_an_output_that_is_complete_is_left_alone(tmp_path):
    folder = checkpoint(tmp_path / "model")
    job, out = Job("magnitude", 0.5, "row", []), tmp_path / "out"
    streamed(folder, out, job)
    before = files(out)
    identity = identity_of(job, empty_model(folder), Checkpoint(folder), CPU)
    # Killed after the output was put in its place, before the rest was removed.
    run = Unfinished(tmp_path / "again", identity)
    run.new.rmdir()
    run.out = out
    run.root.rename(tmp_path / ".out.unfinished")
    del run
    assert Unfinished(out, identity, resume=True).complete
    assert files(out) == before
    assert not (tmp_path / ".out.unfinished").exists()
    assert Unfinished(out, identity, resume=True).complete
    with pytest.raises(InputError, match="exists; give another --out"):
        Unfinished(out, identity)
