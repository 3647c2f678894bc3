"""torch.cuda without a GPU, as far as bench/gpu.py uses it: events that read a clock, graphs, a library's products.

Nothing here measures: the clock stands still but where an event is recorded, for a millisecond, or a test moves it.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import gpu
import gpu_case
import gpu_decode_cases
import gpu_select_cases
import gpu_timing
import torch


@dataclass
class Clock:
    """Seconds since some moment, in place of the module `time`."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


def pretend(monkeypatch) -> Clock:
    """Make torch.cuda and the modules of the benchmark believe that there is a GPU; its tensors are of the CPU."""
    clock = Clock()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now = clock.now + 1e-3

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class CUDAGraph:
        def replay(self):
            clock.now += self.seconds

    @contextmanager
    def capture(graph):
        start = clock.now
        yield
        graph.seconds = clock.now - start

    fakes = {
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "Stream": object,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 3 << 30,
        "get_device_name": lambda: "A GPU",
    }
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake)
    for module in (gpu, gpu_timing):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    for module in (gpu_case, gpu_decode_cases, gpu_select_cases):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
    for name, fake in _CUSPARSELT.items():
        monkeypatch.setattr(torch, name, _as_declared(name, fake))
    return clock


_CUSPARSELT = {
    "_cslt_compress": lambda dense: dense,
    "_cslt_sparse_mm_search": lambda sparse, dense: 7,
    "_cslt_sparse_mm": lambda sparse, dense, alg_id: sparse @ dense if alg_id == 7 else None,
}


def _as_declared(name, fake):
    """`fake`, called only as torch declares the op."""
    declared = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]

    def call(*args, **kwargs):
        assert len(args) <= len(declared)
        assert set(kwargs) <= set(declared[len(args) :])
        return fake(*args, **kwargs)

    return call
