"""csrc/ by itself, without Python or torch: it builds, passes its C test, exports only its ABI, and is found by CMake
from another place than it was installed to."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sparc3_kernels import native

CSRC = Path(__file__).parents[2] / "csrc"
CONSUMER = """
cmake_minimum_required(VERSION 3.24)
project(consumer C)
find_package(sparc3 0.1 CONFIG REQUIRED)
add_executable(consumer main.c)
target_link_libraries(consumer PRIVATE sparc3::sparc3)
if(NOT sparc3_CUDA_VERSION STREQUAL "")
    message(FATAL_ERROR "built without CUDA, but it says ${sparc3_CUDA_VERSION}")
endif()
"""
MAIN = """
#include <sparc3/sparc3.h>
int main(void) { return sparc3_isa()[0] == 0; }
"""


def run(*command: object) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("cmake", "ninja", "c++"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("csrc")
    install = f"-DCMAKE_INSTALL_PREFIX={folder / 'installed'}"
    run("cmake", "-S", CSRC, "-B", folder / "build", "-G", "Ninja", "-DSPARC3_CUDA=0", install)
    run("cmake", "--build", folder / "build")
    return folder


def test_the_c_test_passes(build: Path) -> None:
    assert "100% tests passed" in run("ctest", "--test-dir", build / "build", "--output-on-failure")


def test_hostile_input_under_sanitizers(tmp_path: Path) -> None:
    """Corrupt weights, null pointers, wrong sizes and overlaps, no byte out of place; by the first header too."""
    for tool in ("cmake", "ninja", "c++"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    (tmp_path / "probe.c").write_text("int main(void) { return 0; }")
    probe = ["cc", *flags.split(), str(tmp_path / "probe.c"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("the compiler has no sanitizers")
    build = tmp_path / "build"
    languages = [f"-DCMAKE_{language}_FLAGS={flags}" for language in ("C", "CXX")]
    # Optimised as little as intrinsics allow: this build is for finding errors, soon.
    level = "-DCMAKE_BUILD_TYPE=None"
    run("cmake", "-S", CSRC, "-B", build, "-G", "Ninja", "-DSPARC3_CUDA=0", level, *languages)
    run("cmake", "--build", build, "--target", "packed", "packed_v1", "convert", "abi", "fuzz")
    for program in ("packed", "packed_v1", "convert", "abi", "fuzz"):
        assert "passed" in run(build / "tests" / program)


def test_the_page_lists_every_function() -> None:
    headers = (CSRC / "include" / "sparc3" / name for name in ("sparc3.h", "sparc3_cuda.h"))
    text = "".join(header.read_text() for header in headers)
    declared = re.findall(r"^SPARC3_API .*?(sparc3_\w+)\(", text, flags=re.MULTILINE)
    page = (CSRC.parent / "docs" / "linking.md").read_text()
    assert sorted(re.findall(r"^\| `(sparc3_\w+)`", page, flags=re.MULTILINE)) == sorted(declared)


def test_only_the_abi_is_exported(build: Path) -> None:
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    lines = run("nm", "-D", "--defined-only", build / "build" / "libsparc3.so").splitlines()
    header = (CSRC / "include" / "sparc3" / "sparc3.h").read_text()
    declared = re.findall(r"^SPARC3_API .*?(sparc3_\w+)\(", header, flags=re.MULTILINE)
    assert sorted(line.split()[-1] for line in lines) == sorted(declared)


def test_found_by_cmake_after_moving(build: Path, tmp_path: Path) -> None:
    run("cmake", "--install", build / "build")
    prefix = (build / "installed").rename(tmp_path / "moved")
    (tmp_path / "CMakeLists.txt").write_text(CONSUMER)
    (tmp_path / "main.c").write_text(MAIN)
    where = f"-Dsparc3_DIR={prefix / 'cmake'}"
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", where)
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build" / "consumer")


def test_the_build_notes_its_cuda_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("cmake", "ninja", "c++", "nvcc"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    run("cmake", "-S", CSRC, "-B", tmp_path / "cmake", "-G", "Ninja", "-DSPARC3_CUDA=1", "-DSPARC3_TESTS=OFF")
    monkeypatch.setattr(native, "_NATIVE", tmp_path)
    release = re.search(r"V(\d+\.\d+\.\d+)", run("nvcc", "--version"))
    assert release is not None
    assert native._cuda_version() == release[1]
