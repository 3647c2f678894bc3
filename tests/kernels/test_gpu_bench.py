"""bench/gpu.py without a GPU: every case and peer, checked, the timing, the tables, the file, the nine minutes.

Cases take tiny shapes. `fake_gpu.pretend` stands for torch.cuda, the emulation of our kernels for our CUDA library.
"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import gpu_model
import pytest
import torch
from emulated_cuda import emulate
from fake_gpu import pretend
from gpu import dispatch_table, measure, table, whole_model
from gpu_case import Case, Made
from gpu_cases import cases
from gpu_timing import in_graph, median_ms
from rich.console import Console
from sparc3_kernels import backend
from sparc3_kernels.backend import unavailable

KINDS = (
    "backward attnlrp",
    "backward cp",
    "window 1024",
    "weight relevance abs 16x128 4096",
    "RMSNorm forward",
    "RMSNorm backward",
    "residual addition",
    "LayerNorm forward",
    "SwiGLU forward",
    "GeGLU backward",
    "LM head",
    "select: threshold",
    "select: half of each row",
    "decode: bitmap 50% 4096x11008 batch 1",
    "decode: bitmap 70% 8192x28672 batch 16",
    "decode: 2:4 4096x11008 batch 4",
)


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


def test_cases_agree_with_their_reference_and_fill_the_table() -> None:
    if torch.cuda.is_available() or unavailable("triton"):
        pytest.skip("a dry run takes Triton's interpreter")
    chosen = [next(case for case in cases() if kind in case.name) for kind in KINDS]
    with backend("triton"):
        results = [measure(case, torch.device("cpu"), True, 0.0) for case in chosen]
    for result in results:
        assert result["errors"]["sparc3"] <= 1e-5  # fp32 on the CPU
        assert result["ms"].keys() >= {"sparc3"}
        assert result["bytes"] or result["flops"]
    page = io.StringIO()
    Console(file=page, width=200).print(table(results, {"copy": 1e9, "product": 1e9}))
    assert all(case.name in page.getvalue() for case in chosen)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_case_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if torch.cuda.is_available() or unavailable("triton"):
        pytest.skip("Triton's interpreter stands for a GPU")
    emulate(monkeypatch)
    pretend(monkeypatch)
    monkeypatch.setattr(sys.modules["sparc3_kernels.backend"], "unavailable", lambda name: None)
    monkeypatch.setattr(gpu, "_COLD_BYTES", 1)
    device = torch.device("cpu")
    with backend("triton"):
        result = measure(Case(case.name, lambda _, dry: case.make(device, True)), device, False, 0.0)
    # All that was built was timed but what is named: for want of a package, or of a kernel of torch's for a CPU.
    assert result["ms"].keys() >= {"sparc3"}
    absent = {"ModuleNotFoundError", "NotImplementedError", "RuntimeError"}
    assert {reason.split(":")[0] for reason in result["skipped"].values()} <= absent, result["skipped"]
    assert not {"eager", "torch.compile", "cuSPARSELt", "torch.sort"} & result["skipped"].keys()
    page = io.StringIO()
    Console(file=page, width=200).print(table([result], {"copy": 1e9, "product": 1e9}))
    assert case.name in page.getvalue()


def test_a_time_is_the_median_of_calls_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = pretend(monkeypatch)
    asked: dict[str, list[int]] = {"one": [], "other": []}

    def call(name: str) -> Callable[[int], None]:
        def run(index: int) -> None:
            asked[name].append(index)
            # Two milliseconds of the other, and of one 0, 10, 20, ... in its first calls; a record takes one more.
            clock.now += 0.002 if name == "other" else 0.010 * index

        return run

    # A round of both takes 6 ms and 0, 10, 20, 30 ms of one: the fourth begins at 48 of 50 ms, and no fifth.
    times = median_ms({name: call(name) for name in asked}, False, 0.050)
    assert asked == {name: [0, 1, 2, 0, 1, 2, 3] for name in asked}
    assert times == pytest.approx({"one": 16.0, "other": 3.0})


def test_a_graph_takes_what_its_calls_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = pretend(monkeypatch)
    asked: list[int] = []

    def call(index: int) -> None:
        asked.append(index)
        clock.now += 0.004

    replay = in_graph(call, 3)
    assert asked == [0, 1, 2, 0, 1, 2]  # compiled, then captured
    assert median_ms({"graph": replay}, False, 0.0) == pytest.approx({"graph": 3 * 4.0 + 1.0})
    assert len(asked) == 6


@pytest.mark.parametrize("way", ["plain backward", "sparc3"])
def test_a_whole_model_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    built = gpu_model.built
    pretend(monkeypatch)
    monkeypatch.setattr(gpu_model, "built", lambda dry: built(True))
    result = gpu_model.measure(way, False)
    assert result["peak_bytes"] == 3 << 30
    assert result["ms"] == pytest.approx(1.0)
    assert result.get("error", 0.0) <= 1e-4


def small(name: str, run: Callable[..., Any] = lambda x: (x,)) -> Case:
    """A case that takes no time but that of `run`."""
    return Case(name, lambda device, dry: Made([torch.ones(4)], lambda x: (x,), {"sparc3": run}, bytes=16))


def test_what_begins_too_late_is_skipped_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, page = pretend(monkeypatch), io.StringIO()

    def slow(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        clock.now += 55.0
        return (x,)

    # A check, three calls to warm up and one that is timed: 275 s a case. 225 s are left for the second, none after.
    chosen = [small(f"case {number}", slow) for number in range(3)] + [small("a quick case")]
    results = gpu.run(chosen, torch.device("cpu"), False, 0.0, Console(file=page, width=200))
    assert [bool(result["ms"]) for result in results] == [True, True, False, False]
    assert results[2]["skipped"] == {"all": "no time left: -50 s of 500"}
    assert "no time left for a quick case" in page.getvalue()
    Console(file=page, width=200).print(table(results, {"copy": 1e9, "product": 1e9}))
    assert "no time left: -50 s of 500" in page.getvalue()
    assert "all gradients" in str(dispatch_table(results).columns[0]._cells)


def test_one_failure_leaves_the_others_their_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if reason := unavailable("triton"):
        pytest.skip(reason)

    def fails(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of memory")

    chosen = [small("wrong", lambda x: (x * 1.5,)), small("right"), small("fails", fails)]
    monkeypatch.setattr(gpu, "cases", lambda: chosen)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--only", "", "--out", str(tmp_path / "out.json")])
    monkeypatch.setattr(gpu, "whole_model", lambda dry: gpu._nothing(small("whole"), "lxt", "not installed"))
    with pytest.raises(SystemExit, match=r"sparc3 failed in wrong; fails$"):
        gpu.main()
    _, wrong, right, failed = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert wrong["skipped"] == {"sparc3": "ArithmeticError: sparc3 is off by 0.5, more than 0.02"}
    assert right["ms"].keys() == {"sparc3"}
    assert failed["skipped"] == {"sparc3": "RuntimeError: out of memory"}
    assert "out of memory" in capsys.readouterr().out


def test_nine_minutes_hold_all_but_the_case_that_is_running() -> None:
    ways = len(gpu_model.WAYS) * gpu._MODEL_SECONDS
    assert ways < gpu._SECONDS / 2
    assert gpu._SECONDS + gpu._CASE_SECONDS < 9 * 60


def test_the_file_and_the_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if reason := unavailable("triton"):
        pytest.skip(reason)
    pretend(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = {
        "case": gpu._WHOLE_MODEL,
        "bytes": 0,
        "flops": 1,
        "skipped": {"lxt": "not installed"},
        "errors": {},
    }
    whole |= {"ms": {"sparc3": 2.0, "plain backward": 4.0}, "peak_bytes": {"sparc3": 1 << 30}}
    monkeypatch.setattr(gpu, "whole_model", lambda dry: whole)
    monkeypatch.setattr(gpu, "ceilings", lambda device, dry: {"copy": 1e9, "product": 1e9})
    monkeypatch.setattr(gpu, "cases", lambda: [small("a case")])
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    (tmp_path / "results").mkdir()
    gpu.main()
    (written,) = (tmp_path / "results").iterdir()
    assert written.name.endswith("-a-gpu.json")
    document = json.loads(written.read_text())
    assert document["device"] == "a-gpu"
    assert document["ceilings"] == {"copy": 1e9, "product": 1e9}
    assert document["versions"].keys() >= {"torch", "triton", "transformers", "liger-kernel", "lxt", "commit"}
    assert document["versions"]["torch"] == torch.__version__
    assert document["cases"][0] == whole
    assert document["cases"][1]["ms"] == pytest.approx({"sparc3": 1.0})
    printed = capsys.readouterr().out
    assert printed.index("dispatch of attention") < printed.index("peer / ours")
    rows = [[part.strip() for part in line.split("│")[2:-1]] for line in printed.splitlines()]
    # The whole model: 4 ms over 2 ms, of which one flop takes nothing, and the peak of 1 GiB.
    assert ["plain backward", "4.000", "2.00", "", ""] in rows
    assert ["sparc3", "2.000", "", "0%", "1.0"] in rows


def test_no_gpu_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        gpu.main()


def test_a_peer_that_no_graph_takes_is_named_and_copies_follow_the_bytes_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def in_graph(call: Callable[[int], Any], count: int) -> Callable[[int], Any]:
        assert count == 5  # 400 bytes to pass over, 100 read
        for index in range(count):
            if not call(index):
                raise RuntimeError("not permitted when stream is capturing")
        return call

    asked: list[torch.Tensor] = []

    def peer(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Right when it is checked, empty when it is captured."""
        asked.append(x)
        return (x,) if len(asked) == 1 else ()

    def make(device: torch.device, dry: bool) -> Made:
        ours = {"sparc3": lambda x: (x,), "peer": peer}
        return Made([torch.ones(100)], lambda x: (x,), ours, bytes=100, short=True)

    monkeypatch.setattr(gpu, "_COLD_BYTES", 400)
    monkeypatch.setattr(gpu, "in_graph", in_graph)
    monkeypatch.setattr(gpu, "median_ms", lambda calls, dry, seconds: dict.fromkeys(calls, 10.0))
    result = measure(Case("short", make), torch.device("cpu"), False, 0.0)
    assert result["ms"] == {"sparc3": 2.0}  # of one of the five calls
    assert result["skipped"] == {"peer": "RuntimeError: not permitted when stream is capturing"}


