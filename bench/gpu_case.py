"""What a case of bench/gpu.py is: inputs, what they must give, and who gives it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Implementation = Callable[..., tuple[torch.Tensor, ...]]


@dataclass
class Made:
    """Inputs, what they must give, and who gives it.

    Attributes:
        bytes, flops: the least that any implementation moves and does.
        tolerance: largest relative error (norm over norm) that is timed; bf16 rounds at 2^-8.
        rates: timed without a check, because they do less: what ours is held against.
        short: takes about as long on the GPU as Python takes to launch it, so that it is timed in a CUDA graph.
        dispatch: row of sparc3_kernels.attention.DISPATCH that this case decides, if any.
    """

    inputs: list[Any]
    reference: Implementation
    implementations: dict[str, Implementation]
    bytes: int = 0
    flops: int = 0
    tolerance: float = 2e-2
    rates: dict[str, Implementation] = field(default_factory=dict)
    short: bool = False
    dispatch: str = ""


@dataclass
class Case:
    """A name and a function of (device, dry) that makes the inputs."""

    name: str
    make: Callable[[torch.device, bool], Made]


@functools.cache
def compiled(function: Callable[..., Any], dry: bool) -> Callable[..., Any]:
    """torch.compile, once for each function; a dry run traces alone and needs no compiler."""
    return torch.compile(function, backend="eager" if dry else "inductor")


def on_gpu(device: torch.device) -> bool:
    """Whether a case takes what a GPU has: bf16 and the libraries of CUDA."""
    return device.type == "cuda"


def normal(device: torch.device, *shape: int) -> torch.Tensor:
    """Normal numbers, bf16 on a GPU; fp32 on a CPU, whose Triton interpreter computes on the raw bits of bf16."""
    return torch.randn(*shape, device=device).to(torch.bfloat16 if on_gpu(device) else torch.float32)
