"""The C libraries (csrc/) through ctypes: the one file that knows where they are and what they take.

`libsparc3` (CPU) and `libsparc3_cuda` lie in _native/lib beside this file, where setup.py installs them. The
environment variable SPARC3_ISA=avx512bf16|avx512vbmi2|avx512|avx2|portable forces an instruction set.
"""

import ctypes
import functools
import mmap
import os
import re
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

_NATIVE = Path(__file__).resolve().parent / "_native"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
REDUCTIONS = {"abs": 0, "square": 1, "token-square": 2}
OK, NAN, STATE, CHANGED, FORMAT, PATTERN = 0, 3, 4, 5, 8, 9
HUGE_PAGE = 1 << 21  # bytes
ISAS = ("portable", "avx2", "avx512", "avx512vbmi2", "avx512bf16")
# Least driver by the major version of the CUDA toolkit, whatever its minor version: NVIDIA, CUDA Compatibility,
# "Minor Version Compatibility", table 1.
_LEAST_DRIVERS = {12: 525, 13: 580}


class Threshold(ctypes.Structure):
    """sparc3_threshold: keys above `key` are kept, and the first `keep_equal` of those equal to it."""

    _fields_ = (("key", c_int32), ("reserved", c_uint32), ("keep_equal", c_uint64))


class Bitmap(ctypes.Structure):
    """sparc3_bitmap."""

    _fields_ = (
        ("dtype", c_int),
        ("rows", c_size_t),
        ("columns", c_size_t),
        ("count", c_size_t),
        ("bits", c_void_p),
        ("values", c_void_p),
        ("offsets", c_void_p),
    )


class NM(ctypes.Structure):
    """sparc3_nm."""

    _fields_ = (
        ("dtype", c_int),
        ("n", c_int),
        ("m", c_int),
        ("rows", c_size_t),
        ("columns", c_size_t),
        ("values", c_void_p),
        ("indices", c_void_p),
    )


class CSR(ctypes.Structure):
    """sparc3_csr."""

    _fields_ = (
        ("dtype", c_int),
        ("rows", c_size_t),
        ("columns", c_size_t),
        ("count", c_size_t),
        ("indices", c_void_p),
        ("values", c_void_p),
        ("offsets", c_void_p),
    )


class CudaBitmap(ctypes.Structure):
    """sparc3_cuda_bitmap."""

    _fields_ = (
        ("dtype", c_int),
        ("rows", c_size_t),
        ("columns", c_size_t),
        ("masks", c_void_p),
        ("starts", c_void_p),
        ("values", c_void_p),
        ("deepest", c_size_t),
    )


class CudaTwoOfFour(ctypes.Structure):
    """sparc3_cuda_two_of_four."""

    _fields_ = (
        ("dtype", c_int),
        ("rows", c_size_t),
        ("columns", c_size_t),
        ("values", c_void_p),
        ("places", c_void_p),
    )