def test_the_dispatch_follows_the_slowest_case_of_a_row() -> None:
    found = [
        {"dispatch": "all gradients", "ms": {"sparc3": 2.0, "sdpa math": 3.0, "sdpa other": 2.5}},
        {"dispatch": "all gradients", "ms": {"sparc3": 2.0, "sdpa math": 1.0}},
        {"dispatch": "values alone", "ms": {"sparc3": 1.0, "sdpa math": 4.0}},
        {"dispatch": "window", "ms": {"sparc3": 1.0, "flex_attention": 0.5}},
        {"dispatch": "", "ms": {"sparc3": 1.0}},
        {"ms": {"sparc3": 1.0}},
    ]
    page = io.StringIO()
    Console(file=page, width=200).print(dispatch_table(found))
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in page.getvalue().splitlines()]
    assert ["all gradients", "False", "1.25, 0.50", "False"] in rows
    assert ["values alone", "True", "4.00", "True"] in rows
    assert ["window", "True", "SDPA has none", "True"] in rows


def test_a_whole_model_with_its_peers_in_processes_of_their_own() -> None:
    if torch.cuda.is_available() or unavailable("triton"):
        pytest.skip("a dry run takes Triton's interpreter")
    result = whole_model(True, ("sparc3", "lxt"))
    assert result["errors"]["sparc3"] <= 1e-4  # what gpu_model.py demands of fp32
    assert result["flops"] > 0
    # LXT is not among what the tests install.
    assert "lxt" in result["ms"] or "No module named 'lxt'" in result["skipped"]["lxt"]
    page = io.StringIO()
    Console(file=page, width=200).print(table([result], {"copy": 1e9, "product": 1e9}))
    assert result["case"] in page.getvalue()
