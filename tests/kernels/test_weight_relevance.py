"""Weight relevance against an fp64 einsum, within a rounding bound, on every backend and instruction set."""

import pytest
import sparc3_kernels as kernels
import torch
from interpreter import DEVICE
from precision import assert_as_good_as_torch
from sparc3_kernels import native
from sparc3_kernels.backend import forced, multiplies_bf16
from sparc3_kernels.weight_relevance import NATIVE_TOKENS
from torch import Tensor

UNIT = 2.0**-24  # half the distance from 1 to the next fp32 number
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def oracle(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """Return what acc should hold, in fp64, and a bound on the fp32 error of each element.

    A product or sum in fp32 is off by UNIT relative. With M_s = |G_s|^T |X_s|, a dot product over T tokens is off by
    at most (T + 1) UNIT M_s in any order of summation, its square by 2 M_s times that and one rounding, and adding S
    results to acc rounds S partial sums, each at most |acc| + sum_s of the results. Two more cover UNIT^2 terms.
    """
    samples, tokens = g.shape[:2]
    acc, g, x = acc.double(), g.double(), x.double()
    each = torch.einsum("stn,stk->snk", g, x)
    size = torch.einsum("stn,stk->snk", g.abs(), x.abs())
    if reduce == "signed":
        return acc + each.sum(0), (samples * tokens + 3) * UNIT * (acc.abs() + size.sum(0))
    if reduce == "abs":
        return acc + each.abs().sum(0), (samples + tokens + 3) * UNIT * (acc.abs() + size.sum(0))
    if reduce == "square":
        bound = (samples + 2 * tokens + 5) * UNIT * (acc.abs() + size.square().sum(0))
        return acc + each.square().sum(0), bound
    per_token = torch.einsum("stn,stk->nk", g.square(), x.square())
    return acc + per_token, (samples * tokens + 5) * UNIT * (acc.abs() + per_token)


def assert_accumulates(acc: Tensor, g: Tensor, x: Tensor, reduce: str) -> None:
    expected, bound = oracle(acc, g, x, reduce)
    before = acc.double()
    acc_there = acc.to(DEVICE) if forced() == "triton" else acc
    result = kernels.accumulate_weight_relevance_(
        acc_there, g.to(acc_there.device), x.to(acc_there.device), reduce
    )
    assert result is acc_there
    if acc_there.is_cuda:
        # A product of two fp32 numbers as three TF32 ones loses the product of the low parts, 2^-22 of it each; a
        # square of tokens in 16 bit is multiplied in TF32, truncated to 10 bits.
        half = reduce == "token-square" and g.dtype != torch.float32
        bound += (2.0**-9 if half else 2.0**-20) * (bound / UNIT / 3)
    elif reduce == "token-square" and g.dtype == torch.bfloat16 and multiplies_bf16(g.device):
        # bf16 rounds by up to 2^-8: either square, and the sum over tokens, whose terms have one sign.
        bound += 3.1 * 2.0**-8 * (expected - before).abs()
    excess = (result.cpu().double() - expected).abs() - bound
    assert (excess <= 0).all(), f"{(excess > 0).sum()} elements exceed the bound, by up to {excess.max():.3g}"


def operands(samples: int, tokens: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples * 7919 + tokens * 104729 + n * 31 + k)
    acc = torch.randn(n, k, generator=generator)
    g = torch.randn(samples, tokens, n, generator=generator).to(dtype)
    x = torch.randn(samples, tokens, k, generator=generator).to(dtype)
    return acc, g, x


# Tiles are 8x48, 6x16 and 4x8, blocks 72 rows and a multiple of 48 columns, batches 256 tokens.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 8, 48),
    (3, 5, 7, 47),
    (5, 16, 73, 97),
    (40, 7, 25, 50),  # two batches: 36 samples of 7 tokens, then 4
    (3, 200, 30, 20),  # a batch per sample
    (1, 300, 9, 700),  # a sample longer than a batch; two blocks of columns
    # Above the native kernel's range by sample; by token a last batch of fewer.
    (2, NATIVE_TOKENS + 1, 10, 33),
    (64, 1, 130, 260),
]


