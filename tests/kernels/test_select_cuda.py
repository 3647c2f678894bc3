"""The calls of libsparc3_cuda's selection from Python, into the emulation of its kernels: arguments and statuses.

csrc/tests/cuda_select.cpp tests the kernels themselves; on a machine with a GPU the last test runs them there.
"""

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sparc3_kernels as kernels
import torch
from sparc3_kernels import native, select, select_native
from sparc3_kernels.backend import unavailable
from test_select import FLOATS, assert_keeps, keep_oracle
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("emulated") / "libemulated.so"
    sources = [CSRC / "cuda" / f"select_{part}.cu" for part in ("count", "mask", "rows")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-DSPARC3_CUDA_EMULATION", f"-I{CSRC / 'include'}"]
    command = ["g++", *flags, "-x", "c++", *map(str, sources), "-o", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in native._SIGNATURES["sparc3_cuda"].items():
        if "select" in name:
            function = getattr(loaded, name)
            function.restype, function.argtypes = restype, argtypes
    return loaded


@pytest.fixture
def emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU are taken for those of a device whose library is the emulation."""

    @contextlib.contextmanager
    def stream_of(device: torch.device) -> Iterator[None]:
        yield None

    if reason := native.missing():
        pytest.skip(reason)
    cpu = native.library()
    monkeypatch.setattr(native, "library", lambda name="sparc3": library if name == "sparc3_cuda" else cpu)
    monkeypatch.setattr(select_native, "stream_of", stream_of)
    monkeypatch.setattr(select, "choose", lambda op, fits: "cuda" if "cuda" in fits else "reference")


def some_scores(dtype: torch.dtype, *shape: int) -> Tensor:
    """Signed scores with ties and both zeros."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(*shape, generator=generator)
    return torch.where(scores.abs() < 0.3, 0.0 * scores, (scores * 8).round() / 8).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_flat(emulated: None, dtype: torch.dtype) -> None:
    scores = some_scores(dtype, 37, 501)
    for prune in (0, 1, 9000, scores.numel()):
        assert_keeps(kernels.select_flat(scores, prune), keep_oracle(scores.flatten(), prune))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows(emulated: None, dtype: torch.dtype) -> None:
    for shape in ((12, 300), (11, 77), (0, 5)):
        scores = some_scores(dtype, *shape)
        assert_keeps(kernels.select_rows(scores, shape[1] // 2), keep_oracle(scores, shape[1] // 2))


@pytest.mark.parametrize("dtype", FLOATS)
def test_stream(emulated: None, dtype: torch.dtype) -> None:
    chunks = some_scores(dtype, 20_000).split([1, 7000, 0, 12_000, 999])
    bits = list(kernels.select_stream(lambda: chunks, 11_000))
    keep = [kernels.unpack_bits(b, c.shape) for b, c in zip(bits, chunks, strict=True)]
    np.testing.assert_array_equal(torch.cat(keep).numpy(), keep_oracle(torch.cat(chunks), 11_000))


def test_errors(emulated: None) -> None:
    scores = some_scores(torch.float32, 4, 100)
    scores[2, 5] = float("nan")
    message = "1 of 400 scores are NaN, the first at linear index 205"
    with pytest.raises(ValueError, match=message):
        kernels.select_flat(scores, 200)
    with pytest.raises(ValueError, match=message):
        kernels.select_rows(scores, 50)
    with pytest.raises(ValueError, match=f"tensor 1: {message}"):
        list(kernels.select_stream(lambda: [torch.ones(3), scores], 50))
    passes = iter(range(10))
    with pytest.raises(ValueError, match="changed between two passes"):
        list(kernels.select_stream(lambda: [torch.linspace(-1, 1, 9) * (1 - 0.9 * next(passes))], 4))


@pytest.mark.skipif(unavailable("cuda") is not None, reason=str(unavailable("cuda")))
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    scores = some_scores(dtype, 999, 4097)
    with kernels.backend("cuda"):
        flat = kernels.select_flat(scores.cuda(), 2_000_000).cpu()
        rows = kernels.select_rows(scores.cuda(), 2000).cpu()
    assert_keeps(flat, keep_oracle(scores.flatten(), 2_000_000))
    assert_keeps(rows, keep_oracle(scores, 2000))
