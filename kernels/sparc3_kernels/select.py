"""Exact selection: which weights to keep, given one score each.

The `prune` lowest of n scores are pruned: exactly so many, and among equal scores the lower linear index is
kept. -0 and +0 are equal, +-inf are ordinary values, NaN is an error. A result is a packed mask, `bits`:
uint8 [ceil(n / 8)] over the row-major flattened scores, element i at `bits[i >> 3] >> (i & 7) & 1`, 1 = kept,
padding bits 0.

The reference is a stable sort. The CPU library finds the threshold with two counting passes, over the upper
and the lower 16 bits of a monotone 32-bit key (one pass for 16-bit scores): the radix select of Alabi et al.
2012, "Fast k-selection algorithms for graphics processing units", with a radix of 2^16. The CUDA library does the
same with histograms in shared memory, and takes rows from scores to mask bits in one kernel; it was tested in an
emulation of CUDA and has not been timed on a GPU. N:M on CUDA runs on the reference.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from sparc3_kernels import native
from sparc3_kernels.backend import choose
from sparc3_kernels.select_native import CpuSelector, CudaSelector, empty_bits, rows_on_cuda

# Multiplying eight 0/1 bytes by this moves byte i to bit 56 + i, all products landing on distinct bits.
_GATHER_BITS = 0x0102040810204080

# Scores of a difference that exist at a time: a multiple of 8, so that masks join at bytes.
DIFFERENCE_CHUNK = 1 << 20

_CHANGED = "the scores changed between two passes over them"


def pack_bits(keep: Tensor) -> Tensor:
    """Pack a bool tensor of any shape (n elements) into uint8 [ceil(n / 8)], lowest bit first."""
    flat = torch.nn.functional.pad(keep.reshape(-1).view(torch.uint8), (0, -keep.numel() % 8))
    return (flat.view(torch.int64) * _GATHER_BITS >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack uint8 [ceil(n / 8)] into a bool tensor of `shape` (n elements); True = kept.

    Raises:
        ValueError: `bits` is not uint8 or its length is not that of `shape`.
    """
    n = torch.Size(shape).numel()
    if bits.dtype != torch.uint8 or bits.numel() != (n + 7) // 8:
        raise ValueError(
            f"a packed mask for shape {tuple(shape)} is uint8 [{(n + 7) // 8}], "
            f"got {bits.dtype} [{bits.numel()}]"
        )
    place = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.reshape(-1, 1) & place).ne(0).view(-1)[:n].view(shape)


def apply_bits_(weight: Tensor, bits: Tensor) -> Tensor:
    """Set the pruned entries of `weight` (any shape, strides and float dtype) to +0 in place and return it.

    Kept entries are not touched. Raises ValueError where `bits` does not fit `weight`.
    """
    with torch.no_grad():
        return weight.masked_fill_(~unpack_bits(bits, weight.shape), 0)


