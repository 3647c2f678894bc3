"""libsparc3_cuda without a GPU: its kernels run on the CPU (csrc/tests/cuda_emulation.h), on tensors of the CPU."""

import contextlib
import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from sparc3_kernels import bitmap_cuda, convert, native, packed_cuda, select, select_native, two_of_four_cuda

CSRC = Path(__file__).parents[1] / "csrc"


@cache
def library() -> ctypes.CDLL:
    """The emulated library, with the signatures of the real one; the functions that ask for devices are not in it."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    sources = [str(file) for file in sorted((CSRC / "cuda").glob("*.cu")) if file.stem != "library"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "libemulated.so"
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DSPARC3_CUDA_EMULATION", f"-I{CSRC / 'include'}"]
        command = ["g++", *flags, "-x", "c++", *sources, "-o", str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        loaded = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in native._SIGNATURES["sparc3_cuda"].items():
        if name not in ("sparc3_cuda_version", "sparc3_cuda_device_count"):
            function = getattr(loaded, name)
            function.restype, function.argtypes = restype, argtypes
    return loaded


@contextlib.contextmanager
def stream_of(device: torch.device) -> Iterator[None]:
    """In place of select_native.stream_of."""
    yield None


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take tensors of the CPU for those of a device whose library is the emulation."""
    if reason := native.missing():
        pytest.skip(reason)
    cpu, cuda = native.library(), library()
    monkeypatch.setattr(native, "library", lambda name="sparc3": cuda if name == "sparc3_cuda" else cpu)
    for module in (select_native, convert, bitmap_cuda, two_of_four_cuda, packed_cuda):
        monkeypatch.setattr(module, "stream_of", stream_of)
    monkeypatch.setattr(select, "choose", lambda op, fits: "cuda" if "cuda" in fits else "reference")
    monkeypatch.setattr(
        packed_cuda, "takes", lambda values, rows, columns: values.dtype in packed_cuda.HALVES
    )
    for module in (bitmap_cuda, two_of_four_cuda):
        monkeypatch.setattr(module, "calls_library", lambda op, device: True)
    monkeypatch.setattr(convert, "_where", lambda op, values: "cuda")
