"""Lays sparc3_kernels out as a Hugging Face kernels-hub repository of type torch-noarch (Triton and plain torch).

    python kernels/hub_layout.py OUT [--repo-id OWNER/sparc3-kernels]

writes

    OUT/build.toml, OUT/CARD.md                  for kernel-builder and the hub
    OUT/torch-ext/sparc3_kernels/                the sources as kernel-builder takes them
    OUT/build/torch-cpu/, OUT/build/torch-cuda/  ready builds, as kernels.get_local_kernel loads them

Of the package's own lines two things change. The hub loads a kernel from any path, so imports become relative; and
several versions may be loaded into one process, so the ops get a namespace that is unique to the content, where the
installed package has `sparc3`. The C++ library is not part of a noarch kernel: `pip install sparc3` brings it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent / "sparc3_kernels"
BACKENDS = ("cpu", "cuda")
VERSION = 1

BUILD = """[general]
name = "sparc3-kernels"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- pruning
- sparse
---

# sparc3-kernels

The ops of SparC3 in plain torch and Triton: relevance of weights, backward passes of norms and gated MLPs, exact
selection, and packed sparse weights (bitmap, N:M, CSR).

```python
import torch
from kernels import get_kernel

sparc3 = get_kernel("{repo_id}", version={version})
weight = torch.randn(256, 1024)
weight[torch.rand_like(weight) < 0.5] = 0
packed = sparc3.pack_bitmap(weight)
y = sparc3.bitmap_linear(torch.randn(1, 1024), *packed)
```

On a CPU this noarch build runs plain torch. The C++ kernels, several times faster, come with `pip install sparc3` as
`sparc3_kernels`, which has the same functions.
"""

# kernel-builder writes such a file itself when it builds from torch-ext/.
OPS = '''"""The torch namespace of this build of the kernel."""

import torch

ops = getattr(torch.ops, "{namespace}")


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op."""
    return f"{namespace}::{{op_name}}"
'''


def relocated(source: str) -> str:
    """A module of the package with relative imports, its ops in the namespace of `_ops`."""
    source = re.sub(r"^(\s*)from sparc3_kernels import ", r"\1from . import ", source, flags=re.M)
    source = re.sub(r"^(\s*)from sparc3_kernels\.", r"\1from .", source, flags=re.M)
    source = re.sub(r'"sparc3::(\w+)"', r'add_op_namespace_prefix("\1")', source)
    source = source.replace("torch.ops.sparc3.", "ops.")
    needed = [name for name in ("add_op_namespace_prefix", "ops") if re.search(rf"\b{name}\b[.(]", source)]
    if needed:
        first = re.search(r"^from \.", source, flags=re.M) or re.search(
            r"^torch\.library", source, flags=re.M
        )
        place = first.start() if first else 0
        source = f"{source[:place]}from ._ops import {', '.join(needed)}\n{source[place:]}"
    return source


def lay_out(out: Path, repo_id: str) -> None:
    """Write the repository into a new folder; FileExistsError where there is one."""
    sources = {
        file.name: relocated(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.glob("*.py"))
    }
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:8]
    out.mkdir(parents=True)
    (out / "build.toml").write_text(BUILD.format(version=VERSION, repo_id=repo_id), encoding="utf-8")
    (out / "CARD.md").write_text(CARD.format(version=VERSION, repo_id=repo_id), encoding="utf-8")
    folders = {out / "torch-ext" / "sparc3_kernels": ""}
    folders |= {out / "build" / f"torch-{one}": f"_sparc3_kernels_{one}_{digest}" for one in BACKENDS}
    for folder, namespace in folders.items():
        folder.mkdir(parents=True)
        for name, text in sources.items():
            (folder / name).write_text(text, encoding="utf-8")
        if namespace:
            (folder / "_ops.py").write_text(OPS.format(namespace=namespace), encoding="utf-8")
            backend = folder.name.removeprefix("torch-")
            metadata = {
                "id": namespace,
                "name": "sparc3-kernels",
                "version": VERSION,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": backend},
            }
            (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--repo-id", default="sparc3/sparc3-kernels", help="on the hub")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists; give another folder")
    lay_out(arguments.out, arguments.repo_id)


if __name__ == "__main__":
    main()
