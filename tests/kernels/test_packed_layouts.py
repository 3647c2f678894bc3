"""Bitmap, N:M and CSR on every backend: layouts worked out by hand, and round trips bit by bit."""

from itertools import product

import pytest
import sparc3_kernels as kernels
import torch
from packed_weights import (
    FLOATS,
    INTEGERS,
    PATTERNS,
    SHAPES,
    SPARSITIES,
    assert_same_bits,
    nm_weight,
    sparse,
    with_specials,
)

# ---- layouts


def test_bitmap_layout(packed_implementation: str) -> None:
    weight = torch.zeros(2, 40)
    weight[0, 0], weight[0, 9], weight[0, 39], weight[1, 31], weight[1, 3] = 1, 2, 3, 4, -0.0
    bits, values, offsets = kernels.pack_bitmap(weight)
    assert bits.tolist() == [[1, 2, 0, 0, 128, 0, 0, 0], [0, 0, 0, 128, 0, 0, 0, 0]]
    assert values.tolist() == [1, 2, 3, 4]
    assert offsets.tolist() == [0, 3, 4]


def test_nm_layout(packed_implementation: str) -> None:
    weight = torch.tensor([[0, 5, 0, 6, 0, 0, 0, 0, 0, 0, 0, 7]]).float()
    values, indices = kernels.pack_nm(weight, 2, 4)
    assert values.tolist() == [[5, 6, 0, 0, 0, 7]]
    # places 1, 3 | 0, 1 | 0, 3: 0b01_00_11_01 and 0b11_00
    assert indices.tolist() == [[0b01001101, 0b1100]]
    values, indices = kernels.pack_nm(weight, 3, 12)
    assert values.tolist() == [[5, 6, 7]]
    assert indices.tolist() == [[0x31, 0x0B]]


def test_csr_layout(packed_implementation: str) -> None:
    weight = torch.tensor([[0, 5, 0], [0, 0, 0], [6, 0, 7]]).half()
    indices, values, offsets = kernels.pack_csr(weight)
    assert indices.dtype == torch.uint16
    assert indices.tolist() == [1, 0, 2]
    assert values.tolist() == [5, 6, 7]
    assert offsets.tolist() == [0, 1, 1, 3]
    assert kernels.pack_csr(torch.zeros(1, 65536))[0].dtype == torch.uint16
    wide = torch.zeros(1, 65537)
    wide[0, 65536] = 1
    indices, values, offsets = kernels.pack_csr(wide)
    assert indices.dtype == torch.int32
    assert indices.tolist() == [65536]
    assert torch.equal(kernels.unpack_csr(indices, values, offsets, 65537), wide)


# ---- round trips


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trips(packed_implementation: str, shape: tuple[int, int]) -> None:
    for sparsity, dtype in product(SPARSITIES, FLOATS):
        round_trip(shape, sparsity, dtype)


def round_trip(shape: tuple[int, int], sparsity: float, dtype: torch.dtype) -> None:
    weight = with_specials(sparse(*shape, sparsity, dtype))
    bits, values, offsets = kernels.pack_bitmap(weight)
    assert bits.shape == (shape[0], (shape[1] + 31) // 32 * 4)
    assert values.numel() == (weight != 0).sum()
    kernels.check_bitmap(bits, values, offsets, shape[1])
    assert_same_bits(kernels.unpack_bitmap(bits, values, offsets, shape[1]), weight)
    indices, csr_values, csr_offsets = kernels.pack_csr(weight)
    kernels.check_csr(indices, csr_values, csr_offsets, shape[1])
    assert_same_bits(kernels.unpack_csr(indices, csr_values, csr_offsets, shape[1]), weight)
    # The two share values and offsets, and turn into each other.
    assert torch.equal(csr_values.view(INTEGERS[dtype]), values.view(INTEGERS[dtype]))
    assert torch.equal(csr_offsets, offsets)
    assert torch.equal(kernels.bitmap_to_csr_indices(bits, values, offsets, shape[1]), indices)
    assert torch.equal(kernels.csr_to_bitmap_bits(indices, values, offsets, shape[1]), bits)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_nm_round_trips(packed_implementation: str, n: int, m: int) -> None:
    # 1100 groups: rows longer than the pieces that 2:4 and 4:8 are unpacked in.
    for dtype, (rows, groups) in product(FLOATS, ((3, 21), (1, 1), (0, 4), (2, 0), (3, 1100))):
        weight = nm_weight(rows, groups, n, m, dtype)
        values, indices = kernels.pack_nm(weight, n, m)
        kernels.check_nm(values, indices, n, m)
        assert values.shape == (rows, groups * n)
        assert_same_bits(kernels.unpack_nm(values, indices, n, m), weight)


def test_packing_a_view(packed_implementation: str) -> None:
    weight = nm_weight(24, 6, 2, 4, torch.float32).T.contiguous().T
    assert not weight.is_contiguous()
    assert_same_bits(kernels.unpack_bitmap(*kernels.pack_bitmap(weight), 24), weight)
    assert_same_bits(kernels.unpack_csr(*kernels.pack_csr(weight), 24), weight)
    assert_same_bits(kernels.unpack_nm(*kernels.pack_nm(weight, 2, 4), 2, 4), weight)
