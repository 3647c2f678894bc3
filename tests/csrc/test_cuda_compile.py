"""The CUDA kernels compile for every chip that users own without spilling, and what decodes weights is short."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
CHIPS = ("80", "86", "89", "90", "120")


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of one kernel on one chip."""

    chip: str
    kernel: str
    stack: int
    spills: int
    registers: int
    shared: int  # bytes, static


@cache
def compiled(name: str) -> list[Compiled]:
    """Every kernel of csrc/cuda/`name`.cu on every chip."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    architectures = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in CHIPS]
    command = ["nvcc", "-std=c++17", "-O3", f"-I{CUDA.parent / 'include'}", *architectures, "-Xptxas", "-v"]
    result = subprocess.run(
        [*command, "-c", "-o", "/dev/null", str(CUDA / f"{name}.cu")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    pattern = (
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<chip>\d+)a?'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
        r"(?P<rest>[^\n]*)"
    )
    found = []
    for match in re.finditer(pattern, result.stderr, flags=re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Compiled(
                *(match["chip"], match["kernel"], int(match["stack"])),
                *(int(match["stores"]) + int(match["loads"]), int(match["registers"])),
                int(shared[1]) if shared else 0,
            )
        )
    assert {kernel.chip for kernel in found} == set(CHIPS)
    return found


def check_all(name: str) -> None:
    for kernel in compiled(name):
        assert kernel.spills == 0, kernel
        # A few numbers on the stack are indexed by what is known at run time only; never in a product.
        assert kernel.stack == 0 or "values_kernel" in kernel.kernel, kernel
        assert kernel.shared <= 1024, kernel


def test_linear() -> None:
    check_all("linear")


def test_bitmap_arrange() -> None:
    check_all("bitmap_arrange")


def test_bitmap_linear() -> None:
    check_all("bitmap_linear")
    # dtype, tiles of 8 vectors: with 128 registers four blocks of 128 threads share a processor, as linear.h plans.
    for kernel in compiled("bitmap_linear"):
        if match := re.search(r"bitmap_linear_kernelILi\dELi(\d)E", kernel.kernel):
            assert kernel.registers <= (128 if int(match[1]) <= 4 else 255), kernel
