"""Triton's kernels run in its interpreter, on tensors of the CPU: said before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
