"""A dense linear and the gradient of its input, without the weight's gradient.

For x [T, K], g [T, N] and W [N, K]:

    linear          y  = x W^T + b   [T, N]
    input_gradient  dx = g W         [T, K]

On the CPU in fp32 torch calls MKL, which reads the weight well below what memory gives where there are few tokens.
The CPU library reads it once, with 16 tokens at a time in registers; beyond `FEW_TOKENS` tokens oneDNN multiplies,
through the op that torch.compile uses for it. Speed of both products on two cores of an AMD EPYC with AVX-512 over
MKL's: 1.7 to 3.4 for 16 tokens (library), 1.1 to 1.3 for 128, 1.05 to 1.15 for 2048 (oneDNN).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparc3_kernels import native
from sparc3_kernels.backend import choose

FEW_TOKENS = 32
# Elements of a weight below which MKL is faster: it lies in the cache then.
SMALL = 1 << 17


def linear_reference(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Plain torch, any dtype and device."""
    return F.linear(x, w, bias)


def input_gradient_reference(g: Tensor, w: Tensor) -> Tensor:
    """Plain torch, any dtype and device."""
    return torch.mm(g, w)


# ---- native


def _linear_native(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    (tokens, k), n = x.shape, len(w)
    if tokens > FEW_TOKENS:
        return _onednn(x, w, bias)
    library, y = native.library(), x.new_empty(tokens, n)
    work = native.workspace(library.sparc3_dense_linear_workspace_size(tokens, k))
    native.check(
        library.sparc3_dense_linear(
            *(x.data_ptr(), w.data_ptr(), tokens, n, k, y.data_ptr()),
            *(torch.get_num_threads(), work.data_ptr(), work.numel()),
        )
    )
    return y if bias is None else y.add_(bias)


def _input_gradient_native(g: Tensor, w: Tensor) -> Tensor:
    (tokens, n), k = g.shape, w.shape[1]
    if tokens > FEW_TOKENS:
        return _onednn(g, w.t(), None)
    library, dx = native.library(), g.new_empty(tokens, k)
    work = native.workspace(library.sparc3_dense_input_gradient_workspace_size(tokens, n, k))
    native.check(
        library.sparc3_dense_input_gradient(
            *(g.data_ptr(), w.data_ptr(), tokens, n, k, dx.data_ptr()),
            *(torch.get_num_threads(), work.data_ptr(), work.numel()),
        )
    )
    return dx


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if _HAS_ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return F.linear(x, w, bias)


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


# ---- ops

torch.library.define("sparc3::linear", "(Tensor x, Tensor w, Tensor? bias) -> Tensor")
torch.library.define("sparc3::input_gradient", "(Tensor g, Tensor w) -> Tensor")


def _in_library(op: str, a: Tensor, w: Tensor) -> bool:
    """Whether a call is the CPU library's, or oneDNN's: fp32, dense and not small; torch does the others well."""
    fits = None if a.device.type == "cpu" else f"the tensors are on {a.device}"
    chosen = choose(op, {"cpu": fits}) == "cpu"
    return chosen and a.dtype == torch.float32 and w.is_contiguous() and w.numel() >= SMALL and len(a) > 0


@torch.library.impl("sparc3::linear", "default")
def _linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if _in_library("linear", x, w):
        return _linear_native(x.contiguous(), w, bias)
    return linear_reference(x, w, bias)


@torch.library.impl("sparc3::input_gradient", "default")
def _input_gradient(g: Tensor, w: Tensor) -> Tensor:
    if _in_library("input_gradient", g, w):
        return _input_gradient_native(g.contiguous(), w)
    return input_gradient_reference(g, w)


@torch.library.register_fake("sparc3::linear")
def _fake_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(w))


@torch.library.register_fake("sparc3::input_gradient")
def _fake_input_gradient(g: Tensor, w: Tensor) -> Tensor:
    return g.new_empty(len(g), w.shape[1])


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, without a gradient.

    Args:
        x: [T, K].
        w: [N, K], of x's dtype and device.
        bias: [N] or None.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, w, w.shape[-1])
    result: Tensor = torch.ops.sparc3.linear(x, w, bias)
    return result


def input_gradient(g: Tensor, w: Tensor) -> Tensor:
    """g W [T, K], contiguous.

    Args:
        g: [T, N] gradient or relevance of the linear's output.
        w: [N, K], of g's dtype and device.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(g, w, len(w))
    result: Tensor = torch.ops.sparc3.input_gradient(g, w)
    return result


def _check(a: Tensor, w: Tensor, width: int) -> None:
    if a.dim() != 2 or w.dim() != 2 or a.shape[1] != width or a.dtype != w.dtype:
        raise ValueError(
            f"shapes must be [T, {width}] beside w {list(w.shape)} in one dtype, got {list(a.shape)}, "
            f"{a.dtype} and {w.dtype}"
        )
