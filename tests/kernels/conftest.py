"""Runs a test body on every backend and instruction set that this machine has."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sparc3_kernels import backend, native
from sparc3_kernels.backend import unavailable

sys.path.insert(0, str(Path(__file__).parent))

from interpreter import DEVICE

IMPLEMENTATIONS = ("reference", "cpu-portable", "cpu-avx2", "cpu-avx512")
# Instruction sets that only the packed weights have kernels for; the last, on which torch multiplies bf16.
PACKED_IMPLEMENTATIONS = (*IMPLEMENTATIONS, "cpu-avx512vbmi2", "cpu-avx512bf16")
FUSED = ("reference", "triton")


@contextmanager
def forced(name: str) -> Iterator[str]:
    """Force one implementation; skip the test where this machine lacks it."""
    name, _, isa = name.partition("-")
    if isa:
        if reason := native.missing():
            pytest.skip(reason)
        if isa not in ("portable", *native.info()["cpu"]["features"]):
            pytest.skip(f"this machine has no {isa}")
        native.force_isa(isa)
    if reason := unavailable(name):
        pytest.skip(reason)
    with backend(name):
        yield name
    if isa:
        native.force_isa(None)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one CPU implementation for the length of a test."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=PACKED_IMPLEMENTATIONS)
def packed_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one CPU implementation of the packed weights for the length of a test."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=(*IMPLEMENTATIONS, "cpu-avx512bf16", "triton"))
def implementation_or_triton(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, and the Triton kernels."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force the reference or the Triton kernels, on the GPU or in the interpreter."""
    with forced(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run."""
    return DEVICE
