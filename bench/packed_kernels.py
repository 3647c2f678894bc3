"""Products with packed weights on the CPU beside the dense product of the same run.

    python bench/packed_kernels.py bench/results/packed-kernels-cpu.json

Every matrix is rotated among copies of more than 192 MB in all, so that nothing is served from a cache. Dense is
torch in bf16, as `W @ x.T` or `linear`, whichever is faster. Medians of interleaved calls. Shapes that an earlier run
of the same machine measured and this one does not stay in the file.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import sparc3_kernels as kernels
import torch
from sparc3_kernels import native
from torch import Tensor

SHAPES = {
    "4096x4096": (4096, 4096),
    "4096x11008": (4096, 11008),
    "11008x4096": (11008, 4096),
    "8192x28672": (8192, 28672),
}
COLD = 192 << 20


def pruned(rows: int, columns: int, sparsity: float) -> Tensor:
    weight = torch.randn(rows, columns).bfloat16()
    return weight.masked_fill_(torch.rand(rows, columns) < sparsity, 0)


def two_of_four(rows: int, columns: int) -> Tensor:
    weight = torch.randn(rows, columns).bfloat16()
    bits = kernels.select_nm(weight.abs(), 2, 4)
    return kernels.apply_bits_(weight, bits)


def rotating(call: Callable[..., Tensor], packed: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    """Call on one of several copies of the packed weight, the next one each time."""
    size = sum(part.nbytes for part in packed)
    copies = [packed]
    for _ in range(COLD // size):
        copy = tuple(native.huge_empty(part.shape, part.dtype).copy_(part) for part in packed)
        copies.append(copy)
    turn = iter(range(1 << 30))
    return lambda x: call(x, *copies[next(turn) % len(copies)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--batches", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    machine = {
        "cpu": next(
            line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")
        ),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "isa": native.info()["cpu"]["isa"],
        "torch": torch.__version__,
    }
    chosen, rows_out = options.shapes.split(","), []
    if options.out.exists():
        earlier = json.loads(options.out.read_text())
        if earlier["machine"] == machine:
            rows_out = [row for row in earlier["rows"] if row["shape"] not in chosen]
    torch.manual_seed(0)
    for name in chosen:
        rows, columns = SHAPES[name]
        dense = pruned(rows, columns, 0.5)
        calls = {
            "dense W@x": rotating(lambda x, w: (w @ x.T).T, (dense,)),
            "dense linear": rotating(torch.nn.functional.linear, (dense,)),
            "bitmap 50 %": rotating(kernels.bitmap_linear, kernels.pack_bitmap(dense)),
        }
        weight = pruned(rows, columns, 0.7)
        calls["bitmap 70 %"] = rotating(kernels.bitmap_linear, kernels.pack_bitmap(weight))
        weight = pruned(rows, columns, 0.9)
        calls["bitmap 90 %"] = rotating(kernels.bitmap_linear, kernels.pack_bitmap(weight))
        weight = pruned(rows, columns, 0.95)
        calls["csr 95 %"] = rotating(kernels.csr_linear, kernels.pack_csr(weight))
        nm = kernels.pack_nm(two_of_four(rows, columns), 2, 4)
        calls["2:4"] = rotating(lambda x, v, i: kernels.nm_linear(x, v, i, 2, 4), nm)
        for batch in map(int, options.batches.split(",")):
            x = torch.randn(batch, columns).bfloat16()
            times: dict[str, list[float]] = {call: [] for call in calls}
            for _ in range(options.rounds):
                for call, function in calls.items():
                    begin = time.perf_counter()
                    function(x)
                    times[call].append((time.perf_counter() - begin) * 1e3)
            median = {call: statistics.median(t[1:]) for call, t in times.items()}
            best = min(median["dense W@x"], median["dense linear"])
            row = {"shape": name, "batch": batch, "dense_ms": best}
            row |= {f"{call} x": round(best / ms, 3) for call, ms in median.items()}
            rows_out.append(row)
            print(row, flush=True)
    options.out.write_text(
        json.dumps({"machine": machine, "unit": "times the best dense", "rows": rows_out}, indent=1)
    )


if __name__ == "__main__":
    main()