_STATUS = c_int
_MATRIX = [c_int, c_void_p, c_size_t, c_size_t]  # dtype, weight, rows, columns
_LINEAR = [c_void_p, c_size_t, c_void_p, c_void_p, c_int, c_void_p, c_size_t]
_CUDA_LINEAR = [c_void_p, c_size_t, *[c_void_p] * 3, c_size_t, c_void_p]
_DENSE = [
    c_void_p,
    c_void_p,
    *[c_size_t] * 3,
    c_void_p,
    c_int,
    c_void_p,
    c_size_t,
]  # operands, sizes, result, ...
_SIGNATURES: dict[str, dict[str, tuple[Any, list[Any]]]] = {
    "sparc3": {
        "sparc3_version": (c_char_p, []),
        "sparc3_strerror": (c_char_p, [c_int]),
        "sparc3_cpu_features": (c_uint32, []),
        "sparc3_isa": (c_char_p, []),
        "sparc3_force_isa": (_STATUS, [c_char_p]),
        "sparc3_select_state_size": (c_size_t, []),
        "sparc3_select_workspace_size": (c_size_t, [c_int]),
        "sparc3_select_init": (_STATUS, [c_void_p, c_int]),
        "sparc3_select_count": (_STATUS, [c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_size_t]),
        "sparc3_select_merge": (_STATUS, [c_void_p, c_void_p]),
        "sparc3_select_refine": (_STATUS, [c_void_p, c_uint64, POINTER(c_int)]),
        "sparc3_select_threshold": (_STATUS, [c_void_p, POINTER(Threshold)]),
        "sparc3_select_mask": (_STATUS, [c_int, c_void_p, c_size_t, POINTER(Threshold), c_void_p, c_int]),
        "sparc3_select_flat_workspace_size": (c_size_t, [c_int]),
        "sparc3_select_flat": (
            _STATUS,
            [c_int, c_void_p, c_size_t, c_uint64, c_void_p, POINTER(Threshold), c_int, c_void_p, c_size_t],
        ),
        "sparc3_select_rows_workspace_size": (c_size_t, [c_size_t, c_int]),
        "sparc3_select_rows": (
            _STATUS,
            [c_int, c_void_p, c_size_t, c_size_t, c_size_t, c_void_p, c_int, c_void_p, c_size_t],
        ),
        "sparc3_select_nm": (_STATUS, [c_int, c_void_p, c_size_t, c_int, c_int, c_void_p, c_int]),
        "sparc3_weight_relevance_workspace_size": (c_size_t, [c_size_t, c_size_t, c_size_t, c_size_t, c_int]),
        "sparc3_weight_relevance": (
            _STATUS,
            [c_int, c_int, c_void_p, c_void_p] + [c_size_t] * 4 + [c_void_p, c_int, c_void_p, c_size_t],
        ),
        "sparc3_dense_linear_workspace_size": (c_size_t, [c_size_t] * 2),
        "sparc3_dense_linear": (_STATUS, _DENSE),
        "sparc3_dense_input_gradient_workspace_size": (c_size_t, [c_size_t] * 3),
        "sparc3_dense_input_gradient": (_STATUS, _DENSE),
        "sparc3_advise_huge_pages": (None, [c_void_p, c_size_t]),
        "sparc3_linear_workspace_size": (c_size_t, [c_size_t] * 3 + [c_int]),
        "sparc3_count_kept": (_STATUS, [*_MATRIX, c_void_p, c_int]),
        "sparc3_bitmap_pack": (_STATUS, [*_MATRIX, c_void_p, c_void_p, c_void_p, c_size_t, c_int]),
        "sparc3_bitmap_check": (_STATUS, [POINTER(Bitmap), c_int]),
        "sparc3_bitmap_unpack": (_STATUS, [POINTER(Bitmap), c_void_p, c_int]),
        "sparc3_bitmap_linear": (_STATUS, [POINTER(Bitmap), *_LINEAR]),
        "sparc3_nm_pack": (
            _STATUS,
            [*_MATRIX, c_int, c_int, c_void_p, c_void_p, POINTER(c_uint64), c_int],
        ),
        "sparc3_nm_check": (_STATUS, [POINTER(NM), c_int]),
        "sparc3_nm_unpack": (_STATUS, [POINTER(NM), c_void_p, c_int]),
        "sparc3_nm_linear": (_STATUS, [POINTER(NM), *_LINEAR]),
        "sparc3_csr_pack": (_STATUS, [*_MATRIX, c_void_p, c_void_p, c_void_p, c_size_t, c_int]),
        "sparc3_csr_check": (_STATUS, [POINTER(CSR), c_int]),
        "sparc3_csr_unpack": (_STATUS, [POINTER(CSR), c_void_p, c_int]),
        "sparc3_csr_linear": (_STATUS, [POINTER(CSR), *_LINEAR]),
        "sparc3_bitmap_to_csr": (_STATUS, [POINTER(Bitmap), c_void_p, c_int]),
        "sparc3_csr_to_bitmap": (_STATUS, [POINTER(CSR), c_void_p, c_int]),
        "sparc3_bitmap_to_nm": (_STATUS, [POINTER(Bitmap), c_int, c_int, *[c_void_p] * 3, c_int]),
        "sparc3_nm_count_kept": (_STATUS, [POINTER(NM), c_void_p, c_int]),
        "sparc3_nm_to_bitmap": (_STATUS, [POINTER(NM), *[c_void_p] * 3, c_size_t, c_int]),
    },
    "sparc3_cuda": {
        "sparc3_cuda_version": (c_char_p, []),
        "sparc3_cuda_device_count": (_STATUS, [POINTER(c_int), POINTER(c_char_p)]),
        "sparc3_cuda_select_state_size": (c_size_t, []),
        "sparc3_cuda_select_init": (_STATUS, [c_void_p, c_int, c_void_p]),
        "sparc3_cuda_select_count": (_STATUS, [c_void_p, c_int, c_void_p, c_size_t, c_void_p]),
        "sparc3_cuda_select_refine": (_STATUS, [c_void_p, c_uint64, c_void_p]),
        "sparc3_cuda_select_threshold": (_STATUS, [c_void_p, POINTER(Threshold), c_void_p]),
        "sparc3_cuda_select_mask_workspace_size": (c_size_t, [c_size_t]),
        "sparc3_cuda_select_mask": (
            _STATUS,
            [c_void_p, c_int, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p],
        ),
        "sparc3_cuda_select_rows": (_STATUS, [c_int, c_void_p, *[c_size_t] * 3, *[c_void_p] * 3]),
        "sparc3_cuda_bitmap_to_csr": (_STATUS, [POINTER(Bitmap), c_void_p, c_void_p]),
        "sparc3_cuda_csr_to_bitmap": (_STATUS, [POINTER(CSR), c_void_p, c_void_p]),
        "sparc3_cuda_bitmap_to_nm": (_STATUS, [POINTER(Bitmap), c_int, c_int, *[c_void_p] * 4]),
        "sparc3_cuda_nm_count_kept": (_STATUS, [POINTER(NM), c_void_p, c_void_p]),
        "sparc3_cuda_nm_to_bitmap": (_STATUS, [POINTER(NM), *[c_void_p] * 3, c_size_t, c_void_p]),
        "sparc3_cuda_bitmap_chunks": (c_size_t, [c_size_t] * 2),
        "sparc3_cuda_bitmap_arrange_masks": (_STATUS, [c_void_p, *[c_size_t] * 2, *[c_void_p] * 4]),
        "sparc3_cuda_bitmap_arrange_values": (
            _STATUS,
            [c_int, *[c_void_p] * 2, *[c_size_t] * 2, *[c_void_p] * 4],
        ),
        "sparc3_cuda_bitmap_unpack": (_STATUS, [POINTER(CudaBitmap), c_void_p, c_void_p]),
        "sparc3_cuda_bitmap_linear_workspace_size": (c_size_t, [c_size_t] * 3),
        "sparc3_cuda_bitmap_linear": (_STATUS, [POINTER(CudaBitmap), *_CUDA_LINEAR]),
        "sparc3_cuda_two_of_four_steps": (c_size_t, [c_size_t] * 2),
        "sparc3_cuda_two_of_four_arrange": (_STATUS, [POINTER(NM), *[c_void_p] * 3]),
        "sparc3_cuda_two_of_four_unpack": (_STATUS, [POINTER(CudaTwoOfFour), c_void_p, c_void_p]),
        "sparc3_cuda_two_of_four_linear_workspace_size": (c_size_t, [c_size_t] * 3),
        "sparc3_cuda_two_of_four_linear": (_STATUS, [POINTER(CudaTwoOfFour), *_CUDA_LINEAR]),
    },
}


