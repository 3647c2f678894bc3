"""Time of calls that stream their weights from memory, as decoding does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

# Where the system does not tell: more than most processors and GPUs have.
_UNKNOWN_CACHE = 64 << 20


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    try:
        return int(sizes[-1].read_text().strip().removesuffix("K")) << 10
    except (IndexError, OSError, ValueError):
        return _UNKNOWN_CACHE


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cold_seconds(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = 5
) -> dict[str, float]:
    """Median seconds of each call with nothing of its weights in the cache, the calls taking turns."""
    flush = torch.ones(2 * cache_bytes(device) // 4, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            flush.sum()
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
