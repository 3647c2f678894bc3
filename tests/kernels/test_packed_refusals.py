"""What bitmap, N:M and CSR refuse on every backend: damaged weights, and what does not fit together."""

from collections.abc import Callable

import pytest
import sparc3_kernels as kernels
import torch
from packed_weights import nm_weight, sparse
from torch import Tensor


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


def test_csr_columns_out_of_order_are_seen_in_panels(packed_implementation: str) -> None:
    """Several vectors are multiplied with blocks of columns, and a column that comes too late is in none of them."""
    indices, values, offsets = kernels.pack_csr(sparse(4, 1000, 0.5, torch.float32))
    set_last(indices, 0)
    for call in (
        lambda: kernels.csr_linear(torch.ones(2, 1000), indices, values, offsets),
        lambda: kernels.csr_linear(torch.ones(64, 1000), indices, values, offsets),
    ):
        with pytest.raises(ValueError, match="indices of row 3 are not ascending below 1000: column 0"):
            call()


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