class NativeError(RuntimeError):
    """A C function returned a status that the caller did not expect; the message is sparc3_strerror's."""


@functools.cache
def _load(name: str) -> ctypes.CDLL | str:
    """Return library `name` with its signatures declared, or why it cannot be used."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = _NATIVE / "lib" / f"lib{name}.{suffix}"
    if not path.exists():
        return f"{path.name} was not built when the package was installed{_why()}"
    try:
        library = ctypes.CDLL(str(path))
        for function, (result, arguments) in _SIGNATURES[name].items():
            symbol = getattr(library, function)
            symbol.restype, symbol.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        # By its name alone: reports carry this text to other machines.
        return (
            f"{path.name} cannot be loaded: {str(error).replace(str(path), path.name)}; reinstall the package"
        )
    if name == "sparc3" and (isa := os.environ.get("SPARC3_ISA")):
        if library.sparc3_force_isa(isa.encode()):
            return f"SPARC3_ISA={isa} is not on this machine or in this build ({', '.join(ISAS)})"
    return library


def missing(name: str = "sparc3") -> str | None:
    """Return why library `name` cannot be used, or None where it can."""
    library = _load(name)
    return library if isinstance(library, str) else None


def library(name: str = "sparc3") -> ctypes.CDLL:
    """Return library `name`, signatures declared.

    Raises:
        NativeError: it cannot be used; the message says why.
    """
    loaded = _load(name)
    if isinstance(loaded, str):
        raise NativeError(loaded)
    return loaded


def check(status: int) -> None:
    """Raise NativeError for any status but SPARC3_OK."""
    if status != OK:
        raise NativeError(library().sparc3_strerror(status).decode())


def force_isa(name: str | None) -> None:
    """Use instruction set `name` (one of `ISAS`) in the whole process; None chooses the best.

    Raises:
        NativeError: this machine or build lacks it.
    """
    check(library().sparc3_force_isa(name.encode() if name else None))


def workspace(size: int) -> torch.Tensor:
    """Return `size` bytes for a C function to work in."""
    return torch.empty(size, dtype=torch.uint8)


def huge_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised CPU tensor in 2 MB pages where the system grants them: faster to stream from."""
    tensor = torch.empty(shape, dtype=dtype)
    if missing() is None and (size := tensor.nbytes) >= HUGE_PAGE:
        library().sparc3_advise_huge_pages(tensor.data_ptr(), size)
    return tensor


