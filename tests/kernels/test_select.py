"""Selection against a sort by (score, index) in numpy, bit for bit, on every backend and instruction set."""

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import sparc3_kernels as kernels
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Every value is exact in each dtype but the fp32 subnormal; bf16 and fp16 round it to a zero.
ADVERSARIAL = (0.0, -0.0, 1.0, -1.0, 1.0078125, 6.1e-5, -6.0e-8, 1e-40, float("inf"), float("-inf"), 65504.0)
# The fixture forces one implementation for all examples of a test, which is what it should do.
EXAMPLES = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def keep_order(scores: Tensor) -> np.ndarray:
    """Indices along the last dimension: the highest score first, among equals the first one."""
    return np.argsort(-scores.detach().double().numpy(), axis=-1, kind="stable")


def keep_first(order: np.ndarray, prune: int) -> np.ndarray:
    keep = np.ones(order.shape, dtype=bool)
    np.put_along_axis(keep, order[..., order.shape[-1] - prune :], False, axis=-1)
    return keep


def keep_oracle(scores: Tensor, prune: int) -> np.ndarray:
    return keep_first(keep_order(scores), prune)


def assert_keeps(bits: Tensor, expected: np.ndarray) -> None:
    assert bits.dtype == torch.uint8
    np.testing.assert_array_equal(bits.numpy(), np.packbits(expected.reshape(-1), bitorder="little"))


@st.composite
def scores_1d(draw: st.DrawFn, max_size: int = 200) -> Tensor:
    pool = draw(st.lists(st.sampled_from(ADVERSARIAL) | st.floats(-2, 2, width=16), min_size=1, max_size=12))
    values = draw(st.lists(st.sampled_from(pool), max_size=max_size))
    if draw(st.booleans()):
        values = sorted(values, reverse=draw(st.booleans()))
    return torch.tensor(values, dtype=draw(st.sampled_from(FLOATS)))


@EXAMPLES
@given(scores=scores_1d(), share=st.floats(0, 1))
def test_flat_equals_a_stable_sort(implementation: str, scores: Tensor, share: float) -> None:
    prune = round(share * scores.numel())
    assert_keeps(kernels.select_flat(scores, prune), keep_oracle(scores, prune))


@EXAMPLES
@given(scores=scores_1d(), cols=st.integers(1, 40), share=st.floats(0, 1))
def test_rows_equal_a_stable_sort(implementation: str, scores: Tensor, cols: int, share: float) -> None:
    matrix = scores[: scores.numel() // cols * cols].view(-1, cols)
    prune = round(share * cols)
    assert_keeps(kernels.select_rows(matrix, prune), keep_oracle(matrix, prune))


@EXAMPLES
@given(scores=scores_1d(max_size=400), group=st.integers(1, 32), data=st.data())
def test_groups_equal_a_stable_sort(
    implementation: str, scores: Tensor, group: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(0, group))
    matrix = scores[: scores.numel() // group * group].view(1, -1)
    expected = keep_oracle(matrix.view(-1, group), group - keep)
    assert_keeps(kernels.select_nm(matrix, keep, group), expected)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 24, 32])
