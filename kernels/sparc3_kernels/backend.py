"""Which implementation of an op runs: `reference` (plain torch), `triton`, or native `cpu` or `cuda`.

Each op lists the backends it has, best first, and `choose` takes the first one that can run the call.
`with backend("reference"):` or the environment variable SPARC3_BACKEND forces one for the whole process
(autograd runs backward in threads of its own, so a thread-local choice would not reach it).
"""

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from sparc3_kernels import native

BACKENDS = ("reference", "triton", "cpu", "cuda")

_forced: str | None = None


class BackendError(RuntimeError):
    """A forced backend is unknown, or cannot run here; the message says why."""


def unavailable(name: str) -> str | None:
    """Return why backend `name` cannot run on this machine, or None where it can."""
    if name not in BACKENDS:
        return f"no such backend; choose one of {', '.join(BACKENDS)}"
    if name == "cpu":
        return native.missing()
    if name == "cuda":
        return native.missing("sparc3_cuda") or (
            None if torch.cuda.is_available() else "torch sees no CUDA device"
        )
    if name == "triton":
        if _version("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "torch sees no CUDA device (TRITON_INTERPRET=1 runs kernels on the CPU: slowly, wrong in bf16)"
    return None


def forced() -> str | None:
    """The backend that is forced on every op, if any."""
    return _forced or os.environ.get("SPARC3_BACKEND")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether torch multiplies bf16 in a fraction of the time of fp32 there: on tensor cores, AMX or AVX512_BF16.

    False on the reference backend, and where the CPU library is not there or is held to a lesser instruction set.
    """
    if forced() == "reference":
        return False
    if device.type == "cpu":
        has = native.missing() is None and native.library().sparc3_isa() == b"avx512bf16"
        return has and torch.backends.mkldnn.is_available()
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force backend `name` on every op within the `with` block, in every thread.

    An op that has no implementation for `name` runs its reference.

    Raises:
        BackendError: `name` is unknown or cannot run on this machine.
    """
    global _forced
    if reason := unavailable(name):
        raise BackendError(f"backend {name!r}: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(op: str, fits: Mapping[str, str | None]) -> str:
    """Return the backend that runs this call of `op`.

    Args:
        op: name for error messages.
        fits: the backends `op` has, best first, each with the reason why it cannot run this call's
            device or dtype, or None. `reference` need not be listed: it runs everything.

    Raises:
        BackendError: the forced backend cannot run on this machine, or cannot run this call.
    """
    if name := forced():
        if reason := unavailable(name) or fits.get(name):
            raise BackendError(f"{op}: the forced backend {name!r} cannot run: {reason}")
        return name if name in fits else "reference"
    for name, reason in fits.items():
        if reason is None and unavailable(name) is None:
            return name
    return "reference"


def info() -> dict[str, Any]:
    """Return what the kernels run on: library versions or why they are missing, instruction set, devices."""
    return {
        "backends": {name: unavailable(name) or "available" for name in BACKENDS},
        "forced": forced(),
        "native": native.info(),
        "triton": _version("triton"),
        "torch": torch.__version__,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
