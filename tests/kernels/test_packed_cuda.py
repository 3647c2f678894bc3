"""Packed weights in tensor-core order: calls of libsparc3_cuda into the emulation of its kernels, and references.

csrc/tests/cuda_packed.cpp tests the kernels themselves; on a machine with a GPU the last test runs them there.
"""

from itertools import product

import pytest
import sparc3_kernels as kernels
import torch
from emulated_cuda import emulate
from packed_weights import (
    INTEGERS,
    assert_close_to_exact,
    assert_same_bits,
    nm_weight,
    sparse,
    with_specials,
)
from sparc3_kernels import bitmap_cuda, two_of_four_cuda
from sparc3_kernels.backend import unavailable
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
# A single weight, odd sizes, a whole strip and chunk, several of both with a rest, and nothing at all.
SHAPES = ((1, 1), (3, 40), (16, 256), (33, 300), (20, 1027), (0, 5), (3, 0))
SHAPES_2_4 = ((1, 4), (3, 40), (16, 64), (33, 300), (0, 8), (3, 0))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU are taken for those of a device whose library is the emulation."""
    emulate(monkeypatch)


def assert_equal_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        if one.dtype in INTEGERS:
            one, other = one.view(INTEGERS[one.dtype]), other.view(INTEGERS[one.dtype])
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitmap_round_trips(emulated: None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for sparsity in (0.0, 0.5, 0.95, 1.0):
        weight = with_specials(sparse(*shape, sparsity, dtype))
        neutral = kernels.pack_bitmap(weight)
        arranged = bitmap_cuda.arrange_bitmap(*neutral, shape[1])
        assert_same_bits(bitmap_cuda.unpack_arranged_bitmap(*arranged, *shape), weight)
        assert_same_bits(bitmap_cuda.unpack_arranged_bitmap_reference(*arranged, *shape), weight)
        assert_equal_bits(bitmap_cuda.restore_bitmap(arranged, *shape), neutral)


def test_values_that_became_zero_stay_where_they_are(emulated: None) -> None:
    """Half a weight's values underflow when they are cast: their bits stay set."""
    bits, values, offsets = kernels.pack_bitmap(sparse(20, 300, 0.5, torch.bfloat16))
    values[::2] = 0
    arranged = bitmap_cuda.arrange_bitmap(bits, values, offsets, 300)
    assert_equal_bits(bitmap_cuda.restore_bitmap(arranged, 20, 300), (bits, values, offsets))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES_2_4, ids=str)
