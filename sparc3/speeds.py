"""How long a plan takes, from speeds measured on the spot."""

from __future__ import annotations

import time

import torch

from sparc3.checkpoint import Checkpoint
from sparc3.plan import Plan
from sparc3.timing import synchronize

# How long each of the two speeds is measured, and on how much.
_MEASURED_SECONDS, _MEASURED_BYTES, _MEASURED_WIDTH = 0.3, 1 << 28, 2048


def estimate_seconds(
    way: Plan, device: torch.device, dtype: torch.dtype, checkpoint: Checkpoint | None
) -> float:
    """Seconds that a plan takes, from the speed of a matrix product and of reading, measured now.

    Attention, norms, selection and writing are left out.
    """
    computing = way.operations / _operations_per_second(
        device, dtype, max(1, way.shape.batch_tokens(device.type))
    )
    reading = 0.0 if checkpoint is None else way.read / _bytes_per_second(checkpoint)
    return max(computing, reading) if way.prefetch else computing + reading


def _operations_per_second(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    x = torch.ones(rows, _MEASURED_WIDTH, device=device, dtype=dtype)
    w = torch.ones(_MEASURED_WIDTH, _MEASURED_WIDTH, device=device, dtype=dtype)
    x @ w
    synchronize(device)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < _MEASURED_SECONDS:
        x @ w
        synchronize(device)
        products += 1
    return 2 * rows * _MEASURED_WIDTH**2 * products / (time.perf_counter() - start)


def _bytes_per_second(checkpoint: Checkpoint) -> float:
    start, count = time.perf_counter(), 0
    for stored in checkpoint.tensors.values():
        stored.read()
        count += stored.bytes
        if count >= _MEASURED_BYTES:
            break
    return count / (time.perf_counter() - start)
