"""Pruning block by block against pruning in memory: the same masks and weights, bit by bit."""

import itertools

import pytest
import torch
import transformers
from tiny import CONFIGS, VOCABULARY, batch, build
from transformers import AutoModelForCausalLM

from sparc3.checkpoint import Checkpoint
from sparc3.compress import prune
from sparc3.errors import InputError
from sparc3.families import prunable
from sparc3.job import Job, identity_of
from sparc3.mask import Mask
from sparc3.passes import SWEEP_ONLY
from sparc3.plan import Budget, plan
from sparc3.report import tensor_sparsity
from sparc3.shape import shape_of
from sparc3.stream import prune_by_block
from sparc3.unfinished import Unfinished
from sparc3.weights import Streamed, empty_model

CPU = torch.device("cpu")
SAMPLES = [batch(), batch(2, 7, padding=False, seed=2)]
PLENTY = Budget(device=1 << 40, host=1 << 40, disk=1 << 40, process=0, separate=False)


def checkpoint(folder, name="llama", dtype=torch.float32, **changes):
    build(name, "eager" if name == "gemma2" else "sdpa", **changes).to(dtype).save_pretrained(
        folder, max_shard_size="20KB"
    )
    return folder


def streamed(folder, out, job, budget=PLENTY, resume=False, force=False, scratch=None, visited=None):
    model = empty_model(folder)
    files = Checkpoint(folder)
    weights = prunable(model, job.include, job.exclude)
    samples, length = 5, 12
    shape = shape_of(model, weights, samples, length, files)
    how = {"allocate": job.allocate, "repair": job.repair}
    way = plan(shape, job.method, job.pattern, budget, VOCABULARY, **how)
    source = Streamed(model, files, CPU, way.prefetch, visited)
    run = Unfinished(out, identity_of(job, model, files, CPU), resume, force, scratch)
    return prune_by_block(job, source, run, way), way


def resident(folder, job):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    mask = prune(
        model,
        job.samples,
        job.method,
        job.sparsity if ":" not in job.pattern else None,
        job.pattern,
        include=job.include,
        exclude=job.exclude,
        allocate=job.allocate,
        repair=job.repair,
        **job.settings,
    )
    return model, mask


