"""What pruning block by block takes: memory, disk, bytes read, arithmetic; and which way to go where memory is short.

All is computed from shapes, before anything is read. Names as in the formulas: L blocks, n tokens in a batch, S the
bytes of what one block received for all samples.

    weights       the largest block, twice where the next one is read ahead
    accumulators  4 bytes for each prunable weight of the largest block, of its scores in the end
    activations   n (8 hidden + 4 attention + 6 intermediate) numbers: a block's graph and its backward
    moments       of SparseGPT: 4 bytes for each pair of inputs of a block's weights, 24 for each of the widest one's
    boundaries    (L + 1) S, gradients included, or about 2 sqrt(L) S where the blocks between are run again
    states        2 S on disk: the gradients of the last block that was done, and of the one before
    read buffers  beside a GPU: a block or what is outside, as it is read, and pinned copies of up to twice that
    selection     12 bytes for each weight of the largest tensor: ranked scores, bits, and the pruned weight
    logits        16 bytes for each of the logits in flight, beside what is outside of the blocks
    conversion    the checkpoint's bytes of a block, where the model is run in another dtype
    allocator     what small tensors take once more, since they may lie beside what was freed, and 64 MiB of libraries
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from sparc3.compress import SEQUENTIAL
from sparc3.errors import InputError
from sparc3.head import LOGITS_IN_FLIGHT
from sparc3.shape import Shape
from sparc3.sizes import exact_size, size

_SELECTION_BYTES, _LOGIT_BYTES = 12, 16
_THREADS_AND_LIBRARIES = 64 << 20
# SparseGPT's second moments are fp32, and what it factors is fp64, three times at once.
_MOMENT_BYTES, _FACTOR_BYTES = 4, 24
# The tokenizer, configs, the report and headers.
_SMALL_FILES = 32 << 20
# What a CUDA context and its libraries take before anything is allocated.
_CUDA_CONTEXT = 512 << 20


@dataclass(frozen=True)
class Budget:
    """Bytes that may be taken, and what is taken before anything begins.

    Attributes:
        device, host: of memory; the same number where the device is the CPU.
        disk: free where the output goes.
        process: resident bytes of the process as it is.
        separate: the device has memory of its own.
        scratch: free where scratch files go; None: they go where the output goes.
    """

    device: int
    host: int
    disk: int
    process: int
    separate: bool
    scratch: int | None = None


@dataclass(frozen=True)
class Plan:
    """One way to go, and what it takes in bytes.

    Attributes:
        prefetch: the next block is read while one is used.
        on_disk: boundaries are kept on disk, not in host memory.
        spacing: every how many blocks a boundary is kept; None: all.
        device, host, disk: {what: bytes}; where the device is the CPU all memory is under device.
        visits: how often some block is visited.
        read, written: bytes from the checkpoint; to disk, scratch files included.
        operations: floating-point operations of the linears.
    """

    prefetch: bool
    on_disk: bool
    spacing: int | None
    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    visits: int
    read: int
    written: int
    operations: int
    shape: Shape = field(repr=False)

    @property
    def device_bytes(self) -> int:
        """At most at once: the blocks' turn or that of what is outside of them."""
        return _peak(self.device)

    @property
    def host_bytes(self) -> int:
        return _peak(self.host)

    @property
    def disk_bytes(self) -> int:
        return sum(self.disk.values())

    @property
    def output_bytes(self) -> int:
        """What of the disk is taken where the output is; the rest goes to scratch files."""
        return sum(self.disk[name] for name in _OUTPUT)

    def as_json(self) -> dict:
        totals = {"device": self.device_bytes, "host": self.host_bytes, "disk": self.disk_bytes}
        return {**asdict(self), "totals": totals}


_OUTPUT = ("pruned model", "mask", "small files")
_ALWAYS = ("process", "allocator", "boundaries", "read buffers", "conversion")
_OUTSIDE_TURN = ("outside of the blocks", "logits")


def _peak(parts: Mapping[str, int]) -> int:
    outside = sum(parts.get(name, 0) for name in _OUTSIDE_TURN)
    always = sum(parts.get(name, 0) for name in _ALWAYS)
    return always + max(outside, sum(parts.values()) - outside - always)


def plan(
    shape: Shape, method: str, pattern: str, budget: Budget, vocabulary: int, processes: int = 1
) -> Plan:
    """The first way that fits, of those that need ever less memory and more time.

    Args:
        shape: with the samples of one process; memory is that of one, the disk is for all of them.

    Raises:
        InputError: none fits; it says what would suffice.
    """
    ways = [
        _way(shape, method, pattern, budget, vocabulary, prefetch, on_disk, spaced, processes)
        for on_disk, spaced in (_BACKWARD_WAYS if _goes_backward(method) else _BACKWARD_WAYS[:1])
        for prefetch in (True, False)
    ]
    for way in ways:
        if (
            way.device_bytes <= budget.device
            and way.host_bytes <= budget.host
            and not _disk_refusal(way, budget)
        ):
            return way
    raise InputError(_refusal(ways, budget))


# (boundaries on disk, only some of them)
_BACKWARD_WAYS = ((False, False), (True, False), (False, True), (True, True))


def _goes_backward(method: str) -> bool:
    return method not in ("magnitude", "random", *SEQUENTIAL)


