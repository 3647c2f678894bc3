"""New values for the weights that a mask keeps, so that the layer's outputs stay what they were.

With H = sum x x^T over what a linear receives and W its dense weight [out, in]:

SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) goes through the columns from left to right: it picks what
goes by (w_i / U_ii)^2, U the upper Cholesky factor of (H + lambda)^-1, and lets the columns to the right make up
for each error. Blocks of 128 columns are picked at once, N:M groups one by one.

Least squares takes any mask and finds, for each row, the kept values v that minimise |w x - v x|^2 + lambda |v - w|^2
over the reference tokens: (H + lambda)_KK v_K = (w H + lambda w)_K, K the kept columns. lambda pulls towards the old
values, as few tokens say little of many columns: it is ``RIDGE`` times the mean |x|^2 of a token, so that it counts
less the more tokens there are.
"""

from __future__ import annotations

import torch
from sparc3_kernels.backend import multiplies_bf16
from sparc3_kernels.linear import linear
from sparc3_kernels.select import select_flat, select_nm, select_rows, unpack_bits

from sparc3.inputs import Inputs
from sparc3.select import parse_pattern, pruned_count

_COLUMNS = 128
DAMPING = 0.01
# On development text the best of 0.03 to 3 at 4:8, far better than 1 at 2:4 and level with it at 50 %
# (bench/results/repair-ridge-smollm2.json).
RIDGE = 0.3
# Conjugate gradients stop at this residual, relative to the right-hand side in the preconditioner's norm (below it
# outputs on other text come no closer), or after so many steps.
TOLERANCE = 1e-2
_STEPS, _TINY = 200, 1e-30
# Rows solved in bf16 may end at sqrt(_SLACK) times the tolerance; the others go on in fp32. It falls short of smaller
# tolerances anyway.
_SLACK, _LEAST_IN_BF16 = 2.0, 1e-3
_STILL_GOING = 0.8


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, sparsity: float, pattern: str, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, new values) of one weight by SparseGPT.

    Args:
        weight: [out, in], or [experts, out, in]; not changed.
        gram: [in, in] or [experts, in, in], sum of x x^T.
        sparsity, pattern: "layer" picks among all rows of 128 columns, as published; "row" within each row of them;
            N:M keeps N of every M. Exactly floor(s n + 1/2) go, zero weights and columns without input first.
        damping: lambda over the mean of H's diagonal.

    Returns:
        kept, bool, and values, fp32, zero where not kept, of the weight's shape. Columns without input keep their
        values.
    """
    if weight.dim() == 3:
        each = [sparsegpt(*one, sparsity, pattern, damping) for one in zip(weight, gram, strict=True)]
        return torch.stack([kept for kept, _ in each]), torch.stack([values for _, values in each])
    values, old = weight.float().clone(), weight.float()
    group = parse_pattern(pattern)[1]
    width = _COLUMNS // group * group if group else _COLUMNS
    factor, dead = _inverse_factor(gram, damping)
    kept = torch.ones_like(old, dtype=torch.bool)
    for start in range(0, old.shape[1], width):
        block = slice(start, min(start + width, old.shape[1]))
        upper, some = factor[block, block], values[:, block]
        errors = torch.zeros_like(some)
        gone = ~kept[:, block]
        for column in range(some.shape[1]):
            if column % (group or some.shape[1]) == 0:
                part = slice(column, column + (group or some.shape[1]))
                saliency = (some[:, part] / upper.diagonal()[part]).square()
                saliency.masked_fill_(dead[block][part], 0.0)
                saliency.masked_fill_(old[:, block][:, part] == 0, -1.0)
                gone[:, part] = _lowest(saliency, sparsity, pattern, start, old.shape[1])
            error = some[:, column].where(gone[:, column], 0.0) / upper[column, column]
            some[:, column:].addr_(error, upper[column, column:], alpha=-1)
            errors[:, column] = error
        some.masked_fill_(gone, 0.0)
        kept[:, block] = ~gone
        values[:, block.stop :].addmm_(errors, factor[block, block.stop :], alpha=-1)
    return kept, values


def _inverse_factor(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(U with U^T U = (H + lambda)^-1 in fp32, columns that never had an input)."""
    # fp64: an input a thousand times larger than the rest leaves fp32 no digits for the others.
    damped = gram.double()
    dead = damped.diagonal() == 0
    damped = damped + torch.diag(dead.double())
    damped.diagonal().add_(damping * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float(), dead


def _lowest(saliency: torch.Tensor, sparsity: float, pattern: str, start: int, width: int) -> torch.Tensor:
    """Which entries [out, c] of columns start.. of ``width`` go, such that all blocks together are exact."""
    rows, columns = saliency.shape
    kept, group = parse_pattern(pattern)
    if group:
        bits = select_nm(saliency.contiguous(), kept, group)
    elif pattern == "row":
        bits = select_rows(saliency, pruned_count(sparsity, start + columns) - pruned_count(sparsity, start))
    else:
        before = pruned_count(sparsity, rows * start)
        bits = select_flat(saliency, pruned_count(sparsity, rows * (start + columns)) - before)
    return ~unpack_bits(bits, saliency.shape)


def least_squares(
    weight: torch.Tensor,
    kept: torch.Tensor,
    inputs: Inputs,
    damping: float = RIDGE,
    tolerance: float = TOLERANCE,
) -> torch.Tensor:
    """The kept values of one weight that come closest to the dense outputs; see the module.

    Every row has a system of its own, its kept columns of H. Conjugate gradients solve all rows together, one product
    with H a step, where a factorisation would take |K|^3 / 3 operations a row. Where the device multiplies bf16
    faster, H is rounded to it; the residual is then formed in fp32, and rows that are not close enough go on in fp32.

    Args:
        weight: [..., out, in] dense, not changed.
        kept: [..., out, in] bool.
        inputs: with gram.
        damping: lambda over the mean |x|^2 of a token.
        tolerance: of the residual, relative to the right-hand side; sqrt(2) times as much where it is solved in bf16.

    Returns:
        [..., out, in] fp32, zero where not kept. Columns without input keep their values.
    """
    assert inputs.gram is not None
    gram = inputs.gram
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    token = diagonal.sum(-1) / inputs.tokens.clamp_min(1)
    # Of an expert that saw no token nothing is known: any lambda keeps its weights.
    ridge = torch.where(token > 0, damping * token, 1.0)
    if weight.dim() == 2:
        return _conjugate_gradients(weight.float(), kept, gram, ridge, tolerance)
    each = zip(weight.float(), kept, gram, ridge, strict=True)
    return torch.stack([_conjugate_gradients(*one, tolerance) for one in each])


def _conjugate_gradients(
    old: torch.Tensor, given: torch.Tensor, gram: torch.Tensor, ridge: torch.Tensor, tolerance: float
) -> torch.Tensor:
    """``least_squares`` of one [out, in]."""
    # In units of 1 / sqrt(H_jj + lambda) the diagonal is 1, and that is all the preconditioner there is.
    unit = (gram.diagonal() + ridge).rsqrt()
    system = gram * unit
    system.mul_(unit[:, None]).fill_diagonal_(1.0)
    in_bf16 = tolerance >= _LEAST_IN_BF16 and multiplies_bf16(system.device)
    quick = system.bfloat16() if in_bf16 else system
    kept = given.to(old.dtype)
    gone = old / unit
    enough = tolerance**2 * _squares(_product(gone, quick).mul_(kept))
    residual = _product(gone.mul_(1 - kept), quick).mul_(kept)
    before = _squares(residual)
    # The change of the kept values, from zero: where nothing is to be mended they stay as they are, to the last bit.
    change = _steps(quick, kept, residual, enough)
    if in_bf16:
        left = _squares(linear(gone - change, system).mul_(kept))
        # Rounding may cost the system its definiteness, and steps then end anywhere, or in NaN.
        change.masked_fill_(~(left < before), 0.0)
        far = ~(left <= _SLACK * enough).squeeze(-1)
        if far.any():
            some = kept[far]
            residual = linear(gone[far].sub_(change[far]), system).mul_(some)
            change[far] += _steps(system, some, residual, enough[far])
    return torch.addcmul(old, change, unit).mul_(given)


def _steps(
    system: torch.Tensor, kept: torch.Tensor, residual: torch.Tensor, enough: torch.Tensor
) -> torch.Tensor:
    """The change [rows, in] that takes |residual|^2 to ``enough`` [rows, 1]; rows that are there cost no more.

    ``residual`` is used up.
    """
    found, values = torch.empty_like(residual), torch.zeros_like(residual)
    step, size = residual.clone(), _squares(residual)
    rows = torch.arange(len(residual), device=residual.device)
    for _ in range(_STEPS):
        going = (size > enough).squeeze(-1)
        if not going.any():
            break
        # Leaving out a few rows alone is not worth the copies.
        if going.sum() < _STILL_GOING * len(rows):
            found[rows] = values
            rows, values, kept, residual = rows[going], values[going], kept[going], residual[going]
            step, size, enough = step[going], size[going], enough[going]
        image = _product(step, system).mul_(kept)
        length = size / (step * image).sum(-1, keepdim=True).clamp_min(_TINY)
        values.addcmul_(length, step)
        residual.addcmul_(length, image, value=-1)
        before, size = size, _squares(residual)
        step.mul_(size / before.clamp_min(_TINY)).add_(residual)
    found[rows] = values
    return found


def _product(rows: torch.Tensor, system: torch.Tensor) -> torch.Tensor:
    """rows times the symmetric system, fp32."""
    return linear(rows.to(system.dtype), system).float()


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """|row|^2, [rows, 1]."""
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
