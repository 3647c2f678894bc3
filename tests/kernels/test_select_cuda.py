"""The calls of libsparc3_cuda's selection from Python, into the emulation of its kernels: arguments and statuses.

csrc/tests/cuda_select.cpp tests the kernels themselves; on a machine with a GPU the last test runs them there.
"""

import numpy as np
import pytest
import sparc3_kernels as kernels
import torch
from emulated_cuda import emulate
from sparc3_kernels.backend import unavailable
from test_select import FLOATS, assert_keeps, keep_oracle
from torch import Tensor


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU are taken for those of a device whose library is the emulation."""
    emulate(monkeypatch)


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
