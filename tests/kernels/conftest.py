"""Runs a test body on every backend and instruction set that this machine has."""

from collections.abc import Iterator

import pytest
from sparc3_kernels import backend, native

IMPLEMENTATIONS = ("reference", "cpu-portable", "cpu-avx2", "cpu-avx512")


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
