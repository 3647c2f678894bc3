"""Dense linears on few and many tokens against fp64, within a rounding bound, on every CPU implementation."""

import sys

import pytest
import sparc3_kernels as kernels
import torch
from sparc3_kernels import native
from sparc3_kernels.linear import FEW_TOKENS
from torch import Tensor

UNIT = 2.0**-24  # half the distance from 1 to the next fp32 number

# (tokens, n, k): one token, odd sizes around the group of 16 tokens, the register tiles (8 rows, 16 columns) and the
# chunks of 256 rows, a head that is taller than wide, and more tokens than the library takes.
SHAPES = [
    (1, 1, 1),
    (1, 8, 16),
    (3, 7, 15),
    (15, 9, 17),
    (16, 64, 48),
    (17, 33, 31),
    (FEW_TOKENS, 40, 50),
    (FEW_TOKENS + 1, 40, 50),
    (2, 1300, 5),
    (5, 3, 700),
    (18, 515, 65),
]


def operands(tokens: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 7919 + n * 31 + k)
    x, g = torch.randn(tokens, k, generator=generator), torch.randn(tokens, n, generator=generator)
    return x, g, torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)


def assert_product(result: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """``result`` is a b [+ bias]: a dot product of length L is off by at most (L + 1) UNIT |a| |b| in any order of
    summation, the bias rounds once more; one more covers UNIT^2 terms."""
    expected, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    excess = (result.double() - expected).abs() - (a.shape[1] + 3) * UNIT * size
    assert result.is_contiguous()
    assert (excess <= 0).all(), f"off by up to {excess.max():.3g} too much"


@pytest.fixture(autouse=True)
def no_weight_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run for these small shapes too."""
    monkeypatch.setattr(sys.modules["sparc3_kernels.linear"], "SMALL", 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_match_fp64(implementation: str, shape: tuple[int, int, int]) -> None:
    x, g, w, bias = operands(*shape)
    assert_product(kernels.linear(x, w), x, w.t())
    assert_product(kernels.linear(x, w, bias), x, w.t(), bias)
    assert_product(kernels.input_gradient(g, w), g, w)


def test_strided_operands(implementation: str) -> None:
    # Every second token of a batch, and a weight that is stored transposed, as GPT-2's is.
    x, g, w, _ = operands(12, 20, 24)
    assert_product(kernels.linear(x[::2], w), x[::2], w.t())
    assert_product(kernels.input_gradient(g[::2], w), g[::2], w)
    stored = w.t().contiguous()
    assert_product(kernels.linear(x, stored.t()), x, w.t())
    assert_product(kernels.input_gradient(g, stored.t()), g, w)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(implementation: str, shape: tuple[int, int, int]) -> None:
    x, g, w, _ = operands(*shape)
    assert torch.equal(kernels.linear(x, w), torch.zeros(shape[0], shape[1]))
    assert torch.equal(kernels.input_gradient(g, w), torch.zeros(shape[0], shape[2]))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -0.0, 1e-40, 3e38])
def test_extreme_values_stay_with_their_token(implementation: str, value: float) -> None:
    x, g, w, _ = operands(20, 9, 18)
    x[3, 5] = g[3, 5] = value
    for result, a, b in ((kernels.linear(x, w), x, w.t()), (kernels.input_gradient(g, w), g, w)):
        others = torch.arange(len(a)) != 3
        assert_product(result[others], a[others], b)
        # In fp32 what is out of range is infinite, whatever the order of summation.
        expected = (a[3].double() @ b.double()).float()
        assert torch.equal(result[3].isnan(), expected.isnan())
        assert torch.equal(result[3].isinf() & (result[3] > 0), expected.isinf() & (expected > 0))


@pytest.mark.parametrize("shape", [(16, 1100, 70), (20, 257, 900)], ids=str)
def test_bits_do_not_depend_on_threads(implementation: str, shape: tuple[int, int, int]) -> None:
    if implementation == "reference":
        pytest.skip("torch's own products make no such promise")
    x, g, w, _ = operands(*shape)
    library, (tokens, n, k) = native.library(), shape
    found = []
    for threads in (1, 2, 3, 7):
        y, dx = torch.empty(tokens, n), torch.empty(tokens, k)
        work = native.workspace(library.sparc3_dense_linear_workspace_size(tokens, k))
        arguments = (tokens, n, k, y.data_ptr(), threads, work.data_ptr(), work.numel())
        native.check(library.sparc3_dense_linear(x.data_ptr(), w.data_ptr(), *arguments))
        work = native.workspace(library.sparc3_dense_input_gradient_workspace_size(tokens, n, k))
        arguments = (tokens, n, k, dx.data_ptr(), threads, work.data_ptr(), work.numel())
        native.check(library.sparc3_dense_input_gradient(g.data_ptr(), w.data_ptr(), *arguments))
        found.append((y, dx))
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(dx, found[0][1])


def test_other_dtypes_run_in_torch() -> None:
    x, g, w, bias = (a.double() for a in operands(5, 6, 7))
    assert torch.equal(kernels.linear(x, w, bias), torch.nn.functional.linear(x, w, bias))
    assert torch.equal(kernels.input_gradient(g, w), g @ w)
    x, g, w, bias = (a.bfloat16() for a in (x, g, w, bias))
    assert torch.equal(kernels.linear(x, w, bias), torch.nn.functional.linear(x, w, bias))
    assert torch.equal(kernels.input_gradient(g, w), g @ w)


def test_bad_arguments() -> None:
    x, g, w, _ = operands(2, 3, 4)
    for function, arguments in (
        (kernels.linear, (g, w)),
        (kernels.linear, (x[0], w)),
        (kernels.linear, (x.double(), w)),
        (kernels.input_gradient, (x, w)),
        (kernels.input_gradient, (g, w[0])),
    ):
        with pytest.raises(ValueError, match="shapes must be"):
            function(*arguments)


def test_ops_are_registered(implementation: str) -> None:
    x, g, w, bias = operands(2, 3, 4)
    torch.library.opcheck(torch.ops.sparc3.linear.default, (x, w, bias))
    torch.library.opcheck(torch.ops.sparc3.input_gradient.default, (g, w))
