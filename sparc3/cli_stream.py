"""sparc3 prune for models larger than memory: the plan, the run block by block, and what came out."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from rich import box
from rich.table import Table

import sparc3
from sparc3 import console
from sparc3.checkpoint import Checkpoint
from sparc3.compress import check_model
from sparc3.engine import free_memory
from sparc3.errors import InputError
from sparc3.evaluate import check_fits
from sparc3.families import prunable
from sparc3.job import Job, identity_of
from sparc3.models import DTYPES, load_tokenizer, local_folder, usable_device
from sparc3.passes import reads_samples
from sparc3.plan import Budget, Plan, plan
from sparc3.ranks import started
from sparc3.scores import batches_on
from sparc3.shape import shape_of
from sparc3.sizes import parse_size, size
from sparc3.speeds import estimate_seconds
from sparc3.stream import prune_by_block as run_by_block
from sparc3.unfinished import Unfinished, free_space
from sparc3.weights import Streamed, empty_model

# On a device that is not here, as in a dry run for another machine.
_EVERYTHING = 1 << 62


def prune_by_block(
    name: str,
    out: Path | None,
    *,
    method: str,
    sparsity: float,
    pattern: str,
    allocate: str,
    repair: bool,
    settings: dict[str, Any],
    text: list[str],
    samples: int,
    length: int | None,
    seed: int,
    device: str,
    dtype: str,
    include: list[str],
    exclude: list[str],
    max_memory: str | None,
    max_host_memory: str | None,
    offload_dir: Path | None,
    resume: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """See sparc3.cli_prune.prune, whose options these are."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; use {' | '.join(DTYPES)}")
    if offload_dir is not None and not offload_dir.is_dir():
        raise InputError(f"the folder {offload_dir} does not exist; make it first")
    reads_text = reads_samples(method, allocate, repair)
    console.begin()
    folder, note = local_folder(name, weights=not dry_run)
    checkpoint = None if dry_run and not next(folder.glob("*.safetensors"), None) else Checkpoint(folder)
    model = empty_model(folder, dtype)
    check_model(model, [method], pattern, include, exclude)
    weights = prunable(model, include, exclude)
    windows = None
    if dry_run:
        tokens = (length or console.LENGTH) + (model.config.bos_token_id is not None)
        shape = shape_of(model, weights, samples if reads_text else 0, tokens, checkpoint)
    else:
        tokenizer = load_tokenizer(folder, name)
        length = console.window_length(model.config, tokenizer, length)
        if reads_text:
            windows = sparc3.windows(tokenizer, console.documents_of(text, name), length, samples, seed)
            check_fits(model, windows)
        count, tokens = (0, 0) if windows is None else windows.shape
        # Each of many processes holds its own share of the samples.
        shape = shape_of(model, weights, -(-count // console.processes()), tokens, checkpoint)
    if device == "cuda" and console.processes() > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    where = torch.device("cpu") if dry_run else usable_device(device)
    budget = _budget(device, max_memory, max_host_memory, dry_run)
    if out is not None:
        disk, scratch = free_space(out, offload_dir)
        budget = replace(budget, disk=disk, scratch=scratch)
    way = plan(
        shape,
        method,
        pattern,
        budget,
        model.config.vocab_size,
        console.processes(),
        allocate=allocate,
        repair=repair,
    )
    if dry_run:
        seconds = None
        if device == "cpu" or torch.cuda.is_available():
            seconds = estimate_seconds(way, usable_device(device), model.dtype, checkpoint)
        if as_json:
            return console.show_json({"plan": way.as_json(), "seconds": seconds})
        return console.show(*_described(way, seconds, budget))
    assert checkpoint is not None
    assert out is not None
    described = {
        "model": name,
        "origin": name if note else str(folder),
        "note": note,
        "text": text if reads_text else [],
        "samples": 0 if windows is None else len(windows),
        "length": length,
        "seed": seed,
        "include": include,
        "exclude": exclude,
    }
    job = Job(
        method,
        sparsity,
        pattern,
        [] if windows is None else windows,
        include,
        exclude,
        settings,
        described,
        allocate,
        repair,
    )
    origin = {"model": {"name": name, "origin": described["origin"], "note": note}}
    with started(where) as ranks, console.progress(f"pruning {name}") as update:
        if ranks.writes and not as_json:
            console.show(*_described(way, estimate_seconds(way, where, model.dtype, checkpoint), budget))
        update(total=way.visits)
        source = Streamed(model, checkpoint, where, way.prefetch, visited=lambda: update(advance=1))
        identity = identity_of(job, model, checkpoint, where, ranks.size)
        if windows is not None:
            ranks.check(len(batches_on(where, windows)))  # before a folder is made
        # One process writes; the others begin when it has made the folders.
        run = Unfinished(out, identity, resume, force, offload_dir) if ranks.writes else None
        complete = ranks.told(run.complete if run is not None else None)
        if run is None:
            run = Unfinished(out, identity, scratch=offload_dir, writer=False)
        report = None if complete else run_by_block(job, source, run, way, tokenizer, origin, ranks)
        ranks.told(None)  # the others end when all is written, since torchrun counts them
    if report is None and not (complete and ranks.writes):
        return None
    if report is None and not as_json:
        return console.show(f"{out} is complete already.")
    report = report or json.loads((out / "report.json").read_text(encoding="utf-8"))
    if as_json:
        return console.show_json({"out": str(out), **report})
    streamed = report["streamed"]
    parts = [f"{report['sparsity']['achieved']:.4%} pruned in {streamed['seconds']:.1f} s"]
    if streamed["peak_rss"] is not None:
        parts.append(f"at most {size(streamed['peak_rss'])} resident")
    names = ", ".join(sorted(file.name for file in out.iterdir() if not file.name.startswith("model-")))
    console.show(f"{'; '.join(parts)}.", f"Saved {out}: {names}, and {way.shape.blocks + 1} shards")


def _budget(device: str, max_memory: str | None, max_host_memory: str | None, dry_run: bool) -> Budget:
    """Of memory; the disk is taken to be empty."""
    process = psutil.Process().memory_info().rss
    disk = _EVERYTHING
    # What the process has already is part of the plan.
    host = free_memory(torch.device("cpu")) // console.processes() + process
    if max_host_memory is not None:
        host = parse_size(max_host_memory)
    if torch.device(device).type == "cpu":
        limit = min(host, host if max_memory is None else parse_size(max_memory))
        return Budget(limit, limit, disk, process, False)
    if max_memory is not None:
        limit = parse_size(max_memory)
    else:
        limit = _EVERYTHING if dry_run else free_memory(usable_device(device))
    return Budget(limit, host, disk, process, True)


def _described(way: Plan, seconds: float | None, budget: Budget) -> list[Any]:
    """The plan as a table and sentences."""
    shape = way.shape
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    separate = budget.separate
    columns = (
        {"device": way.device, "host": way.host, "disk": way.disk}
        if separate
        else {
            "memory": way.device,
            "disk": way.disk,
        }
    )
    table.add_column("what")
    for column in columns:
        table.add_column(column, justify="right", min_width=10)
    for part in dict.fromkeys(part for parts in columns.values() for part in parts):
        sizes = [parts.get(part, 0) for parts in columns.values()]
        if any(sizes):
            table.add_row(part, *(size(count) if count else "" for count in sizes))
    totals = (
        [way.device_bytes, way.host_bytes, way.disk_bytes] if separate else [way.device_bytes, way.disk_bytes]
    )
    table.add_section()
    table.add_row("at most at once", *(size(count) for count in totals))
    kept = "on disk" if way.on_disk else "in memory"
    spaced = "every block" if way.spacing is None else f"every {way.spacing}th block, the others run again"
    lines = [
        f"{shape.blocks} blocks, {way.visits} visits, {size(way.read)} to read and {size(way.written)} to write, "
        f"{way.operations / 1e12:.3g} TFLOP",
        f"next block read ahead: {'yes' if way.prefetch else 'no'}; kept between blocks {kept}: {spaced}",
    ]
    if seconds is not None:
        lines.append(f"about {console.duration(seconds)} at the speeds measured now")
    return [table, *lines]
