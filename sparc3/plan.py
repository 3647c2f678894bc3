"""What pruning block by block takes: memory, disk, bytes read, arithmetic; and which way to go where memory is short.

All is computed from shapes, before anything is read. Names as in the formulas: L blocks, n tokens in a batch, S the
bytes of what one block received for all samples.

    weights       the largest block, twice where the next one is read ahead
    accumulators  4 bytes for each prunable weight of the largest block
    activations   n (8 hidden + 4 attention + 6 intermediate) numbers: a block's graph and its backward
    moments       of SparseGPT: 4 bytes for each pair of inputs of a block's weights, 24 for each of the widest one's
    boundaries    (L + 1) S, gradients included, or about 2 sqrt(L) S where the blocks between are run again
    selection     12 bytes for each weight of the largest tensor: ranked scores, bits, and the pruned weight
    logits        16 bytes for each of the logits in flight, beside what is outside of the blocks
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from transformers import PreTrainedModel

from sparc3.checkpoint import Checkpoint
from sparc3.compress import SEQUENTIAL
from sparc3.engine import LOGITS_IN_FLIGHT
from sparc3.errors import InputError
from sparc3.families import Prunable, blocks_of, family_of
from sparc3.scores import TOKENS_IN_FLIGHT
from sparc3.timing import synchronize

_SELECTION_BYTES, _LOGIT_BYTES = 12, 16
# SparseGPT's second moments are fp32, and what it factors is fp64, three times at once.
_MOMENT_BYTES, _FACTOR_BYTES = 4, 24
# What a CUDA context and its libraries take before anything is allocated.
_CUDA_CONTEXT = 512 << 20


@dataclass(frozen=True)
class Shape:
    """What a plan depends on of a model, its checkpoint and the samples.

    Attributes:
        blocks: how many.
        block, outside: bytes in memory of the largest block, and of what is outside of the blocks.
        stored_blocks, stored_outside: bytes of the checkpoint.
        prunable, largest_prunable, largest_tensor: weights in all, in the block that has most, in one tensor.
        widest_input, squared_inputs: the most inputs that a weight has, and the sum of their squares over the weights
            of the block that has most.
        width, numbers: of a token in what a block receives, and in a block's activations.
        itemsize: bytes of a number.
        samples, length: reference samples and their tokens.
    """

    blocks: int
    block: int
    outside: int
    stored_blocks: int
    stored_outside: int
    prunable: int
    largest_prunable: int
    largest_tensor: int
    widest_input: int
    squared_inputs: int
    block_weights: int
    width: int
    numbers: int
    itemsize: int
    samples: int
    length: int

    @property
    def boundary(self) -> int:
        """Bytes of what one block received, for all samples."""
        return self.samples * self.length * self.width * self.itemsize

    @property
    def batch_tokens(self) -> int:
        return min(self.samples, max(1, TOKENS_IN_FLIGHT // max(1, self.length))) * self.length


def shape_of(
    model: PreTrainedModel,
    weights: Mapping[str, Prunable],
    samples: int,
    length: int,
    checkpoint: Checkpoint | None = None,
) -> Shape:
    """Of an empty model (sparc3.weights.empty_model); without a checkpoint its bytes are those in memory."""
    config, prefix = model.config, family_of(model).blocks
    blocks = [sum(tensor.nbytes for tensor in block.state_dict().values()) for block in blocks_of(model)]
    everything = {tensor.data_ptr() or id(tensor): tensor for tensor in _distinct(model)}
    outside = sum(tensor.nbytes for tensor in everything.values()) - sum(blocks)
    per_block, squared = [0] * (len(blocks) + 1), [0] * (len(blocks) + 1)
    for name, weight in weights.items():
        inside = name.startswith(f"{prefix}.")
        index = int(name.removeprefix(f"{prefix}.").split(".")[0]) if inside else len(blocks)
        per_block[index] += weight.weight.numel()
        squared[index] += _inputs(weight) ** 2 * math.prod(weight.weight.shape[:-2])
    stored_blocks, stored_outside = sum(blocks), outside
    if checkpoint is not None:
        from sparc3.weights import OUTSIDE, block_groups

        groups = block_groups(model, checkpoint)
        stored_outside = sum(stored.bytes for stored in groups.get(OUTSIDE, {}).values())
        stored_blocks = checkpoint.bytes - stored_outside
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = head * (heads + 2 * (getattr(config, "num_key_value_heads", None) or heads))
    # GPT-2 names it n_inner, OPT ffn_dim; experts have one of their own, which each token passes several times.
    inner = [getattr(config, name, None) or 0 for name in ("intermediate_size", "ffn_dim", "n_inner")]
    experts = (getattr(config, "moe_intermediate_size", None) or inner[0]) * (
        getattr(config, "num_experts_per_tok", None) or 0
    )
    intermediate = max(*inner, experts) or 4 * config.hidden_size
    return Shape(
        blocks=len(blocks),
        block=max(blocks),
        outside=outside,
        stored_blocks=stored_blocks,
        stored_outside=stored_outside,
        prunable=sum(per_block),
        largest_prunable=max(per_block),
        largest_tensor=max(weight.weight.numel() for weight in weights.values()),
        widest_input=max(_inputs(weight) for weight in weights.values()),
        squared_inputs=max(squared),
        block_weights=sum(blocks) // model.dtype.itemsize,
        width=config.hidden_size,
        numbers=8 * config.hidden_size + 4 * attention + 6 * intermediate,
        itemsize=model.dtype.itemsize,
        samples=samples,
        length=length,
    )


def _inputs(weight: Prunable) -> int:
    return weight.weight.shape[-2 if weight.transposed else -1]


def _distinct(model: PreTrainedModel) -> list[torch.Tensor]:
    """Parameters once each, tied ones too, and the buffers that are saved."""
    saved = set(model.state_dict())
    return [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in saved)]


@dataclass(frozen=True)
class Budget:
    """Bytes that may be taken, and what is taken before anything begins.

    Attributes:
        device, host: of memory; the same number where the device is the CPU.
        disk: free where scratch files go.
        process: resident bytes of the process as it is.
        separate: the device has memory of its own.
    """

    device: int
    host: int
    disk: int
    process: int
    separate: bool


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

    def as_json(self) -> dict:
        totals = {"device": self.device_bytes, "host": self.host_bytes, "disk": self.disk_bytes}
        return {**asdict(self), "totals": totals}


_OUTSIDE_TURN = ("outside of the blocks", "logits")


def _peak(parts: Mapping[str, int]) -> int:
    outside = sum(parts.get(name, 0) for name in _OUTSIDE_TURN)
    always = sum(parts.get(name, 0) for name in ("process", "boundaries", "read buffers"))
    return always + max(outside, sum(parts.values()) - outside - always)


def plan(
    shape: Shape, method: str, pattern: str, budget: Budget, vocabulary: int, out_bytes: int | None = None
) -> Plan:
    """The first way that fits, of those that need ever less memory and more time.

    Raises:
        InputError: none fits; it says what would suffice.
    """
    ways = [
        _way(shape, method, pattern, budget, vocabulary, prefetch, on_disk, spaced)
        for on_disk, spaced in (_BACKWARD_WAYS if _goes_backward(method) else _BACKWARD_WAYS[:1])
        for prefetch in (True, False)
    ]
    for way in ways:
        if (
            way.device_bytes <= budget.device
            and way.host_bytes <= budget.host
            and way.disk_bytes <= budget.disk
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
    disk = min(way.disk_bytes for way in possible)
    return (
        f"the disk has {size(budget.disk)} free and this needs {exact_size(disk)} at least: free some, name a folder "
        "with more space with --offload-dir, or allow more memory"
    )


def _way(
    shape: Shape,
    method: str,
    pattern: str,
    budget: Budget,
    vocabulary: int,
    prefetch: bool,
    on_disk: bool,
    spaced: bool,
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
    # The dense block is put aside while the pruned one is run.
    weights = shape.block * (copies + 2 * sequential)
    batch = shape.batch_tokens
    # A chunk of positions at a time, at least one of every sample in the batch.
    in_flight = min(vocabulary * batch, max(LOGITS_IN_FLIGHT, vocabulary * batch // max(1, shape.length)))
    computed = {
        "weights": weights,
        "accumulators": 4 * shape.largest_prunable if backward or (sequential and pattern == "global") else 0,
        "moments": _MOMENT_BYTES * shape.squared_inputs + _FACTOR_BYTES * shape.widest_input**2
        if method == "sparsegpt"
        else 0,
        "activations": batch * shape.numbers * shape.itemsize if sampled else 0,
        "outside of the blocks": shape.outside,
        "logits": _LOGIT_BYTES * in_flight if backward else 0,
    }
    selected = {"selection": (2 if sequential else 1) * _SELECTION_BYTES * shape.largest_tensor}
    kept = {"boundaries": boundary // max(1, shape.samples) if on_disk else held}
    if budget.separate:
        device = {"process": _CUDA_CONTEXT, **computed}
        host = {"process": budget.process, **kept, **selected, "read buffers": copies * shape.block}
    else:
        device, host = {"process": budget.process, **computed, **selected, **kept}, {}
    scores = 4 * shape.prunable if pattern == "global" else 0
    model = shape.outside + shape.block_weights * shape.itemsize
    disk = {
        "pruned model": model,
        # The bits of every block by itself, and then in one file.
        "masks": 2 * (shape.prunable // 8),
        "gradients, to resume": 2 * boundary if sampled else 0,
        "boundaries": held if on_disk else 0,
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


# How long each of the two speeds is measured, and on how much.
_MEASURED_SECONDS, _MEASURED_BYTES, _MEASURED_WIDTH = 0.3, 1 << 28, 2048


def estimate_seconds(
    way: Plan, device: torch.device, dtype: torch.dtype, checkpoint: Checkpoint | None
) -> float:
    """Seconds that a plan takes, from the speed of a matrix product and of reading, measured now.

    Attention, norms, selection and writing are left out.
    """
    computing = way.operations / _operations_per_second(device, dtype, max(1, way.shape.batch_tokens))
    reading = 0.0 if checkpoint is None else way.read / _bytes_per_second(checkpoint)
    return max(computing, reading) if way.prefetch else computing + reading


def _operations_per_second(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    x = torch.ones(rows, _MEASURED_WIDTH, device=device, dtype=dtype)
    w = torch.ones(_MEASURED_WIDTH, _MEASURED_WIDTH, device=device, dtype=dtype)
    x @ w
    synchronize(device)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < _MEASURED_SECONDS:
        x @ w
        synchronize(device)
        products += 1
    return 2 * rows * _MEASURED_WIDTH**2 * products / (time.perf_counter() - start)


def _bytes_per_second(checkpoint: Checkpoint) -> float:
    start, count = time.perf_counter(), 0
    for stored in checkpoint.tensors.values():
        stored.read()
        count += stored.bytes
        if count >= _MEASURED_BYTES:
            break
    return count / (time.perf_counter() - start)


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Bytes in words, as 7.9 GiB."""
    power = min(len(_UNITS) - 1, max(0, (int(count).bit_length() - 1) // 10))
    return f"{count} B" if power == 0 else f"{count / 1024**power:.3g} {_UNITS[power]}"


def exact_size(count: int) -> str:
    """Bytes rounded up to whole MiB, to be given back as an option."""
    return f"{-(-count // (1 << 20))}MiB"


def parse_size(text: str) -> int:
    """Bytes of a size such as 8GiB, 500MB or 1e9; InputError for anything else."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units |= {f"{letter}IB": 1024**power, f"{letter}B": 1000**power, letter: 1024**power}
    stripped = text.strip()
    number = stripped.rstrip("BbIiKkMmGgTt ")
    try:
        count = float(number) * units[stripped[len(number) :].strip().upper()]
        if not 0 < count < math.inf:
            raise ValueError
    except (ValueError, KeyError):
        raise InputError(f"{text!r} is not a size; give one such as 8GiB, 500MB or 1000000") from None
    return int(count)