def count_bits(bits: Tensor) -> int:
    """Return the number of kept entries of a packed mask."""
    pairs = bits - (bits >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return int((fours + (fours >> 4) & 0x0F).sum(dtype=torch.int64))


def select_rows_reference(scores: Tensor, prune: int) -> Tensor:
    """Plain torch `select_rows`: a stable descending sort keeps the first C - prune of each row."""
    _refuse_nan(scores)
    # Adding 0 turns -0 into +0, so that a bitwise sort (CUDA) cannot order the two zeros.
    order = torch.sort(scores + 0, dim=-1, descending=True, stable=True).indices
    keep = torch.ones_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    keep.scatter_(-1, order[:, scores.shape[-1] - prune :], False)
    return pack_bits(keep)


# torch.library.custom_op would import torch._dynamo at the first call (1.2 s) and take 11 us a call, not 2.6.
torch.library.define("sparc3::select_flat", "(Tensor scores, int prune) -> Tensor")
torch.library.define("sparc3::select_rows", "(Tensor scores, int prune) -> Tensor")
torch.library.define("sparc3::select_nm", "(Tensor scores, int n, int m) -> Tensor")


@torch.library.impl("sparc3::select_flat", "default")
def _select_flat(scores: Tensor, prune: int) -> Tensor:
    chosen = choose("select_flat", _fits(scores) | _fits_cuda(scores))
    if chosen == "reference":
        return select_rows_reference(scores.reshape(1, -1), prune)
    if chosen == "cuda":
        return _flat_on_cuda(scores.contiguous(), prune)
    library, threads = native.library(), torch.get_num_threads()
    scores, bits = scores.contiguous(), empty_bits(scores)
    work = native.workspace(library.sparc3_select_flat_workspace_size(threads))
    status = library.sparc3_select_flat(
        *(native.DTYPES[scores.dtype], scores.data_ptr(), scores.numel(), prune, bits.data_ptr(), None),
        *(threads, work.data_ptr(), work.numel()),
    )
    _check_status(status, scores)
    return bits


@torch.library.impl("sparc3::select_rows", "default")
def _select_rows(scores: Tensor, prune: int) -> Tensor:
    chosen = choose("select_rows", _fits(scores) | _fits_cuda(scores))
    if chosen == "reference":
        return select_rows_reference(scores, prune)
    scores = scores.contiguous()
    if chosen == "cuda":
        bits, status = rows_on_cuda(scores, prune)
        _check_status(status, scores)
        return bits
    library, threads, bits = native.library(), torch.get_num_threads(), empty_bits(scores)
    work = native.workspace(library.sparc3_select_rows_workspace_size(scores.shape[1], threads))
    status = library.sparc3_select_rows(
        *(native.DTYPES[scores.dtype], scores.data_ptr(), *scores.shape, prune, bits.data_ptr()),
        *(threads, work.data_ptr(), work.numel()),
    )
    _check_status(status, scores)
    return bits


@torch.library.impl("sparc3::select_nm", "default")
def _select_nm(scores: Tensor, n: int, m: int) -> Tensor:
    if choose("select_nm", _fits(scores)) == "reference":
        return select_rows_reference(scores.reshape(-1, m), m - n)
    scores, bits = scores.contiguous(), empty_bits(scores)
    status = native.library().sparc3_select_nm(
        *(native.DTYPES[scores.dtype], scores.data_ptr(), scores.numel(), n, m, bits.data_ptr()),
        torch.get_num_threads(),
    )
    _check_status(status, scores)
    return bits


@torch.library.register_fake("sparc3::select_flat")
@torch.library.register_fake("sparc3::select_rows")
def _fake(scores: Tensor, prune: int) -> Tensor:
    return empty_bits(scores)


@torch.library.register_fake("sparc3::select_nm")
def _fake_nm(scores: Tensor, n: int, m: int) -> Tensor:
    return empty_bits(scores)


def select_flat(scores: Tensor, prune: int) -> Tensor:
    """Prune the `prune` lowest of all n scores (any shape and float dtype, in row-major order).

    Returns:
        packed mask, uint8 [ceil(n / 8)].

    Raises:
        ValueError: a score is NaN, or not 0 <= prune <= n.
    """
    _check_prune(prune, scores.numel(), "scores")
    return torch.ops.sparc3.select_flat(scores, prune)


def select_rows(scores: Tensor, prune: int) -> Tensor:
    """Prune the `prune` lowest of the C scores of each row of `scores` [R, C].

    Returns:
        packed mask over the flattened tensor, uint8 [ceil(R * C / 8)].

    Raises:
        ValueError: a score is NaN, `scores` is not 2-D, or not 0 <= prune <= C.
    """
    _check_matrix(scores)
    _check_prune(prune, scores.shape[1], "scores of a row")
    return torch.ops.sparc3.select_rows(scores, prune)


def select_nm(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores along the rows of `scores` [R, C]; m <= 32.

    Returns:
        packed mask over the flattened tensor, uint8 [ceil(R * C / 8)].

    Raises:
        ValueError: a score is NaN, `scores` is not 2-D, not 0 <= n <= m, m > 32, or m does not divide C.
    """
    _check_matrix(scores)
    if not (0 <= n <= m and 1 <= m <= 32):
        raise ValueError(f"{n}:{m} needs 0 <= N <= M and 1 <= M <= 32")
    if scores.shape[1] % m:
        raise ValueError(f"{n}:{m} does not divide a row of {scores.shape[1]} scores; choose an M that does")
    return torch.ops.sparc3.select_nm(scores, n, m)


def select_stream(chunks: Callable[[], Iterable[Tensor]], prune: int) -> Iterator[Tensor]:
    """Prune the `prune` lowest scores over several tensors, taken in their order as one long row.

    Args:
        chunks: each call returns a fresh iterable over the same tensors (any shapes, one dtype), held
            one at a time: fp32 scores are read three times, 16-bit ones twice. They are selected where the
            first one lies if the libraries can, else on the CPU; the others are copied there. The reference
            backend (fp64 scores, or no native library) holds them all.
        prune: how many to prune over all tensors.

    Yields:
        one packed mask per tensor, on its device, each starting at a byte of its own.

    Raises:
        ValueError: a score is NaN, dtypes differ, the tensors change between passes, or not 0 <= prune <= n.
    """
    selector: CpuSelector | CudaSelector | None = None
    dtype: torch.dtype | None = None
    more = True
    while more:
        index = total = 0
        for chunk in chunks():
            dtype = dtype or chunk.dtype
            _check_dtype(index, chunk, dtype)
            if selector is None:
                chosen = choose("select_stream", {**_fits_cuda(chunk), "cpu": _unfit(dtype)})
                if chosen == "reference":
                    yield from _select_stream_reference(chunks, prune)
                    return
                selector = CudaSelector(dtype, chunk.device) if chosen == "cuda" else CpuSelector(dtype)
            scores = chunk.detach().to(selector.device).contiguous()
            _check_status(selector.count(scores), scores, f"tensor {index}: ")
            index, total = index + 1, total + scores.numel()
            del chunk, scores  # before the next one is made
        _check_prune(prune, total, "scores")
        if selector is None:
            return
        status, more = selector.refine(prune)
        if status == native.CHANGED:
            raise ValueError(_CHANGED)
        native.check(status)

    assert selector is not None
    kept = 0
    for chunk in chunks():
        scores = chunk.detach().to(selector.device).contiguous()
        bits = selector.mask(scores)
        kept += count_bits(bits)
        bits = bits.to(chunk.device)
        del chunk, scores
        yield bits
    if kept != total - prune:
        raise ValueError(_CHANGED)


def select_difference(pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]], prune: int) -> Iterator[Tensor]:
    """Prune the `prune` lowest of `a - b` over several pairs (a, b), as `select_stream` over the differences.

    The differences are rounded to the dtype of `a` and `b` as a subtraction of whole tensors does, and formed in one
    buffer of `DIFFERENCE_CHUNK` scores.

    Args:
        pairs: each call returns a fresh iterable over the same pairs of tensors (equal shapes, one dtype and device),
            read as often as `select_stream` reads its chunks.
        prune: how many to prune over all pairs.

    Yields:
        one packed mask per pair, on its device.

    Raises:
        ValueError: shapes or dtypes of a pair differ, and as `select_stream`: inf - inf is NaN.
    """
    pieces: list[int] = []  # of each pair, in the last pass begun

    def differences() -> Iterator[Tensor]:
        pieces.clear()
        for index, (a, b) in enumerate(pairs()):
            if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
                raise ValueError(f"pair {index}: {_described(a)} and {_described(b)} are not alike")
            parts = [part.reshape(-1).split(DIFFERENCE_CHUNK) for part in (a.detach(), b.detach())]
            pieces.append(len(parts[0]))
            buffer = a.new_empty(min(a.numel(), DIFFERENCE_CHUNK))
            for x, y in zip(*parts, strict=True):
                yield torch.sub(x, y, out=buffer[: x.numel()])

    waiting: list[Tensor] = []
    done = 0
    for bits in select_stream(differences, prune):
        waiting.append(bits)
        if len(waiting) == pieces[done]:
            yield torch.cat(waiting)
            waiting.clear()
            done += 1


def _described(scores: Tensor) -> str:
    return f"{scores.dtype} {list(scores.shape)} on {scores.device}"


def _flat_on_cuda(scores: Tensor, prune: int) -> Tensor:
    selector, more = CudaSelector(scores.dtype, scores.device), True
    while more:
        _check_status(selector.count(scores), scores)
        status, more = selector.refine(prune)
        native.check(status)
    return selector.mask(scores)


def _select_stream_reference(chunks: Callable[[], Iterable[Tensor]], prune: int) -> Iterator[Tensor]:
    """Hold all chunks and select over their concatenation."""
    scores: list[Tensor] = []
    for index, chunk in enumerate(chunks()):
        _check_dtype(index, chunk, scores[0].dtype if scores else chunk.dtype)
        _refuse_nan(chunk, f"tensor {index}: ")
        scores.append(chunk.clone())  # the next one may lie in the same memory
    flat = torch.cat([chunk.reshape(-1) for chunk in scores])
    _check_prune(prune, flat.numel(), "scores")
    keep = unpack_bits(select_rows_reference(flat[None], prune), flat.shape)
    for part in keep.split([chunk.numel() for chunk in scores]):
        yield pack_bits(part)


def _unfit(dtype: torch.dtype) -> str | None:
    return None if dtype in native.DTYPES else f"it takes fp32, bf16 and fp16 scores, not {dtype}"


def _fits(scores: Tensor) -> dict[str, str | None]:
    return {
        "cpu": _unfit(scores.dtype) if scores.device.type == "cpu" else f"the scores are on {scores.device}"
    }


def _fits_cuda(scores: Tensor) -> dict[str, str | None]:
    on = scores.device
    return {"cuda": _unfit(scores.dtype) if on.type == "cuda" else f"the scores are on {on}"}


def _check_status(status: int, scores: Tensor, where: str = "") -> None:
    if status == native.NAN:
        _refuse_nan(scores, where)
    native.check(status)


def _refuse_nan(scores: Tensor, where: str = "") -> None:
    nan = scores.isnan()
    if count := int(nan.sum()):
        first = int(nan.reshape(-1).to(torch.uint8).argmax())
        raise ValueError(
            f"{where}{count} of {scores.numel()} scores are NaN, the first at linear index {first}"
        )


def _check_dtype(index: int, chunk: Tensor, dtype: torch.dtype) -> None:
    if chunk.dtype != dtype:
        raise ValueError(f"tensor {index} has {chunk.dtype} scores, the ones before it {dtype}")


def _check_matrix(scores: Tensor) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores must be a matrix [R, C], got shape {tuple(scores.shape)}")


def _check_prune(prune: int, n: int, what: str) -> None:
    if not 0 <= prune <= n:
        raise ValueError(f"cannot prune {prune} of {n} {what}")
