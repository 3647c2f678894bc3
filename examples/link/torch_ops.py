"""The packed weights as torch ops, without SparC3's models: only sparc3_kernels is imported, for its ops."""

import sparc3_kernels  # noqa: F401
import torch

ops = torch.ops.sparc3
weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
weight[weight.abs() < 0.7] = 0
bits, values, offsets = ops.pack_bitmap(weight)
x = torch.ones(2, 256)
torch.testing.assert_close(ops.bitmap_linear(x, bits, values, offsets), x @ weight.T)
print(f"{values.numel()} of {weight.numel()} weights, {bits.nbytes + values.nbytes} of {weight.nbytes} bytes")
