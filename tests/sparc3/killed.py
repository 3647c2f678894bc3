"""Prune block by block in processes that are killed, and go on until one comes to its end.

    python killed.py MODEL OUT,METHOD,PATTERN,KILLS,HOW ...

PATTERN may be "repair" or "relevance": by row, with --repair, and with --allocate relevance too. HOW is
"write": SIGKILL in the middle of the n-th write, or before the n-th rename, removal or wait for the disk, n
at random; or "time": SIGKILL from outside after a random time. After KILLS killed processes the last one is
left alone. Prints how many were killed for each output.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers
from tiny import VOCABULARY, batch

from sparc3.checkpoint import Checkpoint
from sparc3.families import prunable
from sparc3.job import Job, identity_of
from sparc3.plan import Budget, plan
from sparc3.shape import shape_of
from sparc3.stream import prune_by_block
from sparc3.unfinished import Unfinished
from sparc3.weights import Streamed, empty_model

EVENTS = 60  # more than a run of the test's model has between two finished blocks


MORE = {"repair": {"repair": True}, "relevance": {"allocate": "relevance", "repair": True}}


def job_of(method, pattern):
    more = MORE.get(pattern, {})
    samples = [batch(), batch(2, 7, padding=False, seed=2)]
    return Job(method, 0.5, "row" if more else pattern, samples, **more)


def run(folder, out, method, pattern):
    torch.set_num_threads(1)
    job = job_of(method, pattern)
    model, checkpoint = empty_model(folder), Checkpoint(folder)
    budget = Budget(1 << 40, 1 << 40, 1 << 40, 0, False)
    shape = shape_of(model, prunable(model), 5, 12, checkpoint)
    how = {"allocate": job.allocate, "repair": job.repair}
    way = plan(shape, job.method, job.pattern, budget, VOCABULARY, **how)
    source = Streamed(model, checkpoint, torch.device("cpu"), way.prefetch)
    unfinished = Unfinished(out, identity_of(job, model, checkpoint, source.device), resume=True)
    if not unfinished.complete:
        prune_by_block(job, source, unfinished, way)


def die_at(event):
    """Kill this process at the event-th thing that it does to the disk."""
    left = event

    def now():
        nonlocal left
        left -= 1
        return left < 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name):
        original = getattr(owner, name)

        def dying(*arguments, **named):
            if now():
                die()
            return original(*arguments, **named)

        setattr(owner, name, dying)

    for owner, name in (
        (os, "fsync"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
    ):
        before(owner, name)

    class Dying:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if now():
                self.file.write(bytes(data)[: len(data) // 2])
                self.file.flush()
                die()
            self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

    original = Path.open

    def opened(path, mode="r", *arguments, **named):
        file = original(path, mode, *arguments, **named)
        return Dying(file) if mode == "wb" else file

    Path.open = opened


def seconds_of_a_run(folder, out, method, pattern):
    """How long a process takes that is left alone, so that random times fall into a run on any machine."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: None
        run(Path(folder), Path(out), method, pattern)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return time.perf_counter() - start


def main():
    folder, *cases = sys.argv[1:]
    for case in cases:
        print(until_the_end(folder, *case.split(",")))


def until_the_end(folder, out, method, pattern, kills, how):
    generator, killed = random.Random(0), 0
    manifest = Path(out).parent / f".{Path(out).name}.unfinished" / "run.json"
    transformers.logging.disable_progress_bar()
    longest = seconds_of_a_run(folder, f"{out}-undisturbed", method, pattern) if how == "time" else 0.0
    while True:
        # Short enough that several processes are killed before the work is done.
        event, delay = generator.randrange(EVENTS), generator.uniform(0, longest / 4)
        child = os.fork()
        if child == 0:
            # SIGKILL loses nothing that was written: waiting for the disk is only a moment more to be killed at.
            os.fsync = lambda descriptor: None
            if killed < int(kills) and how == "write":
                die_at(event)
            run(Path(folder), Path(out), method, pattern)
            os._exit(0)
        if killed < int(kills) and how == "time":
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
        if (Path(out) / "report.json").is_file() and not manifest.is_file():
            break  # killed after its last step
    return killed


if __name__ == "__main__":
    main()
