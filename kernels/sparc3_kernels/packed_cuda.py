"""What the packed weights in tensor-core order (bitmap_cuda, two_of_four_cuda) share: calls of libsparc3_cuda."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from sparc3_kernels import native
from sparc3_kernels.backend import choose
from sparc3_kernels.select_native import stream_of

# A kernel reads the weight once for so many vectors; beyond, it is unpacked for a dense product.
FUSED_BATCH = 64
HALVES = (torch.bfloat16, torch.float16)
_MOST = 1 << 30  # rows, columns


def takes(values: Tensor, rows: int, columns: int) -> bool:
    """Whether the CUDA kernels run a weight [rows, columns] with such values, where these are."""
    if values.device.type != "cuda" or values.dtype not in HALVES or max(rows, columns) >= _MOST:
        return False
    return choose("packed weights", {"cuda": None}) == "cuda"


def calls_library(op: str, device: torch.device) -> bool:
    """Whether the CUDA library runs this call of `op`, else the reference does."""
    unfit = None if device.type == "cuda" else f"the tensors are on {device}"
    return choose(op, {"cuda": unfit}) == "cuda"


def multiply(name: str, packed: Any, x: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """y [..., rows] = x W^T + bias by sparc3_cuda_{name}_linear.

    Args:
        name: bitmap | two_of_four.
        packed: its C struct.
        x, bias, rows: as in the public functions.
    """
    library, columns, batch = native.library("sparc3_cuda"), x.shape[-1], x.shape[:-1].numel()
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    with stream_of(x.device) as stream:
        size = getattr(library, f"sparc3_cuda_{name}_linear_workspace_size")(rows, columns, batch)
        work = torch.empty(max(size, 4), dtype=torch.uint8, device=x.device)
        status = getattr(library, f"sparc3_cuda_{name}_linear")(
            *(ctypes.byref(packed), x.data_ptr(), batch, None if bias is None else bias.data_ptr()),
            *(y.data_ptr(), work.data_ptr(), work.numel(), stream),
        )
    native.check(status)
    return y


def unpack(name: str, packed: Any, weight: Tensor) -> Tensor:
    """Fill `weight` [rows, columns] by sparc3_cuda_{name}_unpack."""
    function = getattr(native.library("sparc3_cuda"), f"sparc3_cuda_{name}_unpack")
    with stream_of(weight.device) as stream:
        native.check(function(ctypes.byref(packed), weight.data_ptr(), stream))
    return weight
