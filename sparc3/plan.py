"""What pruning block by block takes: memory, disk, bytes read, arithmetic; and which way to go where memory is short.

All is computed from shapes, before anything is read. Where there are several passes over the model (sparc3.passes),
memory is that of the one that needs most. Names as in the formulas: L blocks, n tokens in a batch, S the bytes of
what one block received for all samples.

    weights       the largest block, twice where the next one is read ahead, twice more where the sweep prunes it
    accumulators  4 bytes for each prunable weight of the largest block, of its scores in the end
    activations   n (8 hidden + 4 attention + 6 intermediate) numbers: a block's graph and its backward
    moments       of SparseGPT and repair: 4 bytes for each pair of inputs of a block's weights; of the widest one's
                  24 besides where they are factored, otherwise 4
    solver        of repair: 48 bytes for each weight of the largest tensor
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

from sparc3.errors import InputError
from sparc3.head import LOGITS_IN_FLIGHT
from sparc3.passes import BACKWARD, FORWARD, SWEEP, VISIT, in_sweep, passes
from sparc3.shape import Shape
from sparc3.sizes import exact_size, size

_SELECTION_BYTES, _LOGIT_BYTES = 12, 16
_THREADS_AND_LIBRARIES = 64 << 20
# Second moments are fp32, and what SparseGPT factors is fp64, three times at once.
_MOMENT_BYTES, _FACTOR_BYTES = 4, 24
# Conjugate gradients hold a dozen fp32 tensors.
_SOLVER_BYTES = 48
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
    shape: Shape,
    method: str,
    pattern: str,
    budget: Budget,
    vocabulary: int,
    processes: int = 1,
    *,
    allocate: str = "uniform",
    repair: bool = False,
) -> Plan:
    """The first way that fits, of those that need ever less memory and more time.

    Args:
        shape: with the samples of one process; memory is that of one, the disk is for all of them.
        method, pattern, allocate, repair: as in sparc3.prune.

    Raises:
        InputError: none fits; it says what would suffice.
    """
    asked = _Asked(shape, method, pattern, allocate, repair, budget, vocabulary, processes)
    ways = [
        asked.way(prefetch, on_disk, spaced)
        for on_disk, spaced in (_BACKWARD_WAYS if BACKWARD in asked.kinds else _BACKWARD_WAYS[:1])
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


# How often a pass reads what is outside of the blocks, at most.
_READS_OUTSIDE = {BACKWARD: 3, FORWARD: 2, SWEEP: 2, VISIT: 1}
# Floating-point operations of a pass for each weight and token: a forward is 2; a backward is a forward, its graph's
# once more, the gradient and the weights' relevance; in the sweep a block is run dense and pruned.
_OPERATIONS = {BACKWARD: 8, FORWARD: 2, SWEEP: 4, VISIT: 0}


@dataclass(frozen=True)
class _Asked:
    """What is planned for; see ``plan``."""

    shape: Shape
    method: str
    pattern: str
    allocate: str
    repair: bool
    budget: Budget
    vocabulary: int
    processes: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """The passes; a threshold over the model is applied in one more, if not by the sweep."""
        found = passes(self.method, self.pattern, self.allocate, self.repair)
        return (*found, VISIT) if self.pattern == "global" and not self.repair else found

    def way(self, prefetch: bool, on_disk: bool, spaced: bool) -> Plan:
        shape, kinds, blocks = self.shape, self.kinds, self.shape.blocks
        spacing = math.isqrt(blocks - 1) + 1 if spaced else None
        held = {kind: self._boundaries(kind, spacing) for kind in kinds}
        on_host = {
            kind: self._on_disk_batch() if on_disk and kind == BACKWARD else held[kind] for kind in kinds
        }
        memory = [self._memory(kind, prefetch, on_host[kind]) for kind in kinds]
        visits, operations = 0, 0
        for kind in kinds:
            visits, operations = visits + blocks, operations + _OPERATIONS[kind]
            if kind == BACKWARD:
                visits += blocks
            if kind == BACKWARD and spacing is not None:
                # All but the last segment are run again, up to the block whose output is the next segment's input.
                last = blocks - spacing * ((blocks - 1) // spacing)
                visits += blocks - last - (blocks - 1) // spacing
                operations += 2
        sampled = sum(kind != VISIT for kind in kinds)
        spilled = self.pattern == "global" or self.allocate == "relevance" or self.method == "gblm"
        disk = {
            "pruned model": shape.outside + shape.block_weights * shape.itemsize,
            "mask": shape.prunable // 8,
            "small files": _SMALL_FILES,
            "masks of blocks": (2 if self.repair else 1) * shape.prunable // 8,
            "states, to resume": 2 * shape.boundary * self.processes if sampled else 0,
            "boundaries": held[BACKWARD] * self.processes if on_disk else 0,
            "scores": 4 * shape.prunable if spilled else 0,
        }
        outside = sum(map(_READS_OUTSIDE.__getitem__, kinds))
        return Plan(
            prefetch=prefetch,
            on_disk=on_disk,
            spacing=spacing,
            device=max((device for device, _ in memory), key=_peak),
            host=max((host for _, host in memory), key=_peak),
            disk=disk,
            visits=visits,
            read=shape.stored_blocks * visits // blocks + outside * shape.stored_outside,
            written=sum(disk.values()) + blocks * shape.boundary * sampled,
            operations=operations * shape.block_weights * shape.samples * shape.length,
            shape=shape,
        )

    def _boundaries(self, kind: str, spacing: int | None) -> int:
        if kind == VISIT:
            return 0
        # What goes into a block and what comes out.
        return (boundaries_held(self.shape.blocks, spacing) if kind == BACKWARD else 2) * self.shape.boundary

    def _on_disk_batch(self) -> int:
        """One batch that goes into a block and what comes out of it."""
        return 2 * self._batch_tokens() * self.shape.width * self.shape.itemsize

    def _batch_tokens(self) -> int:
        return self.shape.batch_tokens("cuda" if self.budget.separate else "cpu")

    def _memory(self, kind: str, prefetch: bool, boundaries: int) -> tuple[dict[str, int], dict[str, int]]:
        """What a pass takes on the device and beside it."""
        shape, batch = self.shape, self._batch_tokens()
        sweeps, copies = kind == SWEEP, 2 if prefetch else 1
        factored = self.method == "sparsegpt" and in_sweep(self.method, self.pattern)
        moments = sweeps and (self.repair or factored)
        # A chunk of positions at a time, at least one of every sample in the batch.
        in_flight = min(
            self.vocabulary * batch, max(LOGITS_IN_FLIGHT, self.vocabulary * batch // max(1, shape.length))
        )
        computed = {
            # The dense block is put aside while the pruned one is run.
            "weights": shape.block * (copies + 2 * sweeps),
            "accumulators": 0 if sweeps else 4 * shape.largest_prunable,
            "moments": _MOMENT_BYTES * shape.squared_inputs
            + (_FACTOR_BYTES if factored else _MOMENT_BYTES) * shape.widest_input**2
            if moments
            else 0,
            "solver": _SOLVER_BYTES * shape.largest_tensor if sweeps and self.repair else 0,
            "activations": batch * shape.numbers * shape.itemsize if kind != VISIT else 0,
            "outside of the blocks": shape.outside,
            "logits": _LOGIT_BYTES * in_flight if kind == BACKWARD else 0,
        }
        selected = {"selection": (2 if sweeps else 1) * _SELECTION_BYTES * shape.largest_tensor}
        kept = {
            "boundaries": boundaries,
            "conversion": shape.converted,
            "allocator": _THREADS_AND_LIBRARIES + copies * shape.small_weights + 4 * shape.small_prunable,
        }
        if not self.budget.separate:
            return {"process": self.budget.process, **computed, **selected, **kept}, {}
        # What was read, and pinned copies, which torch rounds up to powers of two and keeps.
        buffers = 3 * max(shape.block, shape.outside)
        host = {"process": self.budget.process, **kept, **selected, "read buffers": buffers}
        return {"process": _CUDA_CONTEXT, **computed}, host


def boundaries_held(blocks: int, spacing: int | None) -> int:
    """How many boundaries, the gradients counted as one, sparc3.engine.attribute_batches holds at most at once."""
    step = spacing or blocks
    # In each stretch of blocks: the checkpoints up to it, what the other blocks of it received, the gradients.
    return max(number + 1 + min(step, blocks - start) for number, start in enumerate(range(0, blocks, step)))