def _refusal(ways: list[Plan], budget: Budget) -> str:
    device = min(way.device_bytes for way in ways)
    if device > budget.device:
        return (
            f"--max-memory {size(budget.device)} does not suffice: this needs {exact_size(device)} at least"
        )
    possible = [way for way in ways if way.device_bytes <= budget.device]
    host = min(way.host_bytes for way in possible)
    if host > budget.host:
        return (
            f"--max-host-memory {size(budget.host)} does not suffice: this needs {exact_size(host)} at least"
        )
    possible = [way for way in possible if way.host_bytes <= budget.host]
    return _disk_refusal(min(possible, key=lambda way: way.disk_bytes), budget)


def _disk_refusal(way: Plan, budget: Budget) -> str:
    """What to say where a way does not fit the disks; empty where it does."""
    output, scratch = way.output_bytes, way.disk_bytes - way.output_bytes
    if budget.scratch is None and way.disk_bytes > budget.disk:
        return (
            f"the disk of --out has {size(budget.disk)} free and this needs {exact_size(way.disk_bytes)} at least, "
            f"{size(scratch)} of it for a while: free some, put that on another disk with --offload-dir, or allow "
            "more memory"
        )
    if budget.scratch is not None and output > budget.disk:
        return (
            f"the disk of --out has {size(budget.disk)} free and this needs {exact_size(output)} at least: free some "
            "or name a folder on another disk"
        )
    if budget.scratch is not None and scratch > budget.scratch:
        return (
            f"the disk of --offload-dir has {size(budget.scratch)} free and this needs {exact_size(scratch)} at "
            "least: free some, name a folder on another disk, or allow more memory"
        )
    return ""


def _way(
    shape: Shape,
    method: str,
    pattern: str,
    budget: Budget,
    vocabulary: int,
    prefetch: bool,
    on_disk: bool,
    spaced: bool,
    processes: int,
) -> Plan:
    blocks, boundary = shape.blocks, shape.boundary
    sampled = method not in ("magnitude", "random")
    backward = _goes_backward(method)
    spacing = math.isqrt(blocks - 1) + 1 if spaced else None
    if not backward:
        held = 2 * boundary if sampled else 0  # what goes into a block and what comes out
    else:
        held = boundaries_held(blocks, spacing) * boundary
    copies = 2 if prefetch else 1
    sequential = method in SEQUENTIAL
    scored_whole = not sequential or pattern == "global"
    # The dense block is put aside while the pruned one is run.
    weights = shape.block * (copies + 2 * sequential)
    batch = shape.batch_tokens
    # A chunk of positions at a time, at least one of every sample in the batch.
    in_flight = min(vocabulary * batch, max(LOGITS_IN_FLIGHT, vocabulary * batch // max(1, shape.length)))
    computed = {
        "weights": weights,
        "accumulators": 4 * shape.largest_prunable if scored_whole else 0,
        "moments": _MOMENT_BYTES * shape.squared_inputs + _FACTOR_BYTES * shape.widest_input**2
        if method == "sparsegpt"
        else 0,
        "activations": batch * shape.numbers * shape.itemsize if sampled else 0,
        "outside of the blocks": shape.outside,
        "logits": _LOGIT_BYTES * in_flight if backward else 0,
    }
    selected = {"selection": (2 if sequential else 1) * _SELECTION_BYTES * shape.largest_tensor}
    kept = {
        # One batch that goes into a block and what comes out of it.
        "boundaries": 2 * batch * shape.width * shape.itemsize if on_disk else held,
        "conversion": shape.converted,
        "allocator": _THREADS_AND_LIBRARIES + copies * shape.small_weights + 4 * shape.small_prunable,
    }
    if budget.separate:
        device = {"process": _CUDA_CONTEXT, **computed}
        # What was read, and pinned copies, which torch rounds up to powers of two and keeps.
        buffers = 3 * max(shape.block, shape.outside)
        host = {"process": budget.process, **kept, **selected, "read buffers": buffers}
    else:
        device, host = {"process": budget.process, **computed, **selected, **kept}, {}
    scores = 4 * shape.prunable if pattern == "global" else 0
    model = shape.outside + shape.block_weights * shape.itemsize
    disk = {
        "pruned model": model,
        "mask": shape.prunable // 8,
        "small files": _SMALL_FILES,
        "masks of blocks": shape.prunable // 8,
        "states, to resume": 2 * boundary * processes if sampled else 0,
        "boundaries": held * processes if on_disk else 0,
        "scores": scores,
    }
    passes = (2 if backward else 1) + (pattern == "global")
    again = backward and spacing is not None
    visits = passes * blocks
    if again and spacing is not None:
        # All but the last segment are run again, up to the block whose output is the next segment's input.
        last = blocks - spacing * ((blocks - 1) // spacing)
        visits += blocks - last - (blocks - 1) // spacing
    tokens = shape.samples * shape.length
    # A forward is 2 for each weight and token; a backward is a forward, the gradient and the weights' relevance.
    per_weight = (8 + 2 * again if backward else 4) if sampled else 0
    return Plan(
        prefetch=prefetch,
        on_disk=on_disk,
        spacing=spacing,
        device=device,
        host=host,
        disk=disk,
        visits=visits,
        read=shape.stored_blocks * visits // blocks + (3 if backward else 2) * shape.stored_outside,
        written=sum(disk.values()) + (blocks * boundary if sampled else 0),
        operations=per_weight * shape.block_weights * tokens,
        shape=shape,
    )


def boundaries_held(blocks: int, spacing: int | None) -> int:
    """How many boundaries, the gradients counted as one, sparc3.engine.attribute_batches holds at most at once."""
    step = spacing or blocks
    # In each stretch of blocks: the checkpoints up to it, what the other blocks of it received, the gradients.
    return max(number + 1 + min(step, blocks - start) for number, start in enumerate(range(0, blocks, step)))
