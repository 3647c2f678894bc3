"""Builds csrc/ with CMake and installs libraries, headers and CMake files into sparc3_kernels/_native.

SPARC3_CUDA=auto|0|1 says whether the CUDA library is built (auto: where CMake finds a CUDA compiler). Where
nothing can be built the package is installed without its libraries and runs on its reference backend;
SPARC3_CUDA=1 asked for something, so there a failure is an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent / "csrc"
PACKAGE = "sparc3_kernels"
RULER = "*" * 100
WARNING = f"""{RULER}
WARNING: the C++ library of sparc3 could not be built (see above). sparc3 is installed without it and runs on
its slower reference backend. It takes CMake, Ninja and a C++17 compiler (GCC or Clang); reinstall once they
are there. `sparc3 info` shows what is in use.
{RULER}"""


class CMakeBuild(build_ext):
    """One extension that is the whole of csrc/: `run` drives CMake, the rest says which files it made."""

    def run(self) -> None:
        cuda = os.environ.get("SPARC3_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            sys.exit(f"SPARC3_CUDA is auto, 0 or 1, not {cuda!r}")
        # A CUDA compiler that is there but does not work must not cost the CPU library.
        attempts = {"auto": ("auto", "0"), "0": ("0",), "1": ("1",)}[cuda]
        failure = ""
        for attempt in attempts:
            try:
                return self.cmake(attempt)
            except (OSError, subprocess.CalledProcessError) as error:
                failure = f"building csrc with SPARC3_CUDA={attempt} failed: {error}"
                print(f"sparc3: {failure}", file=sys.stderr)
        if cuda == "1":
            sys.exit("sparc3: SPARC3_CUDA=1, but the CUDA library could not be built (see above)")
        print(WARNING, file=sys.stderr)
        # pip shows no output of a build that succeeds, so the reason goes along for `sparc3 info`.
        shutil.rmtree(self.native(), ignore_errors=True)
        self.native().mkdir(parents=True)
        (self.native() / "build_failed.txt").write_text(f"{failure}\n", encoding="utf-8")

    def cmake(self, cuda: str) -> None:
        build = Path(self.build_temp).resolve() / f"csrc-cuda-{cuda}"
        # A CMake of another environment (build isolation) leaves paths behind that no longer exist.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
        prefix = self.native()
        configure = [
            "cmake",
            "-S",
            SOURCE,
            "-B",
            build,
            "-G",
            "Ninja",
            f"-DSPARC3_CUDA={cuda}",
            "-DSPARC3_TESTS=OFF",
        ]
        subprocess.run(
            [*configure, "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={prefix}"], check=True
        )
        subprocess.run(["cmake", "--build", build], check=True)
        shutil.rmtree(prefix, ignore_errors=True)
        subprocess.run(["cmake", "--install", build], check=True)

    def native(self) -> Path:
        """Where the libraries go: into the source tree if editable, else into the build folder."""
        if self.inplace:
            return Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE)).resolve() / "_native"
        return Path(self.build_lib).resolve() / PACKAGE / "_native"

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.native().rglob("*") if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(SOURCE.parent)) for path in SOURCE.rglob("*") if path.is_file()]


class PlatformWheel(bdist_wheel):
    """The libraries are called with ctypes: the wheel depends on the platform, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"{PACKAGE}._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
