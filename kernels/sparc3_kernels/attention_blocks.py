"""What the attention kernels share: a program's sequence, its blocks of keys, their scores and their masks."""

from torch import Tensor

from sparc3_kernels.triton_support import jit, tl


@jit
def sequence_of(begin_ptr, end_ptr, batch_step, tokens):
    """(batch, first token, length) of the sequence of this program; batch_step is 0 where sequences are packed."""
    sequence = tl.program_id(2).to(tl.int64)
    begin, end = tl.cast(0, tl.int64), tl.cast(tokens, tl.int64)
    if begin_ptr is not None:
        begin, end = tl.load(begin_ptr + sequence).to(tl.int64), tl.load(end_ptr + sequence).to(tl.int64)
    return sequence * batch_step, begin, (end - begin).to(tl.int32)


@jit
def keys_of(
    start,
    length,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(first, whole, last) for queries from `start`: they see all keys from first to whole, and after those some."""
    first, last = 0, tl.where(start < length, length, 0)
    whole = length // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = tl.minimum(last, start + BLOCK_M)
        whole = tl.minimum(whole, start // BLOCK_N * BLOCK_N)
    if WINDOW:
        first = tl.maximum(0, start - window + 1) // BLOCK_N * BLOCK_N
        whole = first
    return first, tl.minimum(whole, last), last


@jit
def load_block(pointer, rows, stride, d, length, width, MASKED: tl.constexpr, EVEN_D: tl.constexpr):
    """A block [rows, D]; zeros beyond the sequence and the head."""
    place = pointer + rows[:, None] * stride + d[None, :]
    if MASKED:
        live = (rows < length)[:, None] if EVEN_D else (rows < length)[:, None] & (d < width)[None, :]
        return tl.load(place, mask=live, other=0.0)
    elif EVEN_D:
        return tl.load(place)
    else:
        return tl.load(place, mask=(d < width)[None, :], other=0.0)


@jit
def score_block(raw, scale, softcap, SOFTCAP: tl.constexpr):
    """s of raw = q . k; tanh(x) = 2 sigmoid(2 x) - 1."""
    s = raw * scale
    if SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return s


@jit
def seen_block(i, j, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which of keys j queries i see; i and j broadcast against each other."""
    seen = (i < length) & (j < length)
    if CAUSAL:
        seen = seen & (i >= j)
    if WINDOW:
        seen = seen & (i - j < window)
    return seen


def block_width(width: int) -> int:
    """Head dimension as a block has it."""
    return max(16, 1 << (width - 1).bit_length())


def sequences_of(q: Tensor, begin: Tensor | None) -> int:
    """How many sequences there are: samples, or the packed ones of one sample."""
    return q.shape[0] if begin is None else len(begin)


def layout(q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None) -> tuple[int, ...]:
    """What every kernel is told of its inputs: strides of batch, head and token of q, k and v, and the sizes."""
    batch, heads, tokens, width = q.shape
    steps = (step for x in (q, k, v) for step in x.stride()[:3])
    return *steps, int(sequences_of(q, begin) == batch), tokens, heads, heads // k.shape[1], width


def switches(width: int, causal: bool, window: int, softcap: float) -> dict[str, bool | int]:
    """Constants of every kernel."""
    block = block_width(width)
    return {
        "CAUSAL": causal,
        "WINDOW": window > 0,
        "SOFTCAP": softcap > 0,
        "BLOCK_D": block,
        "EVEN_D": width == block,
    }


def last_contiguous(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
