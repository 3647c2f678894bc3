"""SparC3's kernels: each op has a plain-torch reference and, where they fit, Triton, C++ or CUDA versions."""

from sparc3_kernels.backend import BackendError, backend, info
from sparc3_kernels.native import NativeError, get_cmake_dir, get_include
from sparc3_kernels.select import (
    apply_bits_,
    count_bits,
    pack_bits,
    select_flat,
    select_nm,
    select_rows,
    select_stream,
    unpack_bits,
)
from sparc3_kernels.weight_relevance import REDUCTIONS, accumulate_weight_relevance_

__all__ = [
    "REDUCTIONS",
    "BackendError",
    "NativeError",
    "accumulate_weight_relevance_",
    "apply_bits_",
    "backend",
    "count_bits",
    "get_cmake_dir",
    "get_include",
    "info",
    "pack_bits",
    "select_flat",
    "select_nm",
    "select_rows",
    "select_stream",
    "unpack_bits",
]