def check_same(out, folder, job, tmp_path):
    model, mask = resident(folder, job)
    mask.save(tmp_path / "resident.safetensors")
    assert (out / "mask.safetensors").read_bytes() == (tmp_path / "resident.safetensors").read_bytes()
    found = AutoModelForCausalLM.from_pretrained(out)
    mask.apply(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.dtype == model.dtype
    # Only the output is left.
    assert not list(out.parent.glob(f".{out.name}*"))


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


METHODS = ("lrp", "gradient", "wanda", "ria", "gblm", "sparsegpt", "magnitude", "random")


@pytest.mark.parametrize("pattern", ["row", "layer", "global", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_pattern(method, pattern, tmp_path):
    if method in SWEEP_ONLY and pattern == "global":
        pytest.skip("it selects inside the sweep")
    folder = checkpoint(tmp_path / "model", num_hidden_layers=3)
    job = Job(method, 0.5 if pattern == "2:4" else 0.6, pattern, SAMPLES)
    report, _ = streamed(folder, tmp_path / "out", job)
    check_same(tmp_path / "out", folder, job, tmp_path)
    mask = Mask.load(tmp_path / "out" / "mask.safetensors")
    assert report["sparsity"]["achieved"] == mask.sparsity
    assert list(report["tensors"]) == list(mask.bits)
    assert report["streamed"]["peak_rss"] > 1 << 20


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize(
    ("method", "pattern", "allocate"),
    [
        *((method, "row", "relevance") for method in ("lrp", "wanda", "gblm", "sparsegpt", "random")),
        *((method, "layer", "owl") for method in ("lrp", "ria", "gblm", "magnitude")),
        ("lrp", "layer", "relevance"),
        *((method, "global", "uniform") for method in ("gradient", "wanda", "magnitude")),
        *((method, "2:4", "uniform") for method in ("lrp", "sparsegpt")),
    ],
)
def test_allocation_and_repair(method, pattern, allocate, repair, tmp_path):
    if not repair and allocate == "uniform":
        pytest.skip("as above")
    folder = checkpoint(tmp_path / "model", num_hidden_layers=3)
    job = Job(method, 0.5, pattern, SAMPLES, allocate=allocate, repair=repair)
    report, _ = streamed(folder, tmp_path / "out", job)
    check_same(tmp_path / "out", folder, job, tmp_path)
    mask = Mask.load(tmp_path / "out" / "mask.safetensors")
    assert report["tensors"] == tensor_sparsity(mask)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_repaired_with_its_head(name, tmp_path):
    folder = checkpoint(tmp_path / "model", name, torch.bfloat16, tie_word_embeddings=False)
    for number, method in enumerate(("gblm", "lrp")):
        job = Job(method, 0.4, "row", SAMPLES, ["*"], ["*embed*"], allocate="relevance", repair=True)
        streamed(folder, tmp_path / f"out{number}", job)
        check_same(tmp_path / f"out{number}", folder, job, tmp_path)


@pytest.mark.parametrize("method", ["lrp", "wanda"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name, method, tmp_path):
    folder = checkpoint(tmp_path / "model", name, torch.bfloat16)
    job = Job(method, 0.4, "row", SAMPLES)
    streamed(folder, tmp_path / "out", job)
    check_same(tmp_path / "out", folder, job, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_and_chosen_weights(tied, tmp_path):
    folder = checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    some = {"include": ["*mlp*", "lm_head*"], "exclude": ["*.1.*"]}
    for pattern, method in itertools.product(("row", "global"), ("lrp", "wanda")):
        settings = {"reduce": "abs"} if method == "lrp" else {}
        job, out = (
            Job(method, 0.5, pattern, SAMPLES, **some, settings=settings),
            tmp_path / f"{pattern}-{method}",
        )
        streamed(folder, out, job)
        check_same(out, folder, job, tmp_path)
        assert "lm_head.weight" in Mask.load(out / "mask.safetensors").bits


def ways(folder, job):
    """A budget for each way that a plan can go: host or disk, all or spaced, with and without reading ahead."""
    model = empty_model(folder)
    shape = shape_of(model, prunable(model), 5, 12)
    budgets, found = [], set()
    without_boundaries = plan(shape, job.method, job.pattern, PLENTY, 1).disk_bytes
    for device in range(1 << 14, 1 << 21, 1 << 10):
        for disk in (without_boundaries, 1 << 40):
            budget = Budget(device, 0, disk, 0, False)
            try:
                way = plan(shape, job.method, job.pattern, budget, 1)
            except InputError:
                continue
            key = (way.prefetch, way.on_disk, way.spacing)
            if key not in found:
                found.add(key)
                budgets.append(budget)
    return budgets


def test_every_way_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("sparc3.plan._LOGIT_BYTES", 0)
    monkeypatch.setattr("sparc3.plan._THREADS_AND_LIBRARIES", 0)
    monkeypatch.setattr("sparc3.shape._OWN_PAGES", 0)
    folder = checkpoint(tmp_path / "model", num_hidden_layers=7)
    job = Job("lrp", 0.5, "row", SAMPLES)
    seen = set()
    for number, budget in enumerate(ways(folder, job)):
        _, way = streamed(folder, tmp_path / f"out{number}", job, budget)
        seen.add((way.prefetch, way.on_disk, way.spacing))
        check_same(tmp_path / f"out{number}", folder, job, tmp_path)
    # Here a block read ahead takes more than the boundaries that spacing saves, so (True, False, 3) is never chosen.
    assert seen == {
        (True, False, None),
        (False, False, None),
        (True, True, None),
        (False, True, None),
        (False, False, 3),
    }
