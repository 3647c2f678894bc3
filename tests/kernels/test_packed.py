"""Bitmap, N:M and CSR on every backend: layouts worked out by hand, round trips bit by bit, products, refusals."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import sparc3_kernels as kernels
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# Odd widths, one word, words and a rest, more than one unrolled step of any kernel, and nothing at all.
SHAPES = (
    (0, 5),
    (3, 0),
    (1, 1),
    (2, 31),
    (3, 32),
    (5, 33),
    (7, 100),
    (4, 128),
    (3, 129),
    (2, 1027),
    (70, 516),
)
SPARSITIES = (0.0, 0.3, 0.5, 0.95, 1.0)


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, pruned at random, with every special value among those kept."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight.masked_fill_(torch.rand(rows, columns, generator=generator) < sparsity, 0)


def with_specials(weight: Tensor) -> Tensor:
    """Put NaN (with a payload), infinities, the least subnormal, the largest finite and -0 at the start."""
    flat = weight.clone().view(-1)
    info = torch.finfo(weight.dtype)
    special = [float("nan"), float("inf"), -float("inf"), info.max, -info.max, -0.0]
    if flat.numel() > 8:
        flat[:6] = torch.tensor(special, dtype=torch.float64).to(weight.dtype)
        flat.view(INTEGERS[weight.dtype])[6] = 1
        flat.view(INTEGERS[weight.dtype])[7] = -2
    return flat.view(weight.shape)


def nm_weight(rows: int, groups: int, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """N:M with exactly n kept in most groups and fewer in every third."""
    generator = torch.Generator().manual_seed(17 * n + m)
    score = torch.rand(rows, groups, m, generator=generator)
    kept = score >= score.topk(n, dim=2).values[..., -1:]
    weight = torch.randn(rows, groups, m, generator=generator).to(dtype) * kept
    weight[:, ::3, 0] = 0
    return weight.view(rows, groups * m)


def assert_same_bits(actual: Tensor, weight: Tensor) -> None:
    """Every nonzero bit by bit, zeros as +0."""
    integers = INTEGERS[weight.dtype]
    expected = weight.view(integers).masked_fill(weight == 0, 0)
    assert actual.dtype == weight.dtype
    assert torch.equal(actual.view(integers), expected)


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


PATTERNS = (
    (1, 1),
    (1, 2),
    (2, 3),
    (1, 4),
    (2, 4),
    (3, 4),
    (5, 7),
    (1, 8),
    (4, 8),
    (3, 12),
    (8, 16),
    (16, 16),
)


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


# ---- products

Linear = Callable[[Tensor, Tensor | None], Tensor]


def linears(weight: Tensor, n: int = 0, m: int = 0) -> dict[str, Linear]:
    """y(x, bias) of each format that can hold `weight`."""
    bitmap, csr = kernels.pack_bitmap(weight), kernels.pack_csr(weight)
    found: dict[str, Linear] = {
        "bitmap": lambda x, bias: kernels.bitmap_linear(x, *bitmap, bias),
        "csr": lambda x, bias: kernels.csr_linear(x, *csr, bias),
    }
    if m:
        nm = kernels.pack_nm(weight, n, m)
        found["nm"] = lambda x, bias: kernels.nm_linear(x, *nm, n, m, bias)
    return found


def assert_close_to_exact(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within the error of fp32 sums in any order, gamma_K sum |w x|, and one rounding to the dtype of y."""
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    terms, unit = weight.shape[1] + 2, 2.0**-24
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[y.dtype]
    tiny = torch.finfo(y.dtype).tiny * 2.0**-10  # fp16 rounds subnormal results to a multiple of 2^-24
    bound = terms * unit / (1 - terms * unit) * magnitude * (1 + rounding) + rounding * exact.abs() + tiny
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    assert bool(((y.double() - exact).abs() <= bound).all())


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


# ---- refusals


def bitmap_and(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...] | None]) -> tuple[Tensor, ...]:
    packed = kernels.pack_bitmap(sparse(4, 40, 0.5, torch.float32))
    return change(*packed) or packed


