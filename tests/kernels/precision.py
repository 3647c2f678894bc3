"""How exact 16-bit results are, beside those of torch itself in the same dtype."""

import math
from collections.abc import Iterable

from torch import Tensor


def root_mean_square(one: Tensor, exact: Tensor) -> float:
    """Error over all elements, in the unit of the tensors."""
    return (one.detach().cpu().double() - exact).square().mean().sqrt().item()


def assert_as_good_as_torch(
    ours: Iterable[Tensor], theirs: Iterable[Tensor], exact: Iterable[Tensor]
) -> None:
    """Assert that the error of each of our results against fp64 is at most 1.5 times that of torch's.

    The errors are root mean squares. Of n elements that are rounded independently one is off by about 1 / sqrt(2 n),
    so with the thousand elements and more of each test chance moves the ratio of two by a few parts in a hundred.

    Args:
        ours: results of our op in bf16 or fp16 (values in fp32 where the op says so).
        theirs: results of plain torch on the same inputs in the same dtype.
        exact: results in float64 from the same rounded inputs.
    """
    for index, (mine, their, other) in enumerate(zip(ours, theirs, exact, strict=True)):
        error, allowed = root_mean_square(mine, other), 1.5 * root_mean_square(their, other)
        assert error <= allowed < math.inf, f"result {index}: {error:.3g}, more than {allowed:.3g}"
