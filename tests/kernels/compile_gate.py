"""Compiles every Triton kernel, as its launcher would launch it, for the chips that users own; needs no GPU.

    python tests/kernels/compile_gate.py [--all] [--only NAME] [--chips 90 ...] [--dtypes bf16 ...] [--json FILE]

The launchers run on meta tensors with `launch` and `chip` replaced, so what is compiled is what would run: their
choice of configuration, divisibility of sizes included. A kernel fails that spills to the stack, takes more shared
memory than its chip has, or multiplies 16-bit matrices on sm_90 without wgmma. Exit code 1 if one fails.

Without --all, fp16 is left to bf16 and sm_89 to sm_86 (the same registers and shared memory), fp32 is compiled for
sm_86, and kernels without a matrix product in bf16 for sm_90 alone. This process must not have TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from gate_cases import CASES, Case
from sparc3_kernels import triton_support as support
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CHIPS = (80, 86, 89, 90, 120)
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as one launcher would launch it on one chip."""

    case: str
    dtype: str
    chip: int
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    wgmma: bool

    @property
    def key(self) -> tuple:
        """What makes two launches the same binary."""
        return (
            *(self.kernel.__name__, self.chip, self.signature, self.constexprs, self.divisible),
            *(self.num_warps, self.num_stages),
        )


def recorded(case: Case, dtype: torch.dtype, chip: int) -> list[Launch]:
    """What the launcher of `case` launches on `chip`."""
    found: list[Launch] = []

    def record(
        kernel: Any, grid: Any, *args: Any, num_warps: int, num_stages: int = 1, **constexprs: Any
    ) -> None:
        assert all(1 <= size <= (1 << 31) - 1 for size in grid)
        assert all(size <= 65535 for size in grid[1:])
        signature, constants, divisible = {}, dict(constexprs), []
        for name, value in zip(kernel.arg_names, args, strict=False):
            if value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
                divisible.append(name)
            elif isinstance(value, support.TensorDescriptor):
                block = ",".join(map(str, value.block_shape))
                signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
            elif isinstance(value, bool):
                signature[name] = "i1"
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
                if value % 16 == 0:
                    divisible.append(name)
            else:
                signature[name] = "fp32"
        for name in kernel.arg_names[len(args) :]:
            signature[name] = "constexpr"
        multiplies = case.matrix_product and "delta" not in kernel.__name__
        wgmma = multiplies and dtype != torch.float32 and chip == 90
        found.append(
            Launch(
                *(case.name, _TYPES[dtype], chip, kernel, tuple(signature.items()), tuple(constants.items())),
                *(tuple(divisible), num_warps, num_stages, wgmma),
            )
        )

    support.launch = record
    support.chip = lambda device: (chip, support.SHARED_MEMORY[chip])
    case.run(dtype)
    return found


def compiled(launch: Launch) -> dict[str, Any]:
    """Compile one launch and read what it takes."""
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constexprs},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    result: dict[str, Any] = {
        "case": launch.case, "kernel": launch.kernel.__name__, "dtype": launch.dtype, "chip": launch.chip,
        "warps": launch.num_warps, "stages": launch.num_stages,
        "sizes": {name: value for name, value in launch.constexprs if name.isupper()},
    }  # fmt: skip
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    binary = triton.compile(source, target=GPUTarget("cuda", launch.chip, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def shown(what: str) -> str:
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

        usage = shown("-res-usage")
        counted = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
        # A frame alone may be for a call: beside each TMA load on sm_120, Triton 3.6's ptxas puts one of the driver's
        # copy, and stores its argument. What is spilled is loaded again.
        reloads = len(re.findall(r"\bLDL\b", shown("-sass"))) if counted["STACK"] else 0
    result |= {
        "registers": counted["REG"],
        "stack": counted["STACK"],
        "reloads": reloads,
        "shared": binary.metadata.shared,
        "wgmma": binary.asm["ptx"].count("wgmma.mma_async"),
        "tma": binary.asm["ptx"].count("cp.async.bulk.tensor"),
    }
    limit = support.SHARED_MEMORY[launch.chip]
    faults = []
    if result["reloads"]:
        faults.append(f"spills {result['stack']} bytes")
    if result["shared"] > limit:
        faults.append(f"shared memory {result['shared']} > {limit}")
    if launch.wgmma and not result["wgmma"]:
        faults.append("no wgmma")
    return result | {"faults": faults}


_launches: list[Launch] = []  # inherited by the forked workers: a kernel cannot be pickled


def _guarded(index: int) -> dict[str, Any]:
    launch = _launches[index]
    try:
        return compiled(launch)
    except Exception as error:
        return {"case": launch.case, "kernel": launch.kernel.__name__, "dtype": launch.dtype, "chip": launch.chip,
                "faults": [f"{type(error).__name__}: {error}"]}  # fmt: skip


def often(case: Case, dtype: torch.dtype, chip: int) -> bool:
    """Whether a case is compiled without --all."""
    if dtype == torch.bfloat16:
        return chip == 90 or (case.matrix_product and chip in (80, 86, 120))
    return dtype == torch.float32 and chip == 86


def wanted(everything: bool, only: str) -> list[Launch]:
    """All launches to compile, each binary once."""
    launches: dict[tuple, Launch] = {}
    for case in CASES:
        if only not in case.name or (case.rarely and not everything):
            continue
        for chip in CHIPS:
            for dtype in case.dtypes:
                if not (everything or often(case, dtype, chip)):
                    continue
                for launch in recorded(case, dtype, chip):
                    launches.setdefault(launch.key, launch)
    return list(launches.values())


def main() -> int:
    """Compile, print the table, and return 1 if a kernel fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS, choices=CHIPS)
    parser.add_argument("--dtypes", nargs="+", default=list(_TYPES.values())[:3])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    launches = wanted(arguments.all, arguments.only)
    _launches.extend(x for x in launches if x.chip in arguments.chips and x.dtype in arguments.dtypes)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing is kept between runs
        with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count() or 1)) as pool:
            results = pool.map(_guarded, range(len(_launches)), chunksize=1)
    print(f"triton {triton.__version__}: {len(results)} binaries")
    print(
        "chip   case                         kernel                           type  warps stages  regs  shared"
        "  wgmma tma"
    )
    for r in results:
        print(
            f"sm_{r['chip']:<4}{r['case']:<29}{r['kernel'].strip('_'):<33}{r['dtype']:<6}"
            + (f"{r['warps']:>5}{r['stages']:>7}{r['registers']:>6}{r['shared']:>8}{r['wgmma']:>7}{r['tma']:>4}"
               if "registers" in r else "")
            + (f"  FAILS: {'; '.join(r['faults'])}"[:1000] if r["faults"] else "")
        )  # fmt: skip
    if arguments.json:
        document = {"triton": triton.__version__, "torch": torch.__version__, "binaries": results}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    failed = sum(bool(r["faults"]) for r in results)
    print(f"{len(results) - failed} pass, {failed} fail")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