def csr_and(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...] | None]) -> tuple[Tensor, ...]:
    packed = kernels.pack_csr(sparse(4, 40, 0.5, torch.float32))
    return change(*packed) or packed


def swap(offsets: Tensor) -> None:
    offsets[1:3] = offsets[1:3].flip(0)


def set_last(tensor: Tensor, value: int) -> None:
    tensor.view(-1)[-1] = value


BAD_BITMAPS: dict[str, tuple[Callable[..., tuple[Tensor, ...] | None], str]] = {
    "truncated values": (lambda b, v, o: (b, v[:-1], o), r"offsets end at \d+, but there are \d+ values"),
    "offsets out of order": (lambda b, v, o: swap(o), "offsets are out of order: .* at row 1, .* at row 2"),
    "offsets start": (lambda b, v, o: (b, v, o + 1), "offsets start at 1"),
    "huge offsets": (lambda b, v, o: (b, v, o << 60), "offsets"),
    "a bit too many": (lambda b, v, o: (b | 1 << 3, v, o), r"bits and offsets disagree: row \d has"),
    "no bits": (lambda b, v, o: (b & 0, v, o), "bits and offsets disagree: row 0 has 0 bits set"),
    "bits moved between rows": (lambda b, v, o: (b.flip(0), v, o), "bits and offsets disagree: row 0"),
}


