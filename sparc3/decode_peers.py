"""Every way at hand to multiply a pruned weight with a few vectors: dense, sparse libraries, and ours.

An implementation stores a weight once, copies what it stored, and binds a copy to vectors. Whatever is not the
product itself, as another layout of the vectors, happens there and is not timed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sparc3.errors import InputError
from sparc3.pack import pack_linear

Call = Callable[[], Any]


Bind = Callable[[torch.Tensor], Call]


@dataclass(frozen=True)
class Operand:
    """One weight as an implementation stores it.

    Attributes:
        bytes: that a product reads of it; None where that is not known.
        copy: makes one more copy in memory, and returns x [batch, columns] -> a call without arguments that returns
            the product.
        rows_first: the product is [rows, batch], else [batch, rows].
    """

    bytes: int | None
    copy: Callable[[], Bind]
    rows_first: bool = False


@dataclass(frozen=True)
class Implementation:
    """A way to multiply.

    Attributes:
        name: in tables.
        kind: dense | peer | sparc3 | own.
        prepare: (weight [rows, columns] with zeros, n, m) -> Operand; n and m are 0 but for N:M weights.
        needs_pattern: takes N:M weights only.
    """

    name: str
    kind: str
    prepare: Callable[[torch.Tensor, int, int], Operand]
    needs_pattern: bool = False


def implementations(device: torch.device, own: str | None = None) -> list[Implementation]:
    """What can run on the device; ``own`` is MODULE:FUNCTION, a function (weight) -> (function (x) -> y).

    Raises:
        InputError: there is no such module or function.
    """
    found = [
        Implementation("torch F.linear", "dense", _torch_linear),
        Implementation("torch W @ X", "dense", _torch_product),
        Implementation("torch fp32", "dense", _torch_fp32),
        Implementation("torch CSR fp32", "peer", _torch_csr),
        *(Implementation(f"sparc3 {one}", "sparc3", _ours(one)) for one in ("bitmap", "csr")),
        Implementation("sparc3 nm", "sparc3", _ours("nm"), needs_pattern=True),
    ]
    if device.type == "cuda":
        found.append(Implementation("cuSPARSELt", "peer", _cusparselt, needs_pattern=True))
    else:
        if find_spec("scipy"):
            found.append(Implementation("scipy CSR fp32", "peer", _scipy_csr))
        if find_spec("sparse_dot_mkl"):
            found.append(Implementation("sparse-dot-mkl fp32", "peer", _mkl_csr))
    if own is not None:
        found.append(Implementation(own, "own", _own(own)))
    return found


def _size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _torch_linear(weight: torch.Tensor, n: int, m: int) -> Operand:
    """As a model calls it."""

    def copy() -> Bind:
        own = weight.clone()
        return lambda x: lambda: F.linear(x, own)

    return Operand(_size(weight), copy)


def _torch_product(weight: torch.Tensor, n: int, m: int) -> Operand:
    """[rows, columns] @ [columns, batch]: the fastest form that torch has on a CPU in bf16."""

    def copy() -> Bind:
        own = weight.clone()

        def bind(x: torch.Tensor) -> Call:
            columns = x.to(own.dtype).T.contiguous()
            return lambda: own @ columns

        return bind

    return Operand(_size(weight), copy, rows_first=True)


def _torch_fp32(weight: torch.Tensor, n: int, m: int) -> Operand:
    return _torch_product(weight.float(), n, m)


def _torch_csr(weight: torch.Tensor, n: int, m: int) -> Operand:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        made = weight.float().to_sparse_csr()
    # With 32-bit indices torch hands the product to MKL or cuSPARSE as it is.
    parts = (made.crow_indices().int(), made.col_indices().int(), made.values())

    def copy() -> Bind:
        rows, columns, values = (part.clone() for part in parts)
        matrix = torch.sparse_csr_tensor(rows, columns, values, weight.shape, check_invariants=False)

        def bind(x: torch.Tensor) -> Call:
            vectors = x.float().T.contiguous()
            return lambda: matrix @ vectors

        return bind

    return Operand(_size(*parts), copy, rows_first=True)


def _scipy_csr(weight: torch.Tensor, n: int, m: int) -> Operand:
    return _numpy_csr(weight, lambda matrix, columns: matrix @ columns)


def _mkl_csr(weight: torch.Tensor, n: int, m: int) -> Operand:
    _name_mkl()
    from sparse_dot_mkl import dot_product_mkl

    return _numpy_csr(weight, dot_product_mkl)


def _name_mkl() -> None:
    """Set MKL_RT, where it is not set, to the library of the mkl wheel: sparse_dot_mkl does not look there itself."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files("mkl") or ():
            if "mkl_rt" in file.name:
                os.environ.setdefault("MKL_RT", str(Path(file.locate()).resolve()))


def _numpy_csr(weight: torch.Tensor, product: Callable[[Any, Any], Any]) -> Operand:
    from scipy.sparse import csr_matrix

    made = csr_matrix(weight.float().numpy())

    def copy() -> Bind:
        matrix = made.copy()

        def bind(x: torch.Tensor) -> Call:
            columns = x.float().T.contiguous().numpy()
            return lambda: product(matrix, columns)

        return bind

    return Operand(made.data.nbytes + made.indices.nbytes + made.indptr.nbytes, copy, rows_first=True)


def _cusparselt(weight: torch.Tensor, n: int, m: int) -> Operand:
    """2:4 through torch, with the fastest algorithm of its own search; the vectors are padded to 8."""
    packed = torch._cslt_compress(weight)

    def copy() -> Bind:
        own = packed.clone()

        def bind(x: torch.Tensor) -> Call:
            columns = F.pad(x, (0, 0, 0, -x.shape[0] % 8)).T.contiguous()
            algorithm = torch._cslt_sparse_mm_search(own, columns)
            return lambda: torch._cslt_sparse_mm(own, columns, alg_id=algorithm)[:, : x.shape[0]]

        return bind

    return Operand(_size(packed), copy, rows_first=True)


def _ours(format: str) -> Callable[[torch.Tensor, int, int], Operand]:
    def prepare(weight: torch.Tensor, n: int, m: int) -> Operand:
        pattern = (n, m) if format == "nm" else (0, 0)
        packed = pack_linear(weight, format, None, *pattern)

        def copy() -> Bind:
            linear = deepcopy(packed)
            return lambda x: lambda: linear(x)

        return Operand(_size(*packed.parameters(), *packed.buffers()), copy)

    return prepare


def _own(path: str) -> Callable[[torch.Tensor, int, int], Operand]:
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--impl {path} cannot be used: {error}; give MODULE:FUNCTION") from error

    def prepare(weight: torch.Tensor, n: int, m: int) -> Operand:
        first = [function(weight.clone())]

        def copy() -> Bind:
            product = first.pop() if first else function(weight.clone())
            return lambda x: lambda: product(x)

        return Operand(getattr(first[0], "bytes", None), copy)

    return prepare
