"""Conversion between packed formats: what packing the unpacked weight gives, bit by bit, on every backend."""

import hypothesis.strategies as st
import pytest
import sparc3_kernels as kernels
import torch
from emulated_cuda import emulate
from hypothesis import HealthCheck, given, settings
from packed_weights import FLOATS, INTEGERS
from sparc3_kernels import bitmap, csr, nm
from torch import Tensor

# One of the implementations is forced for the whole test: that changes nothing between examples.
SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """(weight, n, m): any bits where a weight is kept, so NaN with payloads too, -0 among the zeros, rows that are
    empty or as full as n of m allows, widths that end within a word."""
    m = draw(st.integers(1, 16))
    n = draw(st.integers(1, m))
    rows, groups = draw(st.integers(0, 5)), draw(st.integers(0, 70))
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    density = torch.tensor(
        draw(st.lists(st.sampled_from((0.0, 0.1, 0.6, 1.0)), min_size=rows, max_size=rows))
    )
    integers = INTEGERS[dtype]
    limits = torch.iinfo(integers)
    bits = torch.randint(limits.min, limits.max + 1, (rows, groups, m), generator=generator).to(integers)
    rank = torch.rand(rows, groups, m, generator=generator).argsort(2).argsort(2)
    kept = (rank < n) & (torch.rand(rows, groups, m, generator=generator) < density.view(-1, 1, 1))
    zeros = torch.where(torch.rand(rows, groups, m, generator=generator) < 0.2, limits.min, 0).to(integers)
    return torch.where(kept, bits, zeros).view(rows, groups * m).view(dtype), n, m


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        integers = INTEGERS.get(one.dtype, one.dtype)
        assert torch.equal(one.view(integers), other.view(integers))


def check(weight: Tensor, n: int, m: int) -> None:
    columns = weight.shape[1]
    bits, values, offsets = as_bitmap = bitmap.pack_bitmap_reference(weight)
    as_csr = csr.pack_csr_reference(weight)
    as_nm = nm.pack_nm_reference(weight, n, m)
    indices = as_csr[0]
    assert_equal((kernels.bitmap_to_csr_indices(bits, values, offsets, columns),), (indices,))
    assert_equal((kernels.csr_to_bitmap_bits(indices, values, offsets, columns),), (bits,))
    assert_equal(kernels.bitmap_to_nm(*as_bitmap, columns, n, m), as_nm)
    assert_equal(kernels.csr_to_nm(*as_csr, columns, n, m), as_nm)
    assert_equal(kernels.nm_to_bitmap(*as_nm, n, m), as_bitmap)
    assert_equal(kernels.nm_to_csr(*as_nm, n, m), as_csr)


@given(case=weights())
@SETTINGS
def test_any_weight(packed_implementation: str, case: tuple[Tensor, int, int]) -> None:
    check(*case)


def test_any_weight_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels, in the emulation."""
    emulate(monkeypatch)

    @given(case=weights())
    @SETTINGS
    def in_the_emulation(case: tuple[Tensor, int, int]) -> None:
        check(*case)

    in_the_emulation()


def wide_weight() -> Tensor:
    """Columns that 16 bits cannot count."""
    weight = torch.zeros(2, 65544, dtype=torch.bfloat16)
    weight[1, [0, 65534, 65535, 65536, 65543]] = torch.arange(1.0, 6.0).bfloat16()
    return weight


def test_wide_rows(packed_implementation: str) -> None:
    check(wide_weight(), 2, 4)


def test_wide_rows_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    check(wide_weight(), 2, 4)


def test_many_rows_in_threads() -> None:
    """More than the million weights from which several threads share the rows."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(1100, 1024, generator=generator)
    weight.view(-1, 4)[:, 1:3] = 0
    check(weight, 2, 4)


def test_kept_zeros() -> None:
    """Values that became zero in a cast keep their place in bitmap and CSR and free it in N:M."""
    bits, values, offsets = kernels.pack_bitmap(torch.tensor([[1.0, 2, 0, 0], [3, 0, 4, 5]]))
    values[1] = values[3] = 0
    indices = kernels.bitmap_to_csr_indices(bits, values, offsets, 4)
    assert indices.tolist() == [0, 1, 0, 2, 3]
    weight = kernels.unpack_bitmap(bits, values, offsets, 4)
    assert_equal(kernels.bitmap_to_nm(bits, values, offsets, 4, 2, 4), kernels.pack_nm(weight, 2, 4))


def refusals() -> None:
    weight = torch.zeros(3, 40)
    weight[1, 8:11] = torch.tensor([1.0, 2.0, 3.0])
    bits, values, offsets = kernels.pack_bitmap(weight)
    indices = kernels.pack_csr(weight)[0]
    too_full = "the weight is not 2:4: row 1, columns 8 to 11 hold 3 nonzeros"
    for call, message in (
        (lambda: kernels.bitmap_to_nm(bits, values, offsets, 40, 2, 4), too_full),
        (lambda: kernels.csr_to_nm(indices, values, offsets, 40, 2, 4), too_full),
        (lambda: kernels.bitmap_to_nm(bits, values, offsets, 40, 2, 3), "2:3 does not divide a row of 40"),
        (lambda: kernels.bitmap_to_nm(bits, values, offsets, 40, 3, 2), "needs 1 <= N <= M <= 16"),
        (lambda: kernels.bitmap_to_nm(bits, values, offsets, 72, 2, 4), r"bits of a weight \[3, 72\]"),
        (
            lambda: kernels.bitmap_to_nm(bits, values[:2], offsets, 40, 2, 4),
            "offsets end at 3, but there are 2",
        ),
        (
            lambda: kernels.bitmap_to_nm(bits | 1, values, offsets, 40, 3, 4),
            "row 0 has .* bits set and 0 values",
        ),
        (
            lambda: kernels.nm_to_bitmap(*(torch.ones(1, 2), torch.tensor([[0b0101]]).byte()), 2, 4),
            r"indices of row 0, group 0 are \[1, 1\], not ascending",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_does_not_fit_is_refused(packed_implementation: str) -> None:
    refusals()


def test_a_device_refuses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    refusals()
