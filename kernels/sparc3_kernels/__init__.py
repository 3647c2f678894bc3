"""SparC3's kernels: each op has a plain-torch reference and, where they fit, Triton, C++ or CUDA versions."""

from sparc3_kernels.backend import BackendError, backend, info
from sparc3_kernels.bitmap import bitmap_linear, check_bitmap, pack_bitmap, unpack_bitmap
from sparc3_kernels.convert import (
    bitmap_to_csr_indices,
    bitmap_to_nm,
    csr_to_bitmap_bits,
    csr_to_nm,
    nm_to_bitmap,
    nm_to_csr,
)
from sparc3_kernels.csr import check_csr, csr_linear, pack_csr, unpack_csr
from sparc3_kernels.linear import input_gradient, linear
from sparc3_kernels.native import NativeError, get_cmake_dir, get_include, get_library_dir
from sparc3_kernels.nm import check_nm, nm_linear, pack_nm, unpack_nm
from sparc3_kernels.select import (
    apply_bits_,
    count_bits,
    pack_bits,
    select_difference,
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
    "bitmap_linear",
    "bitmap_to_csr_indices",
    "bitmap_to_nm",
    "check_bitmap",
    "check_csr",
    "check_nm",
    "count_bits",
    "csr_linear",
    "csr_to_bitmap_bits",
    "csr_to_nm",
    "get_cmake_dir",
    "get_include",
    "get_library_dir",
    "info",
    "input_gradient",
    "linear",
    "nm_linear",
    "nm_to_bitmap",
    "nm_to_csr",
    "pack_bitmap",
    "pack_bits",
    "pack_csr",
    "pack_nm",
    "select_difference",
    "select_flat",
    "select_nm",
    "select_rows",
    "select_stream",
    "unpack_bitmap",
    "unpack_bits",
    "unpack_csr",
    "unpack_nm",
]
