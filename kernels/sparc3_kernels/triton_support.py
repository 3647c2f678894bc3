"""What every Triton kernel here shares: the import, when it fits, the chip's limit, and the one launch.

Triton is optional (a CPU build of torch comes without it): where it is missing, kernels are defined but not run.
All launches go through `launch`, so that a process without a GPU can record and compile what a launcher chooses
(tests/kernels/compile_gate.py). Kernels load into fp32 and compute there; only operands of `tl.dot` stay 16 bit.

Files that define kernels do not postpone annotations: the interpreter knows a `tl.constexpr` by its object.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparc3_kernels.backend import choose, forced


class _Absent:
    """Stands for triton.language: every name in it is None."""

    def __getattr__(self, name: str) -> None:
        return None


tl: Any = _Absent()
TensorDescriptor: Any = None
try:
    import triton
    import triton.language
    from triton.tools import tensor_descriptor
except ImportError:

    def jit(function: Any) -> Any:
        """Leave the kernel as it is; nothing can run it."""
        return function
else:
    tl, jit, TensorDescriptor = triton.language, triton.jit, tensor_descriptor.TensorDescriptor


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Bytes of shared memory that one block may take, by compute capability.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unfit(*tensors: Tensor | None) -> str | None:
    """Return why the Triton kernels cannot take these tensors, or None where they can.

    The interpreter is slow, so it runs only where the backend is forced.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            return f"it takes fp32, bf16 and fp16, not {tensor.dtype}"
        if not (tensor.is_cuda or (interpreting() and forced() == "triton")):
            return f"the tensors are on {tensor.device}"
    return None


def fused(tensor: Tensor) -> bool:
    """Whether ops on tensors like this one run in Triton.

    Raises:
        BackendError: the forced backend cannot run here.
    """
    return choose("fused", {"triton": unfit(tensor)}) == "triton"


@functools.cache
def _chip(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    known = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))
    return capability, getattr(properties, "shared_memory_per_block_optin", known)


def chip(device: torch.device) -> tuple[int, int]:
    """(compute capability such as 90, bytes of shared memory a block may take) of a device."""
    if device.type != "cuda":
        return 90, SHARED_MEMORY[90]
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constexprs: Any
) -> None:
    """Run a kernel on the device of its first tensor."""
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)
    else:
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constexprs)


def first_fit(configurations: Any, shared: int, bytes_of: Callable[[Any], int]) -> Any:
    """The first configuration (best first) whose shared memory fits; the last one where none does."""
    for configuration in configurations:
        if bytes_of(configuration) <= shared:
            return configuration
    return configurations[-1]


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)
