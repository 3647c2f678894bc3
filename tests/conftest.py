"""Triton's kernels run in its interpreter, on tensors of the CPU: said before anything imports triton."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