def test_two_of_four_round_trips(emulated: None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = with_specials(nm_weight(shape[0], shape[1] // 4, 2, 4, dtype))
    if shape[1] > 8:  # the eight special values are two groups too full
        weight.view(-1)[2:4] = weight.view(-1)[6:8] = 0
    neutral = kernels.pack_nm(weight, 2, 4)
    arranged = two_of_four_cuda.arrange_two_of_four(*neutral)
    assert_same_bits(two_of_four_cuda.unpack_arranged_two_of_four(*arranged, *shape), weight)
    assert_same_bits(two_of_four_cuda.unpack_arranged_two_of_four_reference(*arranged, *shape), weight)
    assert_equal_bits(two_of_four_cuda.restore_two_of_four(*arranged, *shape), neutral)


@pytest.mark.parametrize("dtype", HALVES)
def test_linear(emulated: None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    # 65 vectors are unpacked.
    for (rows, columns), batch in product(
        ((3, 40), (33, 300), (5, 0)), ((), (1,), (2, 3), (17,), (65,), (0,))
    ):
        weight = nm_weight(rows, columns // 4, 2, 4, dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        x = torch.randn(*batch, columns, generator=generator).to(dtype)
        arranged = bitmap_cuda.arrange_bitmap(*kernels.pack_bitmap(weight), columns)
        steps = two_of_four_cuda.arrange_two_of_four(*kernels.pack_nm(weight, 2, 4))
        for one in (None, bias):
            for y in (
                bitmap_cuda.arranged_bitmap_linear(x, *arranged, rows, columns, one),
                bitmap_cuda.arranged_bitmap_linear_reference(x, *arranged, rows, columns, one),
                two_of_four_cuda.arranged_two_of_four_linear(x, *steps, rows, columns, one),
                two_of_four_cuda.arranged_two_of_four_linear_reference(x, *steps, rows, columns, one),
            ):
                assert_close_to_exact(y, x, weight, one)


def test_views_are_taken(emulated: None) -> None:
    """Vectors two bytes off, which neither kernel may load as they are, and columns of a matrix."""
    weight = nm_weight(9, 16, 2, 4, torch.bfloat16)
    arranged = bitmap_cuda.arrange_bitmap(*kernels.pack_bitmap(weight), 64)
    steps = two_of_four_cuda.arrange_two_of_four(*kernels.pack_nm(weight, 2, 4))
    many = torch.randn(4 * 64 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    for x in (many[1:].view(4, 64), many[:-1].view(64, 4).T):
        for y in (
            bitmap_cuda.arranged_bitmap_linear(x, *arranged, 9, 64),
            two_of_four_cuda.arranged_two_of_four_linear(x, *steps, 9, 64),
        ):
            assert_close_to_exact(y, x, weight, None)


def test_what_does_not_fit_is_refused(emulated: None) -> None:
    weight = nm_weight(9, 16, 2, 4, torch.bfloat16)
    masks, starts, values, deepest = bitmap_cuda.arrange_bitmap(*kernels.pack_bitmap(weight), 64)
    linear = bitmap_cuda.arranged_bitmap_linear
    x = torch.ones(2, 64).bfloat16()
    steps, places = two_of_four_cuda.arrange_two_of_four(*kernels.pack_nm(weight, 2, 4))
    sparse_linear = two_of_four_cuda.arranged_two_of_four_linear
    for call, message in (
        (lambda: linear(x[:, :63], masks, starts, values, deepest, 9, 64), r"x is \[\.\.\., 64\]"),
        (lambda: linear(x.half(), masks, starts, values, deepest, 9, 64), "must share dtype and device"),
        (
            lambda: linear(x, masks, starts, values, deepest, 17, 64),
            r"masks of a weight \[17, 64\] are int32",
        ),
        (lambda: linear(x, masks, starts[1:], values, deepest, 9, 64), r"starts of .* int32 \[2\]"),
        (lambda: linear(x, masks, starts, values[1:], deepest, 9, 64), "a multiple of 8"),
        (lambda: linear(x, masks, starts, values, deepest, 9, 64, x[0]), r"bias is torch.bfloat16 \[9\]"),
        (lambda: sparse_linear(x[:, :63], steps, places, 9, 64), r"x is \[\.\.\., 64\]"),
        (lambda: sparse_linear(x, steps, places[1:], 9, 64), r"places of .* int32 \[1, 32\]"),
        (lambda: sparse_linear(x, steps[..., :4], places, 9, 64), r"\[1, 2, 32, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", ["arranged_bitmap", "arranged_two_of_four"])
def test_ops_are_registered(emulated: None, name: str) -> None:
    weight = nm_weight(9, 16, 2, 4, torch.bfloat16)
    x, bias = torch.ones(2, 64).bfloat16(), torch.ones(9).bfloat16()
    operands = (
        bitmap_cuda.arrange_bitmap(*kernels.pack_bitmap(weight), 64)
        if name == "arranged_bitmap"
        else two_of_four_cuda.arrange_two_of_four(*kernels.pack_nm(weight, 2, 4))
    )
    torch.library.opcheck(getattr(torch.ops.sparc3, f"{name}_linear").default, (x, *operands, 9, 64, bias))
    torch.library.opcheck(getattr(torch.ops.sparc3, f"unpack_{name}").default, (*operands, 9, 64))


@pytest.mark.skipif(unavailable("cuda") is not None, reason=str(unavailable("cuda")))
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [1, 5, 16, 64, 65])
def test_on_a_gpu(dtype: torch.dtype, batch: int) -> None:
    weight = nm_weight(999, 260, 2, 4, dtype)
    x = torch.randn(batch, 1040, generator=torch.Generator().manual_seed(2)).to(dtype)
    neutral = kernels.pack_bitmap(weight.cuda())
    nm = kernels.pack_nm(weight.cuda(), 2, 4)
    arranged = bitmap_cuda.arrange_bitmap(*neutral, 1040)
    steps = two_of_four_cuda.arrange_two_of_four(*nm)
    assert_close_to_exact(
        bitmap_cuda.arranged_bitmap_linear(x.cuda(), *arranged, 999, 1040).cpu(), x, weight, None
    )
    assert_close_to_exact(
        two_of_four_cuda.arranged_two_of_four_linear(x.cuda(), *steps, 999, 1040).cpu(), x, weight, None
    )
    assert_equal_bits(bitmap_cuda.restore_bitmap(arranged, 999, 1040), neutral)
    assert_equal_bits(two_of_four_cuda.restore_two_of_four(*steps, 999, 1040), nm)