def drop_mapped_pages(tensor: torch.Tensor) -> None:
    """Take a CPU tensor that lies in a mapped file, as loaded from safetensors, out of this process's memory.

    Whoever reads it again gets what the file holds. Any other tensor is left alone; so are all where the system is
    not Linux.
    """
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and first < last and _lies_in_a_file(begin, end):
        # A hint: an error changes nothing.
        ctypes.CDLL(None).madvise(c_void_p(first), c_size_t(last - first), mmap.MADV_DONTNEED)


def _lies_in_a_file(begin: int, end: int) -> bool:
    """Whether all memory from `begin` to `end` is one private mapping of a file."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, access, _, _, inode = line.split()[:5]
        low, high = (int(address, 16) for address in addresses.split("-"))
        if low <= begin < high:
            return end <= high and inode != "0" and access.endswith("p")
    return False


def info() -> dict[str, Any]:
    """Return version, instruction set and features of the CPU library and what the CUDA library sees.

    A library that cannot be used is shown as the reason, a string. `built_with`, of the CUDA library: version of the
    toolkit; `least_driver`: major version of the least driver that it needs; None where that is not known.
    """
    cpu, cuda = _load("sparc3"), _load("sparc3_cuda")
    report: dict[str, Any] = {"cpu": cpu, "cuda": cuda}
    if not isinstance(cpu, str):
        features = cpu.sparc3_cpu_features()
        report["cpu"] = {
            "version": cpu.sparc3_version().decode(),
            "isa": cpu.sparc3_isa().decode(),
            "features": [name for bit, name in enumerate(ISAS[1:]) if features >> bit & 1],
        }
    if not isinstance(cuda, str):
        count, reason = c_int(), c_char_p()
        cuda.sparc3_cuda_device_count(ctypes.byref(count), ctypes.byref(reason))
        report["cuda"] = {
            "version": cuda.sparc3_cuda_version().decode(),
            "devices": count.value,
            "reason": (reason.value or b"").decode(),
            "built_with": (toolkit := _cuda_version()),
            "least_driver": _LEAST_DRIVERS.get(int(toolkit.partition(".")[0])) if toolkit else None,
        }
    return report


def get_include() -> str:
    """Return the folder to put on a C compiler's include path for `#include <sparc3/sparc3.h>`."""
    return _installed("include")


def get_library_dir() -> str:
    """Return the folder of libsparc3, for a linker's -L and -rpath; pkgconfig/sparc3.pc lies in it."""
    return _installed("lib")


def get_cmake_dir() -> str:
    """Return the folder of sparc3Config.cmake, for `find_package(sparc3 CONFIG PATHS ...)`."""
    return _installed("cmake")


def _cuda_version() -> str | None:
    """Return the version of the toolkit that the CUDA library was built with, as CMake noted it at the build."""
    config = _NATIVE / "cmake" / "sparc3Config.cmake"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    found = re.search(r'^set\(sparc3_CUDA_VERSION "(\d[\d.]*)"\)$', text, re.MULTILINE)
    return found[1] if found else None


def _installed(folder: str) -> str:
    path = _NATIVE / folder
    if not path.is_dir():
        raise NativeError(f"{path} was not built when the package was installed{_why()}")
    return str(path)


def _why() -> str:
    """Return what setup.py noted about a build that failed."""
    note = _NATIVE / "build_failed.txt"
    return f": {note.read_text(encoding='utf-8').strip()}" if note.exists() else ""
