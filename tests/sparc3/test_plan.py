"""What a plan says against what is counted by hand and what the engine holds."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny import CONFIGS, build

from sparc3.checkpoint import Checkpoint
from sparc3.errors import InputError
from sparc3.families import blocks_of, prunable
from sparc3.plan import Budget, plan
from sparc3.scores import batches_on
from sparc3.shape import shape_of
from sparc3.sizes import exact_size, parse_size, size
from sparc3.weights import empty_model

VOCABULARY = 97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_the_loaded_model(name, dtype, tmp_path):
    whole = build(name, "eager" if name == "gemma2" else "sdpa").to(dtype)
    whole.save_pretrained(tmp_path)
    model, checkpoint = empty_model(tmp_path), Checkpoint(tmp_path)
    shape = shape_of(model, prunable(model), 7, 12, checkpoint)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(whole)]
    assert shape.block == max(blocks)
    assert shape.outside == sum(p.nbytes for p in whole.parameters()) - sum(blocks)
    assert shape.stored_blocks == sum(blocks)
    assert shape.stored_outside + shape.stored_blocks == checkpoint.bytes
    weights = prunable(whole).values()
    assert shape.prunable == sum(weight.weight.numel() for weight in weights)
    assert shape.largest_tensor == max(weight.weight.numel() for weight in weights)
    assert shape.boundary == 7 * 12 * 32 * dtype.itemsize
    assert [shape.batch_tokens(kind) for kind in ("cpu", "cuda")] == [84, 84]
    many = shape_of(model, prunable(model), 400, 12, checkpoint)
    assert [many.batch_tokens(kind) for kind in ("cpu", "cuda")] == [504, 2040]
    # What is planned for is what is run; the meta device stands for one that is no CPU.
    for kind, samples, length in product(("cpu", "meta"), (1, 7, 400), (1, 12, 513, 2049)):
        windows = torch.empty(samples, length, dtype=torch.int64)
        first = batches_on(torch.device(kind), windows)[0]["input_ids"]
        assert replace(shape, samples=samples, length=length).batch_tokens(kind) == first.numel()


LLAMA = empty_model(build("llama", num_hidden_layers=9).config)


def shape(samples=4, length=8):
    return shape_of(LLAMA, prunable(LLAMA), samples, length)


def budget(device=1 << 40, host=1 << 40, disk=1 << 40, process=0, separate=False, scratch=None):
    return Budget(device, host, disk, process, separate, scratch)


# A Llama block: q and o 32 x 32, k and v 16 x 32, gate, up and down 48 x 32; two norms of 32.
PRUNABLE = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
BLOCK = 4 * (PRUNABLE + 64)
BOUNDARY = 4 * 8 * 32 * 4


def test_every_part_by_hand():
    way = plan(shape(), "lrp", "row", budget(process=1000), VOCABULARY)
    assert way.device == {
        "process": 1000,
        "weights": 2 * BLOCK,
        "accumulators": 4 * PRUNABLE,
        "moments": 0,
        "solver": 0,
        "activations": 32 * (8 * 32 + 4 * (32 + 2 * 16) + 6 * 48) * 4,
        "outside of the blocks": 4 * (2 * VOCABULARY * 32 + 32),
        "logits": 16 * 32 * VOCABULARY,
        "selection": 12 * 48 * 32,
        "boundaries": 10 * BOUNDARY,
        "conversion": 0,
        "allocator": (64 << 20) + 2 * BLOCK + 4 * PRUNABLE,
    }
    assert way.host == {}
    assert way.disk == {
        "pruned model": 9 * BLOCK + 4 * (2 * VOCABULARY * 32 + 32),
        "mask": 9 * PRUNABLE // 8,
        "small files": 32 << 20,
        "masks of blocks": 9 * PRUNABLE // 8,
        "states, to resume": 2 * BOUNDARY,
        "boundaries": 0,
        "scores": 0,
    }
    assert (way.prefetch, way.on_disk, way.spacing, way.visits) == (True, False, None, 18)
    assert way.read == 2 * 9 * BLOCK + 3 * 4 * (2 * VOCABULARY * 32 + 32)
    assert way.operations == 8 * (PRUNABLE + 64) * 9 * 32
    # What is outside of the blocks takes its turn; the blocks' parts are there together.
    outside = way.device["outside of the blocks"] + way.device["logits"]
    rest = sum(way.device.values()) - outside
    always = 1000 + 10 * BOUNDARY + way.device["allocator"]
    assert way.device_bytes == always + max(outside, rest - always)


def test_passes_one_after_the_other_take_the_memory_of_the_largest():
    lrp = plan(shape(), "lrp", "row", budget(), VOCABULARY)
    wanda = plan(shape(), "wanda", "row", budget(), VOCABULARY)
    way = plan(shape(), "lrp", "row", budget(), VOCABULARY, allocate="relevance", repair=True)
    # q, k, v, o, gate and up receive 32 numbers, down 48.
    assert way.device["moments"] == 4 * (6 * 32**2 + 48**2) + 4 * 48**2
    assert way.device["solver"] == 48 * 48 * 32
    assert way.device["weights"] == 4 * BLOCK
    assert way.disk["scores"] == 4 * 9 * PRUNABLE
    assert way.disk["masks of blocks"] == 2 * (9 * PRUNABLE // 8)
    assert way.visits == 2 * lrp.visits + wanda.visits
    assert way.operations == 2 * lrp.operations + wanda.operations
    factored = plan(shape(), "sparsegpt", "row", budget(), VOCABULARY)
    assert factored.device["moments"] == 4 * (6 * 32**2 + 48**2) + 24 * 48**2
    assert factored.visits == 9
    # Gradients of every weight are kept for the sweep.
    assert plan(shape(), "gblm", "row", budget(), VOCABULARY).disk["scores"] == 4 * 9 * PRUNABLE
    # The backward of so many samples holds more than the sweep.
    many = plan(shape(400, 100), "lrp", "row", budget(), VOCABULARY, repair=True)
    assert many.device["boundaries"] == 10 * 400 * 100 * 32 * 4


def test_what_a_gpu_and_the_host_hold():
    way = plan(shape(), "lrp", "global", budget(process=1000, separate=True), VOCABULARY)
    assert way.host == {
        "process": 1000,
        "boundaries": 10 * BOUNDARY,
        "conversion": 0,
        "allocator": (64 << 20) + 2 * BLOCK + 4 * PRUNABLE,
        "selection": 12 * 48 * 32,
        "read buffers": 3 * BLOCK,
    }
    assert "boundaries" not in way.device
    assert way.disk["scores"] == 4 * 9 * PRUNABLE
    assert way.visits == 27


def test_a_checkpoint_of_another_dtype_is_held_while_it_is_converted(tmp_path):
    build("llama", "sdpa", num_hidden_layers=3).bfloat16().save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    for dtype, held in (("float32", BLOCK // 2), ("bfloat16", 0)):
        model = empty_model(tmp_path, dtype)
        found = shape_of(model, prunable(model), 4, 8, checkpoint)
        # Of the embedding, the head and the last norm, or of a block, whichever is more.
        outside = 2 * (2 * VOCABULARY * 32 + 32)
        assert found.converted == (max(held, outside) if held else 0)
        assert plan(found, "lrp", "row", budget(), VOCABULARY).device["conversion"] == found.converted


def test_less_memory_takes_another_way():
    plenty = plan(shape(200, 100), "lrp", "row", budget(), VOCABULARY)
    assert (plenty.prefetch, plenty.on_disk, plenty.spacing) == (True, False, None)
    short = plan(shape(200, 100), "lrp", "row", budget(plenty.device_bytes - 1), VOCABULARY)
    assert (short.prefetch, short.on_disk, short.spacing) == (False, False, None)
    shorter = plan(shape(200, 100), "lrp", "row", budget(short.device_bytes - 1), VOCABULARY)
    assert (shorter.on_disk, shorter.spacing) == (True, None)
    assert shorter.disk["boundaries"] == 10 * 200 * 100 * 32 * 4
    spaced = plan(
        shape(200, 100), "lrp", "row", budget(short.device_bytes - 1, disk=shorter.disk_bytes - 1), VOCABULARY
    )
    assert (spaced.on_disk, spaced.spacing) == (False, 3)
    # 9 forwards, two stretches of 3 but for their last block once more, 9 backwards.
    assert spaced.visits == 9 + 4 + 9
    assert spaced.operations == plenty.operations * 10 // 8


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(
    ("method", "pattern"), [("lrp", "row"), ("lrp", "global"), ("magnitude", "2:4"), ("wanda", "row")]
)
def test_what_does_not_suffice_is_refused_with_what_would(method, pattern, separate):
    for what, option in (
        ("device", "--max-memory"),
        ("host", "--max-host-memory"),
        ("disk", "the disk of --out has"),
    ):
        if what == "host" and not separate:
            continue
        with pytest.raises(InputError, match=option) as refused:
            plan(shape(), method, pattern, budget(**{what: 1}, separate=separate), VOCABULARY)
        words = str(refused.value).split()
        needed = next(word for word in words if word.endswith("MiB") and word[0].isdigit())
        way = plan(
            shape(), method, pattern, budget(**{what: parse_size(needed)}, separate=separate), VOCABULARY
        )
        used = {"device": way.device_bytes, "host": way.host_bytes, "disk": way.disk_bytes}[what]
        assert parse_size(needed) - (1 << 20) < used <= parse_size(needed)


def test_each_disk_is_held_against_what_goes_there():
    way = plan(shape(), "lrp", "global", budget(), VOCABULARY)
    output = way.disk["pruned model"] + way.disk["mask"] + way.disk["small files"]
    assert way.output_bytes == output
    scratch = way.disk_bytes - output
    assert scratch == 9 * PRUNABLE // 8 + 2 * BOUNDARY + 4 * 9 * PRUNABLE
    plan(shape(), "lrp", "global", budget(disk=output, scratch=scratch), VOCABULARY)
    for short, words in (
        (
            budget(disk=output - 1, scratch=scratch),
            rf"the disk of --out .* needs {exact_size(output)} at least",
        ),
        (
            budget(disk=output, scratch=scratch - 1),
            rf"the disk of --offload-dir .* needs {exact_size(scratch)} at least",
        ),
        (
            budget(disk=output + scratch - 1),
            rf"the disk of --out .* needs {exact_size(output + scratch)} at least",
        ),
    ):
        with pytest.raises(InputError, match=words):
            plan(shape(), "lrp", "global", short, VOCABULARY)


def test_many_processes_spill_to_one_disk():
    one = plan(shape(), "lrp", "row", budget(), VOCABULARY)
    three = plan(shape(), "lrp", "row", budget(), VOCABULARY, processes=3)
    assert three.disk_bytes - one.disk_bytes == 2 * 2 * BOUNDARY
    assert three.device == one.device


def test_sizes_in_words():
    assert [size(count) for count in (0, 5, 1023, 1024, 1536, 5 << 30, 7 << 40)] == [
        *("0 B", "5 B", "1023 B", "1 KiB", "1.5 KiB", "5 GiB", "7 TiB")
    ]
    assert exact_size((1 << 20) + 1) == "2MiB"
    for text, count in (
        *(("8GiB", 8 << 30), ("8G", 8 << 30), ("8 gb", 8 * 10**9), ("1.5MiB", 3 << 19), ("100", 100)),
        *(("1e9", 10**9), ("7kb", 7000), ("2TiB", 2 << 40), ("3 B", 3)),
    ):
        assert parse_size(text) == count
    for text in ("", "GiB", "8XB", "-1GiB", "0", "nan", "inf", "1e400", "8 GiB of it"):
        with pytest.raises(InputError, match="is not a size"):
            parse_size(text)
