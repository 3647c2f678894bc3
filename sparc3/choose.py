"""What the sweep does with one weight: which values stay, and what the kept ones become."""

from __future__ import annotations

import torch
from sparc3_kernels.select import unpack_bits

from sparc3.errors import InputError
from sparc3.families import Prunable
from sparc3.inputs import Inputs
from sparc3.reconstruct import least_squares, sparsegpt
from sparc3.schedules import activation_score, gblm_score
from sparc3.select import select_within


def choose(
    weight: Prunable,
    inputs: Inputs,
    method: str,
    share: float,
    pattern: str,
    *,
    given: torch.Tensor | None = None,
    gradients: torch.Tensor | None = None,
    samples: int = 1,
    repair: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kept, new values, zero where not kept, in the weight's dtype), both [..., out, in].

    Args:
        inputs: what the weight received; with the second moments for sparsegpt and ``repair``.
        method: wanda | ria | gblm | sparsegpt; not read where the mask is ``given``.
        share: to prune.
        given: [..., out, in] bool, a mask that is chosen already.
        gradients, samples: of gblm, see sparc3.schedules.gblm_score.
        repair: change the kept values by least squares.

    Raises:
        InputError: what the weight received, or a score, is not finite.
    """
    if not inputs.squares.isfinite().all():
        raise InputError(f"the inputs of {weight.name} are not finite; run the model with --dtype float32")
    dense = weight.canonical(weight.weight).detach()
    new = dense
    if given is not None:
        kept = given
    elif method == "sparsegpt":
        assert inputs.gram is not None
        kept, new = sparsegpt(dense, inputs.gram, share, pattern)
    elif method == "gblm":
        assert gradients is not None
        kept = _select(weight.name, gblm_score(weight, inputs, gradients, samples), share, pattern)
    else:
        kept = _select(weight.name, activation_score(weight, inputs, method), share, pattern)
    if repair:
        new = least_squares(dense, kept, inputs)
    return kept, new.to(dense.dtype).masked_fill(~kept, 0)


def _select(name: str, scores: torch.Tensor, share: float, pattern: str) -> torch.Tensor:
    if not (scores.isfinite() | scores.isneginf()).all():
        raise InputError(f"the scores of {name} are not finite; run the model with --dtype float32")
    return unpack_bits(select_within(scores, share, pattern), scores.shape)
