"""Runs a test body on every backend and instruction set that this machine has."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sparc3_kernels import backend, native
from sparc3_kernels.backend import unavailable
from sparc3_kernels.triton_support import interpreting

sys.path.insert(0, str(Path(__file__).parent))

from interpreter import mend_bfloat16

IMPLEMENTATIONS = ("reference", "cpu-portable", "cpu-avx2", "cpu-avx512")
FUSED = ("reference", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if interpreting() and unavailable("triton") is None:
    mend_bfloat16()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one implementation for the length of a test."""
    name, _, isa = request.param.partition("-")
    if isa:
        if reason := native.missing():
            pytest.skip(reason)
        if isa not in ("portable", *native.info()["cpu"]["features"]):
            pytest.skip(f"this machine has no {isa}")
        native.force_isa(isa)
    with backend(name):
        yield request.param
    if isa:
        native.force_isa(None)


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force the reference or the Triton kernels, on the GPU or in the interpreter."""
    if reason := unavailable(request.param):
        pytest.skip(reason)
    with backend(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run."""
    return DEVICE
