"""Scores and the N:M choice from accumulated relevance, on every backend, against a loop over groups."""

import pytest
import torch
from sparc3_kernels import unpack_bits
from sparc3_kernels.weight_relevance import REDUCTIONS
from sparc3_kernels.weight_score import choose_nm, compress_24, weight_scores_

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def operands(rows, columns, dtype):
    """Few distinct values, so that ties are many; zeros of both signs in the weight; infinities in neither."""
    generator = torch.Generator().manual_seed(rows + columns)
    acc = torch.randint(0, 3, (rows, columns), generator=generator).float()
    weight = torch.randint(-2, 3, (rows, columns), generator=generator).to(dtype)
    weight[0, :8] = torch.tensor([0.0, -0.0, 0.0, 0.0, 1e-7, -1.0, -0.0, 1.0], dtype=dtype)
    acc[0, :4] = torch.tensor([1.0, 2.0, 0.0, -1.0])
    return acc, weight


def expected_scores(acc, weight, reduce):
    wide = weight.double()
    factor = {"signed": wide, "abs": wide.abs()}.get(reduce, wide.square())
    return torch.where(weight == 0, -torch.inf, acc.double() * factor)


def kept_by_hand(acc, weight, reduce, n, m):
    scores = expected_scores(acc, weight, reduce)
    ranking = torch.where(weight == 0, scores, scores.abs()).flatten().tolist()
    keep = []
    for start in range(0, len(ranking), m):
        group = ranking[start : start + m]
        best = sorted(range(m), key=lambda i, group=group: (-group[i], i))[:n]
        keep += [i in best for i in range(m)]
    return torch.tensor(keep).view(acc.shape)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scores(fused, device, dtype, reduce):
    for shape in ((3, 56), (2, 1032)):
        acc, weight = operands(*shape, dtype)
        result = weight_scores_(acc.to(device, copy=True), weight.to(device), reduce).cpu()
        # W^2 and the product are each rounded once in fp32; subnormal squares absolutely.
        torch.testing.assert_close(
            result.double(), expected_scores(acc, weight, reduce), rtol=2.0**-22, atol=1e-38
        )


# One block of 1024 elements and a ragged one; 4, 8 and 16 are the patterns that hardware and kernels know.
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (8, 16), (0, 4), (4, 4), (1, 2)])
@pytest.mark.parametrize("reduce", ["signed", "square"])
def test_choice(fused, device, reduce, n, m):
    for dtype in FLOATS:
        acc, weight = operands(5, 208 if dtype == torch.float32 else 16, dtype)
        before = acc.clone()
        there = acc.to(device)
        bits = choose_nm(there, weight.to(device), reduce, n, m).cpu()
        assert torch.equal(unpack_bits(bits, acc.shape), kept_by_hand(acc, weight, reduce, n, m))
        assert torch.equal(there.cpu(), before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_compressed_pairs_are_the_kept_weights(fused, device, reduce, dtype):
    acc, weight = operands(7, 152, dtype)
    values, places = (t.cpu() for t in compress_24(acc.to(device), weight.to(device), reduce))
    keep = kept_by_hand(acc, weight, reduce, 2, 4)
    # -0 is a zero: the kernel may write either
    assert torch.equal(values, weight[keep].view(7, -1))
    nibbles = torch.stack([places & 15, places >> 4], -1).view(7, -1)
    groups = keep.view(7, -1, 4).int()
    first = groups.argmax(-1)
    second = 3 - groups.flip(-1).argmax(-1)
    assert torch.equal(nibbles.int(), (first | second << 2).int())


def test_shapes_that_no_kernel_takes_fall_back_unless_forced():
    acc, weight = torch.rand(3, 5), torch.randn(3, 5)
    bits = choose_nm(acc, weight, "abs", 2, 5)
    assert torch.equal(unpack_bits(bits, (3, 5)), kept_by_hand(acc, weight, "abs", 2, 5))
    wide = weight_scores_(acc.double(), weight, "abs")
    torch.testing.assert_close(wide, expected_scores(acc, weight, "abs"))


def test_bad_arguments():
    acc, weight = torch.rand(4, 8), torch.randn(4, 8)
    for call, message in (
        (lambda: weight_scores_(acc, weight, "mean"), "reduce is one of"),
        (lambda: weight_scores_(acc, weight[:2], "abs"), "one shape"),
        (lambda: choose_nm(acc, weight, "abs", 5, 4), "0 <= n <= m"),
        (lambda: choose_nm(acc, weight, "abs", 2, 3), "multiple of m"),
        (lambda: compress_24(acc[:, :4], weight[:, :4], "abs"), "multiple of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ops_are_registered(fused, device):
    acc, weight = (t.to(device) for t in operands(3, 16, torch.bfloat16))
    ops = torch.ops.sparc3
    torch.library.opcheck(ops.weight_scores_.default, (acc, weight, "abs"))
    torch.library.opcheck(ops.choose_nm.default, (acc, weight, "square", 2, 4))
    torch.library.opcheck(ops.compress_24.default, (acc, weight, "signed"))
