"""bench/gpu.py as far as it goes without a GPU: a case of each op and a whole model, checked, and the table."""

import io
from collections.abc import Callable
from typing import Any

import gpu
import pytest
import torch
from gpu import dispatch_table, measure, table, whole_model
from gpu_case import Case, Made
from gpu_cases import cases
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
