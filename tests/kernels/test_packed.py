"""Products with bitmap, N:M and CSR weights on every backend, and the registration of their ops."""

from itertools import product

import numpy as np
import pytest
import sparc3_kernels as kernels
import torch
from packed_weights import (
    FLOATS,
    PATTERNS,
    SHAPES,
    assert_close_to_exact,
    assert_same_bits,
    linears,
    nm_weight,
    sparse,
)
from torch import Tensor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(packed_implementation: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    for dtype, batch in product(FLOATS, ((), (1,), (2, 3), (17,), (0,))):
        weight = sparse(*shape, 0.6, dtype, seed=3)
        bias = torch.randn(shape[0], generator=generator).to(dtype)
        x = torch.randn(*batch, shape[1], generator=generator).to(dtype)
        for linear in linears(weight).values():
            assert_close_to_exact(linear(x, None), x, weight, None)
            assert_close_to_exact(linear(x, bias), x, weight, bias)


@pytest.mark.parametrize("batch", [2, 3, 5, 7, 8, 9, 16, 17, 25, 40])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_odd_batches(packed_implementation: str, batch: int, sparsity: float) -> None:
    """Strips of 8 and 16 vectors, full or not, and panels of rows in several blocks of columns, the last one odd."""
    generator = torch.Generator().manual_seed(batch)
    for dtype, (rows, columns) in product(FLOATS, ((19, 773), (33, 384), (1, 385))):
        weight = sparse(rows, columns, sparsity, dtype, seed=batch)
        x = torch.randn(batch, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        for linear in linears(weight).values():
            assert_close_to_exact(linear(x, bias), x, weight, bias)


@pytest.mark.parametrize("batch", [3, 5, 17])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (5, 7)])
def test_odd_batches_of_nm(packed_implementation: str, n: int, m: int, batch: int) -> None:
    """The same for N:M, in groups that end with a block of columns and groups that lie across its end."""
    for dtype in FLOATS:
        weight = nm_weight(19, 111, n, m, dtype)
        x = torch.randn(batch, 111 * m, generator=torch.Generator().manual_seed(n)).to(dtype)
        assert_close_to_exact(linears(weight, n, m)["nm"](x, None), x, weight, None)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_nm_linear(packed_implementation: str, n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype, (rows, groups) in product(FLOATS, ((3, 41), (1, 1), (9, 33), (0, 4), (2, 0))):
        weight = nm_weight(rows, groups, n, m, dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        for batch in ((), (1,), (5,), (0,)):
            x = torch.randn(*batch, groups * m, generator=generator).to(dtype)
            for linear in linears(weight, n, m).values():
                assert_close_to_exact(linear(x, bias), x, weight, bias)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 16, 33, 64, 200])
def test_every_batch_gives_the_same_rows(
    packed_implementation: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers in fp32 are exact in any order: any row mixed up with another is seen, in panels of 16 rows too."""
    monkeypatch.setattr("sparc3_kernels.packed.PANEL_ROWS", 16)
    monkeypatch.setattr("sparc3_kernels.packed.DENSE_BATCH", 64)
    weight = nm_weight(67, 75, 2, 4, torch.float32).mul_(8).round_()
    x = torch.randint(-9, 9, (batch, 300), generator=torch.Generator().manual_seed(batch)).float()
    for linear in linears(weight, 2, 4).values():
        assert torch.equal(linear(x, None), x @ weight.T)
        assert torch.equal(linear(x, x.new_ones(67)), x @ weight.T + 1)


def test_linear_takes_views(packed_implementation: str) -> None:
    weight = sparse(9, 36, 0.5, torch.float32)
    x = torch.randn(36, 4, generator=torch.Generator().manual_seed(0)).T
    for linear in linears(weight).values():
        assert_close_to_exact(linear(x, None), x, weight, None)


# ---- registration


def op_calls() -> dict[str, tuple[object, ...]]:
    weight = nm_weight(6, 8, 2, 4, torch.float32)
    bitmap, csr, nm = kernels.pack_bitmap(weight), kernels.pack_csr(weight), kernels.pack_nm(weight, 2, 4)
    x, bias = torch.randn(3, 32), torch.randn(6)
    return {
        "pack_bitmap": (weight,),
        "unpack_bitmap": (*bitmap, 32),
        "bitmap_linear": (x, *bitmap, bias),
        "pack_csr": (weight,),
        "unpack_csr": (*csr, 32),
        "csr_linear": (x, *csr, bias),
        "pack_nm": (weight, 2, 4),
        "unpack_nm": (*nm, 2, 4),
        "nm_linear": (x, *nm, 2, 4, bias),
    }


@pytest.mark.parametrize("name", op_calls())
def test_ops_are_registered(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.sparc3, name).default, op_calls()[name])


def test_torch_compile() -> None:
    weight = nm_weight(6, 8, 2, 4, torch.float32)
    bitmap, csr, nm = kernels.pack_bitmap(weight), kernels.pack_csr(weight), kernels.pack_nm(weight, 2, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def model(x: Tensor) -> Tensor:
        return (
            kernels.bitmap_linear(x, *bitmap)
            + kernels.csr_linear(x, *csr)
            + kernels.nm_linear(x.relu(), *nm, 2, 4)
        )

    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    expected = 2 * (x @ weight.T) + x.relu() @ weight.T
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_double_runs_on_the_reference() -> None:
    weight = nm_weight(5, 6, 2, 4, torch.float64)
    x = torch.randn(3, 24, dtype=torch.float64)
    for linear in linears(weight, 2, 4).values():
        np.testing.assert_allclose(linear(x, None), x @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 7])
def test_several_threads(packed_implementation: str, batch: int) -> None:
    """Enough weights for several threads: the same bits as on one, and rows where they belong."""
    weight = nm_weight(1031, 260, 2, 4, torch.bfloat16)
    x = torch.randn(batch, 1040, generator=torch.Generator().manual_seed(2)).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append([linear(x, None) for linear in linears(weight, 2, 4).values()])
            assert_same_bits(kernels.unpack_bitmap(*kernels.pack_bitmap(weight), 1040), weight)
            assert_same_bits(kernels.unpack_csr(*kernels.pack_csr(weight), 1040), weight)
            assert_same_bits(kernels.unpack_nm(*kernels.pack_nm(weight, 2, 4), 2, 4), weight)
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)
        assert_close_to_exact(three, x, weight, None)