@pytest.mark.parametrize("reduce", kernels.REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_einsum(implementation_or_triton: str, shape: tuple[int, int, int, int], reduce: str) -> None:
    if implementation_or_triton == "triton" and shape[0] > 3:
        pytest.skip("the interpreter takes 2 ms a sample and tile; packed samples below are many")
    for dtype in FLOATS:
        assert_accumulates(*operands(*shape, dtype), reduce)


@pytest.mark.parametrize("reduce", kernels.REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
# Lengths that are a block of 64, less, more, one and none; columns that are a multiple of 8 take the TMA path.
@pytest.mark.parametrize(("n", "k"), [(136, 40), (33, 130)])
def test_packed_samples(fused: str, device: str, reduce: str, dtype: torch.dtype, n: int, k: int) -> None:
    lengths = torch.tensor([64, 1, 70, 0, 13])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    acc, g, x = operands(1, int(lengths.sum()), n, k, dtype)
    total = kernels.accumulate_weight_relevance_(
        acc.to(device, copy=True), g[0].to(device), x[0].to(device), reduce, bounds.to(device)
    )
    expected, bound = acc.double(), torch.zeros_like(acc, dtype=torch.float64)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        expected, part = oracle(expected, g[:, begin:end], x[:, begin:end], reduce)
        bound += part
    if device == "cuda" and fused == "triton":
        bound *= 2.0**11 if reduce == "token-square" else 8.0
    assert ((total.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("reduce", kernels.REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_as_good_as_torch(implementation_or_triton: str, reduce: str, dtype: torch.dtype) -> None:
    _, g, x = operands(3, 70, 40, 56, dtype)
    device = DEVICE if implementation_or_triton == "triton" else "cpu"
    g_there, x_there = g.to(device), x.to(device)
    # What a user writes: each sample's gradient in the model's dtype, summed up in fp32.
    theirs = torch.zeros(40, 56, device=device)
    for g_s, x_s in zip(g_there, x_there, strict=True):
        if reduce == "token-square":
            theirs += g_s.square().T @ x_s.square()
        else:
            product = g_s.T @ x_s
            theirs += {"signed": product, "abs": product.abs(), "square": product.square()}[reduce]
    zeros = torch.zeros(40, 56)
    ours = kernels.accumulate_weight_relevance_(zeros.to(device, copy=True), g_there, x_there, reduce)
    assert_as_good_as_torch([ours], [theirs], [oracle(zeros, g, x, reduce)[0]])


@pytest.mark.parametrize("reduce", ["abs", "square", "token-square"])
def test_threads_do_not_change_a_bit(implementation: str, reduce: str) -> None:
    # 16 * 20 * 190 * 170 is above the size where the native kernel takes a second thread.
    acc, g, x = operands(16, 20, 190, 170, torch.float32)
    if implementation == "reference":
        pytest.skip("torch's GEMM may block differently for each number of threads")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernels.accumulate_weight_relevance_(acc.clone(), g, x, reduce))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert_accumulates(acc, g, x, reduce)


@pytest.mark.parametrize("reduce", kernels.REDUCTIONS)
def test_strided_operands(implementation_or_triton: str, reduce: str) -> None:
    acc, g, x = operands(6, 10, 21, 34, torch.float32)
    assert_accumulates(
        acc, g.transpose(0, 1).contiguous().transpose(0, 1), x[..., ::2].repeat(1, 1, 2), reduce
    )
    assert_accumulates(acc[:, ::2].contiguous(), g, x[..., ::2], reduce)


@pytest.mark.parametrize("reduce", kernels.REDUCTIONS)
def test_strided_accumulator_is_written_in_place(reduce: str) -> None:
    acc, g, x = operands(3, 5, 34, 21, torch.float32)
    whole = acc.T.contiguous()
    assert_accumulates(whole.T, g, x, reduce)
    assert not torch.equal(whole.T, acc)


@pytest.mark.parametrize("reduce", kernels.REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_nothing_to_add(implementation_or_triton: str, shape: tuple[int, int, int, int], reduce: str) -> None:
    acc, g, x = operands(*shape, torch.float32)
    assert torch.equal(kernels.accumulate_weight_relevance_(acc.clone(), g, x, reduce), acc)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_exactly(implementation_or_triton: str, dtype: torch.dtype) -> None:
    # One token, x = 1: acc is |g| itself, for all finite numbers, with fp32 subnormals flushed and not. Subnormal
    # halves are normal in fp32; subnormal bf16 are subnormal there and may be flushed.
    g = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    g = g[g.isfinite()]
    if implementation_or_triton == "triton":
        g = g[::61]  # the interpreter takes a minute for all of them
    if dtype == torch.bfloat16:
        g = g[(g == 0) | (g.float().abs() >= 2.0**-126)]
    expected = g.float().abs()[:, None]
    one = torch.ones(1, 1, 1, dtype=dtype)
    flushing = torch.set_flush_denormal(True)
    try:
        flushed = kernels.accumulate_weight_relevance_(torch.zeros(len(g), 1), g[None, None], one, "abs")
    finally:
        if flushing:
            torch.set_flush_denormal(False)
    assert torch.equal(flushed, expected)
    acc = kernels.accumulate_weight_relevance_(torch.zeros(len(g), 1), g[None, None], one, "abs")
    assert torch.equal(acc, expected)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nans_are_passed_on(implementation_or_triton: str, value: float) -> None:
    for dtype in FLOATS:
        acc, g, x = operands(2, 3, 9, 10, dtype)
        g[1, 2, 4] = value
        kernels.accumulate_weight_relevance_(acc, g, x, "abs")
        assert not acc[4].isfinite().any()
        assert acc[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_double_precision_on_the_reference() -> None:
    acc, g, x = (a.double() for a in operands(3, 4, 5, 6, torch.float32))
    for reduce in kernels.REDUCTIONS:
        expected, _ = oracle(acc, g, x, reduce)
        result = kernels.accumulate_weight_relevance_(acc.clone(), g, x, reduce)
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


def test_leaves_no_graph_behind(implementation_or_triton: str) -> None:
    acc, g, x = operands(2, 3, 4, 5, torch.float32)
    for reduce in kernels.REDUCTIONS:
        kernels.accumulate_weight_relevance_(acc, g.requires_grad_(), x.requires_grad_(), reduce)
        assert not acc.requires_grad


def test_bad_arguments() -> None:
    acc, g, x = operands(2, 3, 4, 5, torch.float32)
    for arguments, message in (
        ((acc, g, x, "mean"), "reduce is one of signed, abs, square, token-square, got 'mean'"),
        ((acc.T, g, x, "abs"), "shapes must be acc"),
        ((acc, g[0], x, "abs"), "shapes must be acc"),
        ((acc, g[:, :2], x, "abs"), "shapes must be acc"),
        ((acc, g.half(), x, "abs"), "must share a float dtype"),
        ((acc, g.int(), x.int(), "abs"), "must share a float dtype"),
        ((acc.half(), g, x, "abs"), "acc be fp32"),
        ((acc.to("meta"), g, x, "abs"), "must share a device"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.accumulate_weight_relevance_(*arguments)


def test_op_is_registered(implementation_or_triton: str) -> None:
    for reduce in ("signed", "abs"):
        arguments = (*operands(2, 3, 4, 5, torch.float32), reduce)
        torch.library.opcheck(torch.ops.sparc3.accumulate_weight_relevance_.default, arguments)


def test_working_memory_does_not_grow_with_the_weight() -> None:
    if reason := native.missing():
        pytest.skip(reason)
    for sizes in ((1, 16, 8192, 8192), (64, 16, 8192, 28672), (4, NATIVE_TOKENS, 4096, 4096)):
        # Packed operands: 1 MB a thread, by 256 tokens; up to NATIVE_TOKENS tokens 1.5 MB.
        assert native.library().sparc3_weight_relevance_workspace_size(*sizes, 2) <= 3 << 20
