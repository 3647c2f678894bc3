"""Medians of times on a GPU, the implementations taking turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_ms(calls: dict[str, Callable[[int], Any]], dry: bool, seconds: float) -> dict[str, float]:
    """Median time of each implementation between CUDA events.

    Args:
        calls: by name, functions of the number of the call.
        dry: time one call each by the clock of the CPU instead.
        seconds: that all of it may take.
    """
    if dry:
        return {name: _once(call) for name, call in calls.items()}
    for call, index in itertools.product(calls.values(), range(3)):
        call(index)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, index = time.monotonic() + seconds, 0
    while not index or (time.monotonic() < end and index < 100):
        events = {}
        for name, call in calls.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(index)
            stop.record()
            events[name] = start, stop
        torch.cuda.synchronize()
        for name, (start, stop) in events.items():
            times[name].append(start.elapsed_time(stop))
        index += 1
    return {name: statistics.median(values) for name, values in times.items()}


def _once(call: Callable[[int], Any]) -> float:
    start = time.perf_counter()
    call(0)
    return (time.perf_counter() - start) * 1e3


def in_graph(call: Callable[[int], Any], count: int) -> Callable[[int], Any]:
    """`count` calls one after the other as one CUDA graph: what they take on the GPU, without Python's launches."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for index in range(count):
            call(index)  # compiles; nothing may compile in a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            call(index)
    return lambda _: graph.replay()
