"""Weights for the tests of packed formats, and what must come back."""

from collections.abc import Callable

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