@pytest.mark.parametrize("name", BAD_BITMAPS)
def test_corrupt_bitmaps(packed_implementation: str, name: str) -> None:
    change, message = BAD_BITMAPS[name]
    packed = bitmap_and(change)
    for call in (
        lambda: kernels.check_bitmap(*packed, 40),
        lambda: kernels.unpack_bitmap(*packed, 40),
        lambda: kernels.bitmap_linear(torch.ones(40), *packed),
        lambda: kernels.bitmap_linear(torch.ones(64, 40), *packed),
        lambda: kernels.bitmap_to_csr_indices(*packed, 40),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_bits_beyond_the_columns(packed_implementation: str) -> None:
    bits, values, offsets = kernels.pack_bitmap(sparse(2, 64, 0.5, torch.float32) + 1)
    for call in (
        lambda: kernels.unpack_bitmap(bits, values, offsets, 50),
        lambda: kernels.bitmap_linear(torch.ones(50), bits, values, offsets),
        lambda: kernels.bitmap_linear(torch.ones(64, 50), bits, values, offsets),
    ):
        with pytest.raises(ValueError, match="bits of row 0 are set beyond its 50 columns"):
            call()


BAD_CSR: dict[str, tuple[Callable[..., tuple[Tensor, ...] | None], str]] = {
    "truncated values": (
        lambda i, v, o: (i[:-1], v[:-1], o),
        r"offsets end at \d+, but there are \d+ values",
    ),
    "offsets out of order": (lambda i, v, o: swap(o), "offsets are out of order"),
    "huge offsets": (lambda i, v, o: (i, v, o << 60), "offsets"),
    "a column too high": (
        lambda i, v, o: set_last(i, 40),
        "indices of row 3 are not ascending below 40: column 40",
    ),
    "columns not ascending": (
        lambda i, v, o: set_last(i, 0),
        "indices of row 3 are not ascending below 40: column 0",
    ),
}


@pytest.mark.parametrize("name", BAD_CSR)
def test_corrupt_csr(packed_implementation: str, name: str) -> None:
    change, message = BAD_CSR[name]
    packed = csr_and(change)
    for call in (
        lambda: kernels.check_csr(*packed, 40),
        lambda: kernels.unpack_csr(*packed, 40),
        lambda: kernels.csr_to_bitmap_bits(*packed, 40),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_corrupt_csr_products_stay_inside(packed_implementation: str) -> None:
    """A column out of range or offsets that lie must not be read; an order that lies may give any product."""
    for name in ("truncated values", "offsets out of order", "huge offsets", "a column too high"):
        change, message = BAD_CSR[name]
        packed = csr_and(change)
        for batch in (1, 64):
            with pytest.raises(ValueError, match=message):
                kernels.csr_linear(torch.ones(batch, 40), *packed)


def test_weights_that_are_not_nm(packed_implementation: str) -> None:
    weight = nm_weight(6, 9, 2, 4, torch.float32)
    weight[4, 20:24] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    weight[5, :4] = 1
    with pytest.raises(ValueError, match="the weight is not 2:4: row 4, columns 20 to 23 hold 3 nonzeros"):
        kernels.pack_nm(weight, 2, 4)
    with pytest.raises(ValueError, match="5:7 does not divide a row of 36"):
        kernels.pack_nm(weight, 5, 7)
    for n, m in ((0, 4), (5, 4), (8, 17)):
        with pytest.raises(ValueError, match=f"{n}:{m} needs 1 <= N <= M <= 16"):
            kernels.pack_nm(weight, n, m)


@pytest.mark.parametrize(
    ("n", "m", "byte", "message"),
    [
        (2, 4, 0b0100_0101, r"row 1, group 0 are \[1, 1\], not ascending below 4"),
        (2, 3, 0b0100_1101, r"row 1, group 0 are \[1, 3\], not ascending below 3"),
        (2, 12, 0xC1, r"row 1, group 0 are \[1, 12\], not ascending below 12"),
        (2, 12, 0x15, r"row 1, group 0 are \[5, 1\], not ascending below 12"),
    ],
)
def test_corrupt_nm(packed_implementation: str, n: int, m: int, byte: int, message: str) -> None:
    values, indices = kernels.pack_nm(nm_weight(3, 5, n, m, torch.float32), n, m)
    indices[1, 0] = byte
    for call in (
        lambda: kernels.check_nm(values, indices, n, m),
        lambda: kernels.unpack_nm(values, indices, n, m),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_shapes_and_dtypes_that_do_not_fit(packed_implementation: str) -> None:
    weight = nm_weight(4, 10, 2, 4, torch.float32)
    bits, values, offsets = kernels.pack_bitmap(weight)
    indices, _, _ = kernels.pack_csr(weight)
    nm_values, nm_indices = kernels.pack_nm(weight, 2, 4)
    x = torch.ones(2, 40)
    for call, message in (
        (lambda: kernels.pack_bitmap(weight[0]), "only a float matrix can be packed"),
        (lambda: kernels.pack_csr(weight.int()), "only a float matrix can be packed"),
        (lambda: kernels.pack_nm(weight[0], 2, 4), "only a float matrix can be packed"),
        (
            lambda: kernels.unpack_bitmap(bits, values, offsets, 65),
            r"bits of a weight \[4, 65\] are uint8 \[4, 12\]",
        ),
        (lambda: kernels.unpack_bitmap(bits, values, offsets[:-1], 40), r"bits of a weight \[3, 40\]"),
        (lambda: kernels.unpack_bitmap(bits, values, offsets.int(), 40), r"offsets are int64 \[rows \+ 1\]"),
        (lambda: kernels.unpack_bitmap(bits, values.int(), offsets, 40), "values are floats"),
        (lambda: kernels.bitmap_linear(x.half(), bits, values, offsets), "must share dtype and device"),
        (lambda: kernels.bitmap_linear(x[:, :9], bits, values, offsets), r"bits of a weight \[4, 9\]"),
        (
            lambda: kernels.bitmap_linear(x, bits, values, offsets, torch.ones(5)),
            r"bias is torch.float32 \[4\]",
        ),
        (lambda: kernels.bitmap_linear(x[0, 0], bits, values, offsets), "x is"),
        (
            lambda: kernels.unpack_csr(indices[1:], values, offsets, 40),
            r"indices of \d+ values in 40 columns",
        ),
        (lambda: kernels.unpack_csr(indices.int(), values, offsets, 40), "are torch.uint16"),
        (lambda: kernels.nm_linear(x[:, :39], nm_values, nm_indices, 2, 4), r"x is \[\.\.\., 40\]"),
        (lambda: kernels.unpack_nm(nm_values[:, 1:], nm_indices, 2, 4), "a multiple of 2"),
        (lambda: kernels.unpack_nm(nm_values, nm_indices[:, 1:], 2, 4), r"uint8 \[4, 5\]"),
        (lambda: kernels.unpack_nm(nm_values, nm_indices, 2, 8), r"uint8 \[4, 10\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


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
