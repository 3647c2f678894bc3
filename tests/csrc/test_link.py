"""examples/link/: programs in C, C++ and Python against the library of the installed package, built and run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sparc3_kernels as kernels
from sparc3_kernels import native

LINK = Path(__file__).parents[2] / "examples" / "link"

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def run(*command: object, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def need(*tools: str) -> None:
    for tool in tools:
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")


def test_c(tmp_path: Path) -> None:
    need("cc", "pkg-config")
    libraries = kernels.get_library_dir()
    flags = run(
        "pkg-config", "--cflags", "--libs", "sparc3", PKG_CONFIG_PATH=f"{libraries}/pkgconfig"
    ).split()
    program = tmp_path / "bitmap"
    run(
        "cc",
        "-Wall",
        "-Wextra",
        "-Werror",
        LINK / "bitmap.c",
        *flags,
        f"-Wl,-rpath,{libraries}",
        "-o",
        program,
    )
    assert run(program) == "4 values: 2 117 10\n"


def test_cmake(tmp_path: Path) -> None:
    need("cmake", "c++")
    run("cmake", "-S", LINK, "-B", tmp_path, f"-Dsparc3_DIR={kernels.get_cmake_dir()}")
    run("cmake", "--build", tmp_path)
    # -5 + 4 + 3 - 2 and 7 + 6 + 2 + 2
    assert run(tmp_path / "two_of_four") == "0 17\n"


def test_ctypes() -> None:
    library = Path(kernels.get_library_dir()) / "libsparc3.so"
    assert run(sys.executable, LINK / "with_ctypes.py", library) == "01011001\n"


def test_torch_ops() -> None:
    path = os.pathsep.join(part for part in sys.path if part)
    assert "weights" in run(sys.executable, LINK / "torch_ops.py", PYTHONPATH=path)


def test_the_library_name_has_its_abi() -> None:
    need("readelf")
    entries = run("readelf", "-d", Path(kernels.get_library_dir()) / "libsparc3.so")
    assert "Library soname: [libsparc3.so.1]" in entries
