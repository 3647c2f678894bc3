"""sparc3 bench decode: the table holds what was measured, and nothing that was wrong."""

import itertools
import json
import os

import pytest
import torch
from commands import succeed, succeed_json
from test_cli_refusals import refuse

from sparc3 import decode_bench, decode_peers, decode_report
from sparc3.decode_bench import Matrix, Timing, matrices_of, measure, pruned_weight
from sparc3.decode_peers import implementations
from sparc3.timing import cache_bytes, cold_seconds

CPU = torch.device("cpu")
SMALL = (Matrix("first", 24, 32, 2), Matrix("second", 16, 24, 1))


def right(weight):
    def product(x):
        return x.float() @ weight.float().T

    product.bytes = 123
    return product


def wrong(weight):
    return lambda x: x @ weight.T * 1.05


def flat(weight):
    return lambda x: (x @ weight.T).flatten()


def fails(weight):
    return lambda x: 1 / 0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few copies and turns: what is tested is not the time."""
    monkeypatch.setattr(decode_bench, "_ROUNDS", 3)
    monkeypatch.setattr(decode_bench, "_MOST_COPIES", 2)


def lines(own=None, sparsities=("0.5", "2:4"), dtype=torch.bfloat16):
    timings, bandwidth = measure(SMALL, sparsities, (1, 3), implementations(CPU, own), dtype, CPU)
    assert bandwidth > 1e8
    return timings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_implementation_is_right_and_timed(dtype):
    timings = lines(dtype=dtype)
    names = {one.name for one in implementations(CPU)}
    assert {"torch F.linear", "torch CSR fp32", "scipy CSR fp32", "sparc3 bitmap", "sparc3 nm"} <= names
    assert [timing.failure for timing in timings if timing.failure] == []
    for sparsity in ("0.5", "2:4"):
        expected = names - (set() if ":" in sparsity else {"sparc3 nm"})
        for batch in (1, 3):
            for matrix in ("first", "second", "block"):
                found = {
                    timing.implementation: timing
                    for timing in timings
                    if (timing.sparsity, timing.batch, timing.matrix) == (sparsity, batch, matrix)
                }
                assert set(found) == expected
                dense = min(timing.seconds for timing in found.values() if timing.kind == "dense")
                for timing in found.values():
                    assert timing.seconds > 0
                    if matrix != "block":
                        assert timing.ratio == pytest.approx(dense / timing.seconds)


def test_a_block_is_the_sum_of_its_matrices():
    timings = lines()
    for block in (timing for timing in timings if timing.matrix == "block"):
        same = [
            timing
            for timing in timings
            if timing.matrix != "block" and (timing.sparsity, timing.batch) == (block.sparsity, block.batch)
        ]
        ours = [timing for timing in same if timing.implementation == block.implementation]
        assert block.seconds == pytest.approx(sum(timing.count * timing.seconds for timing in ours))
        assert block.bytes == sum(timing.count * timing.bytes for timing in ours)
        best = sum(
            matrix.count * min(t.seconds for t in same if t.kind == "dense" and t.matrix == matrix.name)
            for matrix in SMALL
        )
        assert block.ratio == pytest.approx(best / block.seconds)


def test_the_bytes_are_those_of_the_format():
    sizes = {timing.implementation: timing.bytes for timing in lines() if timing.matrix == "first"}
    weight, _, _ = pruned_weight(SMALL[0], "2:4", torch.bfloat16, CPU)
    kept = int(weight.count_nonzero())
    assert kept == 24 * 16
    assert sizes["torch F.linear"] == sizes["torch W @ X"] == 24 * 32 * 2
    assert sizes["sparc3 nm"] == 2 * kept + kept // 4
    assert sizes["sparc3 bitmap"] == 2 * kept + 24 * 4 + 25 * 8
    assert sizes["sparc3 csr"] == 4 * kept + 25 * 8
    assert sizes["torch CSR fp32"] == sizes["scipy CSR fp32"] == 8 * kept + 25 * 4


@pytest.mark.parametrize("sparsity", ["0.7", "2:4", "3:8"])
def test_weights_are_pruned_as_asked(sparsity):
    matrix = Matrix("m", 64, 256, 1)
    weight, n, m = pruned_weight(matrix, sparsity, torch.float32, CPU)
    if m:
        assert ((weight.view(64, -1, m) != 0).sum(2) == n).all()
    else:
        # 16384 draws: 0.7 within five standard deviations of 0.0036.
        assert (weight == 0).float().mean().item() == pytest.approx(0.7, abs=0.018)
    assert torch.equal(weight, pruned_weight(matrix, sparsity, torch.float32, CPU)[0])


def test_own_kernels_are_checked_before_they_are_timed(monkeypatch):
    import sys
    from types import ModuleType

    module = ModuleType("my_kernels")
    module.__dict__.update(right=right, wrong=wrong, flat=flat, fails=fails)
    monkeypatch.setitem(sys.modules, "my_kernels", module)
    for name, message in (
        ("right", ""),
        ("wrong", "wrong result: row "),
        ("flat", "the product has shape [24], not [1, 24]"),
        ("fails", "ZeroDivisionError: division by zero"),
    ):
        own = [one for one in lines(f"my_kernels:{name}", ("0.5",)) if one.kind == "own"]
        assert len(own) == (6 if name == "right" else 4)
        for one in own:
            assert one.failure.startswith(message) if one.matrix == "first" and one.batch == 1 else True
            assert (one.seconds is None) == bool(one.failure) == (name != "right")
    assert {
        one.bytes
        for one in lines("my_kernels:right", ("0.5",))
        if one.implementation == "my_kernels:right" and one.matrix != "block"
    } == {123}


def test_shapes():
    assert (
        sum(matrix.rows * matrix.columns * matrix.count for matrix in matrices_of("llama-2-7b")) == 202375168
    )
    assert (
        sum(matrix.rows * matrix.columns * matrix.count for matrix in matrices_of("llama-3-70b")) == 855638016
    )
    found = {(matrix.rows, matrix.columns): matrix.count for matrix in matrices_of("tiny-llama")}
    assert found == {(128, 128): 2, (64, 128): 2, (352, 128): 2, (128, 352): 1}


def test_slower_is_said():
    def line(name, kind, ratio, failure=""):
        return Timing("block", 0, 0, 7, "0.5", 1, name, kind, 1.0, 10, 0.5, ratio, failure).line()

    said = decode_report.remarks(
        [
            line("sparc3 csr", "sparc3", 0.5),
            line("sparc3 bitmap", "sparc3", 1.5),
            line("torch CSR", "peer", 0.1),
            line("mine", "own", None, "wrong result"),
        ]
    )
    assert said == [
        "Slower than dense: sparc3 csr, block at 50 %, batch 1: 0.50x",
        "Not timed: mine, block at 50 %, batch 1: wrong result",
    ]


def test_the_crossover_is_said():
    def lines_of(name, kind, sparsity, ratios):
        return [
            Timing("block", 0, 0, 7, sparsity, batch, name, kind, 1.0, 10, 0.5, ratio).line()
            for batch, ratio in ratios.items()
        ]

    said = decode_report.crossovers(
        [
            *lines_of("sparc3 bitmap", "sparc3", "0.5", {256: 0.7, 1: 1.4, 64: 1.0, 128: 0.99}),
            *lines_of("sparc3 bitmap", "sparc3", "0.9", {1: 4.0, 64: 1.2}),
            *lines_of("sparc3 nm", "sparc3", "2:4", {1: 1.3, 8: 0.9, 64: 1.1}),
            *lines_of("mine", "own", "0.5", {1: 0.3, 64: 0.2}),
            *lines_of("torch CSR", "peer", "0.5", {1: 0.3, 64: 0.2}),
            *lines_of("sparc3 csr", "sparc3", "0.5", {1: 0.3}),
            *lines_of("sparc3 csr", "sparc3", "0.7", {1: None, 64: None}),
        ]
    )
    assert said == [
        "Crossover: sparc3 bitmap at 50 % is no slower than dense up to batch 64, slower from 128 on",
        "Crossover: sparc3 bitmap at 90 % is no slower than dense at any batch measured, 1 to 64",
        "Crossover: sparc3 nm at 2:4 is slower than dense at batch 8 of 1, 8, 64",
        "Crossover: mine at 50 % is slower than dense at every batch measured, 1 to 64",
    ]


def test_a_run_finds_the_crossover_by_its_clock(room, base, monkeypatch):
    """Ours take a second a vector by the clock of the test, dense products ten for any number."""
    batches = itertools.cycle((1, 8, 64))

    def seconds(calls, device):
        batch = next(batches)
        return {name: float(batch) if name.startswith("sparc3") else 10.0 for name in calls}

    monkeypatch.setattr(decode_bench, "_interleaved", seconds)
    arguments = ("--sparsity", ".5", "--batch", "1,8,64", "--only", "sparc3 bitmap", "--out", "out")
    line = "Crossover: sparc3 bitmap at 50 % is no slower than dense up to batch 8, slower from 64 on"
    assert line in succeed("bench", "decode", "--shape", base, *arguments).splitlines()
    assert f"- {line}" in (room / "out/decode.md").read_text().splitlines()


def test_the_command_writes_table_plot_and_json(room, base):
    arguments = ("bench", "decode", "--shape", base, "--sparsity", ".5,2:4", "--batch", "1,2")
    out = succeed(*arguments, "--out", "out")
    assert "Batch 2: speed of a decoder block against the best dense (and its ms)\n" in out
    assert {file.name for file in (room / "out").iterdir()} == {"decode.json", "decode.md", "decode.png"}
    result = json.loads((room / "out/decode.json").read_text())
    assert (result["dtype"], result["threads"], result["device"]) == ("bfloat16", 1, "cpu")
    text = (room / "out/decode.md").read_text()
    for line in result["lines"]:
        assert f"| {1e3 * line['seconds']:.3f} |" in text
    for line in result["lines"]:
        if line["kind"] == "sparc3" and line["ratio"] < 1:
            assert f"{line['ratio']:.2f} (slower)" in text
            assert f"Slower than dense: {line['implementation']}" in out
    assert (room / "out/decode.png").read_bytes()[:4] == b"\x89PNG"
    only = succeed_json(*arguments, "--only", "bitmap", "--threads", 2)
    assert only["threads"] == 2
    assert {line["implementation"] for line in only["lines"]} == {
        "torch F.linear",
        "torch W @ X",
        "torch fp32",
        "sparc3 bitmap",
    }
    assert torch.get_num_threads() == 1


def test_sparsities_are_added_to_an_earlier_run(room, base):
    arguments = ("bench", "decode", "--shape", base, "--batch", "1,2", "--only", "sparc3", "--out", "out")
    succeed(*arguments, "--sparsity", ".5,2:4")
    first = json.loads((room / "out/decode.json").read_text())
    later = succeed_json(*arguments, "--sparsity", ".7,2:4", "--add")
    assert json.loads((room / "out/decode.json").read_text()) == later
    kept, found = ([line for line in run["lines"] if line["sparsity"] == "0.5"] for run in (first, later))
    assert sorted(found, key=str) == sorted(kept, key=str) != []
    for sparsity, speed in (("0.5", True), ("2:4", False)):
        assert (first["bytes_per_second"][sparsity] == later["bytes_per_second"][sparsity]) == speed
    blocks = [line for line in later["lines"] if line["matrix"] == "block" and line["batch"] == 2]
    assert list(dict.fromkeys(line["sparsity"] for line in blocks)) == ["0.5", "0.7", "2:4"]
    text = (room / "out/decode.md").read_text()
    assert all(f"| {1e3 * line['seconds']:.3f} |" in text for line in later["lines"])
    refuse(
        room,
        "the earlier run has another dtype (bfloat16, now float32)",
        *arguments,
        "--add",
        "--dtype",
        "float32",
    )
    refuse(room, "--add needs --out", "bench", "decode", "--add")
    refuse(room, "masks holds no run of sparc3 bench decode", "bench", "decode", "--add", "--out", "masks")


def test_mkl_is_found_in_its_wheel(monkeypatch, tmp_path):
    class Wheel:
        name = "libmkl_rt.so.3"

        def locate(self):
            return tmp_path / "lib" / "python" / ".." / self.name

    monkeypatch.setattr(decode_peers.metadata, "files", lambda name: [Wheel()] if name == "mkl" else None)
    monkeypatch.delenv("MKL_RT", raising=False)
    decode_peers._name_mkl()
    assert os.environ["MKL_RT"] == str(tmp_path / "lib" / "libmkl_rt.so.3")
    monkeypatch.setenv("MKL_RT", "mine.so")
    decode_peers._name_mkl()
    assert os.environ["MKL_RT"] == "mine.so"


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("'half' in --sparsity is neither a number nor N:M", ("--sparsity", "half")),
        ("sparsity 1.0 is not a share", ("--sparsity", "0.5,1")),
        ("pattern '4:2' is not known", ("--sparsity", "4:2")),
        ("--batch 0: a batch has at least one vector", ("--batch", "0")),
        ("--batch one is not a list of whole numbers", ("--batch", "one")),
        ("dtype 'int8' is not known", ("--dtype", "int8")),
        ("--impl nowhere:f cannot be used", ("--impl", "nowhere:f")),
        ("--impl math cannot be used", ("--impl", "math")),
        ("--shape gpt-9 is none of llama-2-7b", ("--shape", "./gpt-9")),
        ("device 'gpu' cannot be used", ("--device", "gpu")),
        ("fifty exists; give another --out", ("--out", "fifty")),
    ],
)
def test_refusals(room, base, masks, message, arguments):
    refuse(room, message.replace("gpt-9", "./gpt-9"), "bench", "decode", *arguments)


def test_cold_calls_take_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = cold_seconds(calls, CPU, rounds=3)
    assert order == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}
    assert cache_bytes(CPU) >= 1 << 20