def test_groups_of_every_size_across_threads(implementation: str, group: int) -> None:
    # 9 values only, so that most groups have ties; above 2^17 scores several threads work.
    scores = torch.randint(-4, 5, (37, 3553 // group * group), generator=torch.Generator().manual_seed(group))
    for keep in {0, 1, group // 2, group}:
        expected = keep_oracle(scores.view(-1, group), group - keep)
        assert_keeps(kernels.select_nm(scores.float(), keep, group), expected)


SIZE = (1 << 17) + 37  # from 2^17 on the threshold is guessed from a sample, and several threads work


def sampled_places(n: int) -> Tensor:
    """Where csrc/cpu/select_resident.cpp takes its 16384 samples of n scores."""
    i = np.arange(16384, dtype=np.uint64)
    hashed = (i + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    hashed ^= hashed >> np.uint64(32)
    return torch.from_numpy((i * np.uint64(n // 16384) + hashed % np.uint64(n // 16384)).astype(np.int64))


def large_scores(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(SIZE, generator=generator)
    coin = torch.rand(SIZE, generator=generator) < 0.5
    cases = {
        "normal": normal,
        "absolute": normal.abs(),
        "sorted": normal.sort().values,
        "reversed": normal.sort(descending=True).values,
        "all equal": torch.full((SIZE,), -0.25),
        "two values": coin.float(),
        "two zeros": torch.where(coin, 0.0, -0.0),
        "half zeros": torch.where(coin, 0.0, normal.abs()),
        "subnormal": normal * 1e-40,
        "infinite": torch.where(coin, normal, float("inf") * normal.sign()),
        "neighbours": 1 + torch.randint(0, 50, (SIZE,), generator=generator) * 2.0**-23,
        "periodic": torch.arange(SIZE).remainder(17).float(),
        # The sample says nothing about the rest: the guess is wrong on either side.
        "sample above": normal.index_fill(0, sampled_places(SIZE), 1e6),
        "sample below": normal.index_fill(0, sampled_places(SIZE), -1e6),
    }
    return cases[name]


# With 64 threads each has so few bins that a third pass is needed.
@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize(
    "name",
    "normal,absolute,sorted,reversed,all equal,two values,two zeros,half zeros,subnormal,infinite,neighbours,"
    "periodic,sample above,sample below".split(","),
)
def test_flat_of_many_scores(implementation: str, name: str, threads: int) -> None:
    scores, before = large_scores(name), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in FLOATS if name in ("normal", "half zeros", "infinite") else (torch.float32,):
            typed = scores.to(dtype)
            order = keep_order(typed)
            for prune in (0, 1, 1000, SIZE // 3, SIZE // 2, SIZE - 1, SIZE):
                assert_keeps(kernels.select_flat(typed, prune), keep_first(order, prune))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cols", [1, 7, 576, 4099])  # 4099: odd rows straddle bytes and thread parts
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_across_threads(implementation: str, cols: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(cols)
    scores = torch.randn(SIZE // cols + 1, cols, generator=generator)
    scores[::3] = scores[::3].round()  # heavy ties in every third row
    scores[1::3] *= 1e-4
    scores = scores.to(dtype)
    order = keep_order(scores)
    for prune in {0, 1, cols // 2, cols}:
        assert_keeps(kernels.select_rows(scores, prune), keep_first(order, prune))


@EXAMPLES
@given(scores=scores_1d(), cuts=st.lists(st.integers(0, 200), max_size=6), share=st.floats(0, 1))
def test_stream_does_not_depend_on_the_chunks(
    implementation: str, scores: Tensor, cuts: list[int], share: float
) -> None:
    prune = round(share * scores.numel())
    ends = sorted(min(cut, scores.numel()) for cut in cuts)
    chunks = scores.tensor_split(ends)
    bits = list(kernels.select_stream(lambda: iter(chunks), prune))
    keep = [kernels.unpack_bits(b, c.shape) for b, c in zip(bits, chunks, strict=True)]
    np.testing.assert_array_equal(torch.cat(keep).numpy(), keep_oracle(scores, prune))


def test_stream_of_large_and_small_tensors(implementation: str) -> None:
    whole = large_scores("half zeros")
    chunks = [whole[:100_000].view(400, 250), whole[100_000:100_003], whole[100_003:]]
    prune = SIZE // 3  # among the zeros of the first two tensors and a part of the third
    expected = keep_oracle(whole, prune)
    bits = list(kernels.select_stream(lambda: chunks, prune))
    keep = [kernels.unpack_bits(b, c.shape).view(-1) for b, c in zip(bits, chunks, strict=True)]
    np.testing.assert_array_equal(torch.cat(keep).numpy(), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_stream_of_groups_with_and_without_signs(implementation: str, dtype: torch.dtype) -> None:
    """Sixteen scores at a time are counted in one of three ways: equal, none negative, or any."""
    generator = torch.Generator().manual_seed(11)
    scores = torch.randn(400, 16, generator=generator).abs()
    scores[::4, 7] *= -1
    scores[1::4] = scores[1::4, :1]
    scores[2::16, 3:9] = torch.tensor([-0.0, 0.0, 65504.0, 0.0, -0.0, 65504.0])
    flat = scores.to(dtype).view(-1)[:-5]
    for prune in (1, 700, 3200, 6000):
        bits = list(kernels.select_stream(lambda: flat.split(2999), prune))
        keep = [kernels.unpack_bits(b, c.shape) for b, c in zip(bits, flat.split(2999), strict=True)]
        np.testing.assert_array_equal(torch.cat(keep).numpy(), keep_oracle(flat, prune))


def test_stream_holds_one_tensor_at_a_time(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference concatenates, as its docstring says")
    alive: list[weakref.ref[Tensor]] = []

    def chunks() -> Iterator[Tensor]:
        for seed in range(4):
            assert all(chunk() is None for chunk in alive), (
                "a tensor is still held while the next one is made"
            )
            chunk = torch.randn(50, generator=torch.Generator().manual_seed(seed))
            alive.append(weakref.ref(chunk))
            yield chunk
            del chunk

    assert sum(kernels.count_bits(bits) for bits in kernels.select_stream(chunks, 77)) == 123


def test_stream_that_changes_is_an_error(implementation: str) -> None:
    if implementation == "reference":
        pytest.skip("the reference reads the scores once")
    passes = iter(range(10))
    with pytest.raises(ValueError, match="changed between two passes"):
        list(kernels.select_stream(lambda: [torch.linspace(-1, 1, 9) * (1 - 0.9 * next(passes))], 4))


def test_stream_edges(implementation: str) -> None:
    assert list(kernels.select_stream(lambda: [], 0)) == []
    with pytest.raises(ValueError, match="cannot prune 1 of 0"):
        list(kernels.select_stream(lambda: [], 1))
    with pytest.raises(ValueError, match="cannot prune 5 of 4"):
        list(kernels.select_stream(lambda: [torch.ones(4)], 5))
    with pytest.raises(ValueError, match="tensor 1: 1 of 3 scores are NaN, the first at linear index 2"):
        list(kernels.select_stream(lambda: [torch.ones(4), torch.tensor([1.0, 2.0, float("nan")])], 2))
    with pytest.raises(ValueError, match=r"tensor 1 has torch\.float16 scores"):
        list(kernels.select_stream(lambda: [torch.ones(4), torch.ones(4).half()], 2))


NANS = {
    torch.float32: (torch.int32, (0x7FC00000, 0x7F800001, -1)),
    torch.bfloat16: (torch.int16, (0x7FC0, 0x7F81, -1)),
    torch.float16: (torch.int16, (0x7E00, 0x7C01, -1)),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 20, 31, 98, 99])
def test_nan_is_an_error_that_names_the_place(implementation: str, dtype: torch.dtype, place: int) -> None:
    integers, patterns = NANS[dtype]
    for pattern in patterns:
        scores = torch.arange(100.0).to(dtype)
        scores.view(integers)[place] = pattern
        message = f"1 of 100 scores are NaN, the first at linear index {place}"
        for select in (
            lambda s: kernels.select_flat(s, 50),
            lambda s: kernels.select_rows(s.view(4, 25), 12),
            lambda s: kernels.select_nm(s.view(4, 25), 2, 5),
        ):
            with pytest.raises(ValueError, match=message):
                select(scores)


def test_nan_in_a_large_tensor(implementation: str) -> None:
    scores = large_scores("normal")
    scores[SIZE - 1] = float("nan")
    with pytest.raises(ValueError, match=f"1 of {SIZE} scores are NaN, the first at linear index {SIZE - 1}"):
        kernels.select_flat(scores, SIZE // 2)


def test_bad_arguments(implementation: str) -> None:
    scores = torch.ones(4, 6)
    for call, message in (
        (lambda: kernels.select_flat(scores, 25), "cannot prune 25 of 24 scores"),
        (lambda: kernels.select_flat(scores, -1), "cannot prune -1 of 24"),
        (lambda: kernels.select_rows(scores, 7), "cannot prune 7 of 6 scores of a row"),
        (lambda: kernels.select_rows(scores[0], 1), "must be a matrix"),
        (lambda: kernels.select_nm(scores, 2, 4), "2:4 does not divide a row of 6"),
        (lambda: kernels.select_nm(scores, 3, 2), "3:2 needs 0 <= N <= M"),
        (lambda: kernels.select_nm(scores, 1, 0), "1:0 needs"),
        (lambda: kernels.select_nm(torch.ones(2, 66), 1, 33), "1:33 needs"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_empty_and_strided_tensors(implementation: str) -> None:
    assert kernels.select_flat(torch.ones(0), 0).numel() == 0
    assert kernels.select_rows(torch.ones(0, 5), 2).numel() == 0
    assert kernels.select_rows(torch.ones(5, 0), 0).numel() == 0
    assert kernels.select_nm(torch.ones(0, 8), 2, 4).numel() == 0
    scores = torch.randn(12, 9).T  # row-major order of the view, not of the memory
    assert_keeps(kernels.select_flat(scores, 50), keep_oracle(scores.reshape(-1), 50))
    assert_keeps(kernels.select_rows(scores, 5), keep_oracle(scores, 5))
    assert_keeps(kernels.select_nm(scores, 1, 4), keep_oracle(scores.reshape(-1, 4), 3))
    assert_keeps(kernels.select_flat(scores.requires_grad_(), 50), keep_oracle(scores.reshape(-1), 50))


def test_double_scores_run_on_the_reference() -> None:
    scores = torch.tensor([1.0, 1 + 2.0**-50, 1 + 2.0**-51], dtype=torch.float64)
    assert kernels.select_flat(scores, 2).tolist() == [0b010]
    assert [b.tolist() for b in kernels.select_stream(lambda: [scores[:1], scores[1:]], 2)] == [[0], [0b01]]


def test_ops_are_registered(implementation: str) -> None:
    scores = torch.randn(6, 8)
    torch.library.opcheck(torch.ops.sparc3.select_flat.default, (scores, 11))
    torch.library.opcheck(torch.ops.sparc3.select_rows.default, (scores, 3))
    torch.library.opcheck(torch.ops.sparc3.select_nm.default, (scores, 2, 4))


# ---- packed bits


@EXAMPLES
@given(keep=st.lists(st.booleans(), max_size=150), skip=st.integers(0, 9))
def test_pack_and_unpack(keep: list[bool], skip: int) -> None:
    mask = torch.tensor([False] * skip + keep, dtype=torch.bool)[skip:]  # a view that starts anywhere
    bits = kernels.pack_bits(mask)
    assert_keeps(bits, mask.numpy())
    assert torch.equal(kernels.unpack_bits(bits, mask.shape), mask)
    assert kernels.count_bits(bits) == sum(keep)


def test_unpack_refuses_what_does_not_fit() -> None:
    for bits in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"a packed mask for shape \(3, 5\) is uint8 \[2\]"):
            kernels.unpack_bits(bits, (3, 5))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_apply_keeps_every_bit(dtype: torch.dtype, transposed: bool) -> None:
    weight = torch.randn(7, 9).to(dtype)
    weight[0, :5] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, -float("inf")]).to(dtype)
    weight = weight.T.contiguous().T if transposed else weight
    keep = torch.rand(7, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    before = weight.clone()
    assert kernels.apply_bits_(weight, kernels.pack_bits(keep)) is weight
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[weight.element_size()]
    assert torch.equal(weight.view(integers)[keep], before.view(integers)[keep])
    assert (weight.view(integers)[~keep] == 0).all()  # +0, not -0
    parameter = torch.nn.Parameter(torch.ones(7, 9))
    assert kernels.apply_bits_(parameter, kernels.pack_bits(keep)).sum() == keep.sum()
