"""A streaming selection in the C libraries: on the CPU, or on the CUDA device that holds the scores.

Both are fed in the same order: `count` all scores, `refine`, and once more where it says so; then `mask` each
chunk in linear order. `threshold` is what was found, before the first mask. Statuses are those of sparc3.h.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from sparc3_kernels import native


def empty_bits(scores: Tensor) -> Tensor:
    """Uninitialised packed mask for `scores`, uint8 [ceil(n / 8)] on their device."""
    return scores.new_empty((scores.numel() + 7) // 8, dtype=torch.uint8)


class CpuSelector:
    """libsparc3's: contiguous scores of `dtype` on the CPU, counted by torch's number of threads."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._library, self._threads = native.library(), torch.get_num_threads()
        self._state = native.workspace(self._library.sparc3_select_state_size())
        self._work = native.workspace(self._library.sparc3_select_workspace_size(self._threads))
        self.threshold = native.Threshold()
        self.device = torch.device("cpu")
        native.check(self._library.sparc3_select_init(self._state.data_ptr(), native.DTYPES[dtype]))

    def count(self, scores: Tensor) -> int:
        """Status of counting one chunk."""
        return self._library.sparc3_select_count(
            *(self._state.data_ptr(), scores.data_ptr(), scores.numel()),
            *(self._threads, self._work.data_ptr(), self._work.numel()),
        )

    def refine(self, prune: int) -> tuple[int, bool]:
        """Status of closing a pass, and whether all scores must be counted once more."""
        more = ctypes.c_int()
        status = self._library.sparc3_select_refine(self._state.data_ptr(), prune, ctypes.byref(more))
        if status == native.OK and not more.value:
            status = self._library.sparc3_select_threshold(
                self._state.data_ptr(), ctypes.byref(self.threshold)
            )
        return status, bool(more.value)

    def mask(self, scores: Tensor) -> Tensor:
        """Packed mask of the next chunk."""
        bits = empty_bits(scores)
        native.check(
            self._library.sparc3_select_mask(
                *(native.DTYPES[scores.dtype], scores.data_ptr(), scores.numel()),
                *(ctypes.byref(self.threshold), bits.data_ptr(), self._threads),
            )
        )
        return bits


@contextlib.contextmanager
def stream_of(device: torch.device) -> Iterator[int]:
    """Make `device` the current one, and give the handle of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


class CudaSelector:
    """libsparc3_cuda's: contiguous scores of `dtype` on `device`. `count` and `refine` wait for their result."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._library, self.device = native.library("sparc3_cuda"), device
        self._dtype, self.threshold = native.DTYPES[dtype], native.Threshold()
        size = self._library.sparc3_cuda_select_state_size()
        self._state = torch.empty(size, dtype=torch.uint8, device=device)
        with stream_of(device) as stream:
            native.check(self._library.sparc3_cuda_select_init(self._state.data_ptr(), self._dtype, stream))

    def count(self, scores: Tensor) -> int:
        """Status of counting one chunk."""
        with stream_of(self.device) as stream:
            native.check(
                self._library.sparc3_cuda_select_count(
                    *(self._state.data_ptr(), self._dtype, scores.data_ptr(), scores.numel(), stream)
                )
            )
            status = self._status(stream)
        return native.OK if status == native.STATE else status

    def refine(self, prune: int) -> tuple[int, bool]:
        """Status of closing a pass, and whether all scores must be counted once more."""
        with stream_of(self.device) as stream:
            native.check(self._library.sparc3_cuda_select_refine(self._state.data_ptr(), prune, stream))
            status = self._status(stream)
        return (native.OK, True) if status == native.STATE else (status, False)

    def mask(self, scores: Tensor) -> Tensor:
        """Packed mask of the next chunk."""
        bits = empty_bits(scores)
        size = self._library.sparc3_cuda_select_mask_workspace_size(scores.numel())
        work = torch.empty(size, dtype=torch.uint8, device=self.device)
        with stream_of(self.device) as stream:
            native.check(
                self._library.sparc3_cuda_select_mask(
                    *(self._state.data_ptr(), self._dtype, scores.data_ptr(), scores.numel()),
                    *(bits.data_ptr(), work.data_ptr(), work.numel(), stream),
                )
            )
        return bits

    def _status(self, stream: int) -> int:
        """What went wrong on the device, STATE before the threshold is known."""
        return self._library.sparc3_cuda_select_threshold(
            self._state.data_ptr(), ctypes.byref(self.threshold), stream
        )


def rows_on_cuda(scores: Tensor, prune: int) -> tuple[Tensor, int]:
    """Packed mask that prunes the `prune` lowest of each row of contiguous `scores` [R, C], and the status."""
    bits = empty_bits(scores)
    error = torch.empty(1, dtype=torch.int32, device=scores.device)
    with stream_of(scores.device) as stream:
        native.check(
            native.library("sparc3_cuda").sparc3_cuda_select_rows(
                *(native.DTYPES[scores.dtype], scores.data_ptr(), *scores.shape, prune),
                *(bits.data_ptr(), error.data_ptr(), stream),
            )
        )
    return bits, int(error.item())
