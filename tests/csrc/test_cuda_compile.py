"""The CUDA kernels compile for every chip that users own without spilling, and with the shared memory it has."""

import importlib.util
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
        assert kernel.shared <= 2048, kernel


@pytest.mark.parametrize("name", ["linear", "convert"])
def test_simple_kernels(name: str) -> None:
    check_all(name)


def test_bitmap_arrange() -> None:
    check_all("bitmap_arrange")


def test_bitmap_linear() -> None:
    check_all("bitmap_linear")
    # dtype, tiles of 8 vectors: with 128 registers four blocks of 128 threads share a processor, as linear.h plans.
    for kernel in compiled("bitmap_linear"):
        if match := re.search(r"bitmap_linear_kernelILi\dELi(\d)E", kernel.kernel):
            assert kernel.registers <= (128 if int(match[1]) <= 4 else 255), kernel


def test_two_of_four() -> None:
    check_all("two_of_four")
    for kernel in compiled("two_of_four"):
        if re.search(r"two_of_four_kernelILi\dELi[12]E", kernel.kernel):
            assert kernel.registers <= 128, kernel


def instructions(name: str, kernel: str, tmp_path: Path) -> list[str]:
    """SASS of one kernel for sm_90, whose mangled name contains `kernel`."""
    spec = importlib.util.find_spec("triton")
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    tool = tool if tool and tool.exists() else shutil.which("cuobjdump")
    if not shutil.which("nvcc") or not tool:
        pytest.skip("nvcc or cuobjdump is not installed")
    cubin = tmp_path / "kernel.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-I{CUDA.parent / 'include'}", "-arch=sm_90", "--cubin"]
    subprocess.run([*command, "-o", str(cubin), str(CUDA / f"{name}.cu")], check=True)
    sass = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    (function,) = (part for part in sass.split("Function : ")[1:] if kernel in part.splitlines()[0])
    return re.findall(r"/\*[0-9a-f]{4}\*/\s+([^;]+);", function)


def test_decoding_a_bitmap_is_short(tmp_path: Path) -> None:
    """An H200 has time for 8.8 lane-instructions a weight at 50 % and 5.6 at 70 %; more would outlast the reading."""
    code = instructions("bitmap_linear", "bitmap_linear_kernelILi1ELi1ELb1E", tmp_path)
    products = [i for i, instruction in enumerate(code) if "HMMA.16816" in instruction]
    assert len(products) == 16  # of a chunk: each multiplies 8 weights of a lane, times 8 vectors
    assert (products[-1] - products[0]) / (8 * 15) <= 5
    decoding = " ".join(code[products[0] : products[-1]])
    assert "LDL" not in decoding
    assert "POPC" not in decoding


def test_two_of_four_keeps_loads_on_their_way(tmp_path: Path) -> None:
    """Twelve loads of a group of four steps stand together; after each product the next one would wait for memory."""
    code = instructions("two_of_four", "two_of_four_kernelILi1ELi1E", tmp_path)
    kinds = "".join("p" if "HMMA.SP" in line else "w" if "LDG.E.EF" in line else "" for line in code)
    assert "wwwwwwwwwwww" in kinds


@pytest.mark.parametrize("name", ["select_count", "select_mask", "select_rows"])
def test_select(name: str) -> None:
    for kernel in compiled(name):
        assert kernel.spills == kernel.stack == 0, kernel
        # A processor has 65,536 for one block, of 1024 threads to count and of 512 to hold rows.
        assert kernel.registers <= (64 if name == "select_count" else 128), kernel
        # Beside 64 KB of counters on chips with 99 KB; for rows, what a block has without asking.
        assert kernel.shared <= (35 << 10 if name == "select_count" else 48 << 10), kernel
