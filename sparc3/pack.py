"""Packed linears, of dense weights or of others that are packed in another format."""

from __future__ import annotations

import torch
from sparc3_kernels import bitmap_to_csr_indices, bitmap_to_nm, csr_to_bitmap_bits, nm_to_bitmap

from sparc3.errors import InputError
from sparc3.runtime import DTYPES, FORMATS, Packing, SparseLinear

# What a weight that becomes N:M is tried for, when it is not known.
_HALVES = ((2, 4), (4, 8), (8, 16))


def pack_linear(
    weight: torch.Tensor,
    format: str,
    bias: torch.Tensor | None = None,
    n: int = 0,
    m: int = 0,
    name: str = "weight",
    transposed: bool = False,
) -> SparseLinear:
    """The packed linear of a dense weight.

    Args:
        weight: [out, in], fp32, bf16 or fp16, its pruned weights zero.
        format: a key of ``FORMATS``.
        bias: [out] or None.
        n, m: the pattern of format nm.
        name: of the weight, for messages.
        transposed: the model stores the dense weight as [in, out].

    Raises:
        InputError: the weight does not have the pattern, or is of another dtype.
    """
    if weight.dtype not in DTYPES:
        raise InputError(f"{name} is {weight.dtype}; packed weights are float32, bfloat16 or float16")
    try:
        tensors = FORMATS[format].pack_weight(weight.detach(), n, m)
    except ValueError as error:
        raise InputError(f"{name} cannot be packed as {format}: {error}") from error
    shape = (weight.shape[0], weight.shape[1])
    packing = Packing(format, shape, tensors["weight"].numel(), n, m, transposed)
    return _assembled(packing, tensors, bias, name)


def repack_linear(linear: SparseLinear, format: str) -> SparseLinear:
    """The same weight in another format, bit by bit, without the dense weight; ``linear`` is not changed.

    To nm: by the first of 2:4, 4:8 and 8:16 that the weight has.

    Raises:
        InputError: the weight has none of these.
    """
    if format == linear.format:
        return linear
    columns, packing = linear.in_features, linear.packing
    bits, values, offsets = _as_bitmap(linear)
    n = m = 0
    if format == "bitmap":
        tensors = {"weight": values, "bits": bits, "offsets": offsets}
    elif format == "csr":
        indices = bitmap_to_csr_indices(bits, values, offsets, columns)
        tensors = {"weight": values, "indices": indices, "offsets": offsets}
    else:
        tensors, n, m = _as_nm(linear.name, bits, values, offsets, columns)
    packed = Packing(format, packing.shape, tensors["weight"].numel(), n, m, packing.transposed)
    return _assembled(packed, tensors, linear.bias, linear.name)


def _as_bitmap(linear: SparseLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bits, values, offsets)."""
    packing, stored = linear.packing, linear.stored()
    values = stored["weight"]
    if packing.format == "nm":
        return nm_to_bitmap(values, stored["indices"], packing.n, packing.m)
    if packing.format == "bitmap":
        return stored["bits"], values, stored["offsets"]
    bits = csr_to_bitmap_bits(stored["indices"], values, stored["offsets"], linear.in_features)
    return bits, values, stored["offsets"]


def _as_nm(
    name: str, bits: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, columns: int
) -> tuple[dict[str, torch.Tensor], int, int]:
    """(stored tensors, n, m)."""
    reasons = []
    for n, m in _HALVES:
        try:
            grouped, indices = bitmap_to_nm(bits, values, offsets, columns, n, m)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return {"weight": grouped, "indices": indices}, n, m
    raise InputError(f"{name} cannot be packed as nm: {'; '.join(reasons)}")


def _assembled(
    packing: Packing, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None, name: str
) -> SparseLinear:
    linear = FORMATS[packing.format](packing, bias is not None, name, tensors["weight"].dtype, "meta")
    if bias is not None:
        tensors = {**tensors, "bias": bias.detach()}
    linear.load_state_dict(tensors, assign=True)
    return linear
