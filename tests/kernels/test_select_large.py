"""Streams that no memory holds, with thresholds known by counting: one chunk fed again and again, merged states."""

import numpy as np
import pytest
import sparc3_kernels as kernels
import torch
from sparc3_kernels import native
from sparc3_kernels.select_native import CpuSelector
from torch import Tensor

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))

CHUNK = 1 << 22


def values(count: int, dtype: torch.dtype) -> Tensor:
    """CHUNK scores 1, 2, ... `count`, each equally often, in turn."""
    return torch.arange(CHUNK).remainder(count).add(1).to(dtype)


def key(value: float) -> int:
    """The key of a non-negative score: its fp32 bits."""
    return int(torch.tensor(value).view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_scores_than_31_bits(dtype: torch.dtype) -> None:
    chunk, last = values(256, dtype), torch.full((7,), 300.0, dtype=dtype)
    each = 1 << 23  # 512 chunks with 2^14 of each value
    for_prune = 100 * each + 12345  # all of 1 to 100, and some of the scores 101
    selector, more = CpuSelector(dtype), True
    while more:
        for part in [chunk] * 512 + [last]:
            assert selector.count(part) == native.OK
        status, more = selector.refine(for_prune)
        assert status == native.OK
    found = selector.threshold
    assert (found.key, found.keep_equal) == (key(101.0), each - 12345)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_counts_beyond_32_bits_by_merging(dtype: torch.dtype) -> None:
    library, chunk, doublings = native.library(), values(4, dtype), 14
    each = 1 << 34  # 2^20 of each of four values, doubled fourteen times
    prune = 2 * each + 5
    selector, more = CpuSelector(dtype), True
    while more:
        assert selector.count(chunk) == native.OK
        for _ in range(doublings):
            other = selector._state.clone()  # as many scores again, counted elsewhere
            native.check(library.sparc3_select_merge(selector._state.data_ptr(), other.data_ptr()))
        status, more = selector.refine(prune)
        assert status == native.OK
    threshold = selector.threshold
    # Keys of fp16 are their own bits in the upper half.
    expected = key(3.0) if dtype == torch.float32 else int(torch.tensor(3.0).half().view(torch.int16)) << 16
    assert (threshold.key, threshold.keep_equal) == (expected, each - 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_difference_of_two_streams(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks of the differences, as if they were there as a whole; fp64 runs on the reference."""
    monkeypatch.setattr(kernels.select, "DIFFERENCE_CHUNK", 4096)
    generator = torch.Generator().manual_seed(3)
    shapes = ((5,), (3, 4000), (0,), (4096,), (13_899,))

    def stream() -> list[torch.Tensor]:  # not whole numbers: bf16 rounds their differences, which makes ties
        return [torch.randn(shape, generator=generator).mul(8).to(dtype) for shape in shapes]

    general, undesired = stream(), stream()
    whole = torch.cat([(a - b).view(-1) for a, b in zip(general, undesired, strict=True)])
    order = np.argsort(-whole.double().numpy(), kind="stable")
    for prune in (0, 1, 13_000, len(whole)):
        expected = np.ones(len(whole), dtype=bool)
        expected[order[len(whole) - prune :]] = False
        bits = list(kernels.select_difference(lambda: zip(general, undesired, strict=True), prune))
        keep = [kernels.unpack_bits(b, g.shape).view(-1) for b, g in zip(bits, general, strict=True)]
        np.testing.assert_array_equal(torch.cat(keep).numpy(), expected)


def test_difference_of_unlike_or_infinite_pairs_is_an_error() -> None:
    one = torch.ones(4)
    for other in (torch.ones(5), torch.ones(4).half()):
        with pytest.raises(ValueError, match=r"pair 1: .* are not alike"):
            list(kernels.select_difference(lambda other=other: [(one, one), (one, other)], 1))
    infinite = torch.tensor([1.0, float("inf"), 2.0, 3.0])
    with pytest.raises(ValueError, match="1 of 4 scores are NaN"):
        list(kernels.select_difference(lambda: [(infinite, infinite)], 1))
