"""Linears that hold packed weights only, one class for each format of docs/formats.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from sparc3_kernels import packed_cuda
from sparc3_kernels.bitmap import bitmap_linear, check_bitmap, pack_bitmap, unpack_bitmap
from sparc3_kernels.bitmap_cuda import (
    ArrangedBitmap,
    arrange_bitmap,
    arranged_bitmap_linear,
    restore_bitmap,
    unpack_arranged_bitmap,
)
from sparc3_kernels.csr import check_csr, csr_linear, index_dtype, pack_csr, unpack_csr
from sparc3_kernels.nm import check_nm, nm_linear, pack_nm, unpack_nm
from sparc3_kernels.two_of_four_cuda import (
    arrange_two_of_four,
    arranged_two_of_four_linear,
    restore_two_of_four,
    unpack_arranged_two_of_four,
)
from torch import nn

from sparc3.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shape and dtype of each stored tensor; None: the dtype of the model.
Layout = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


@dataclass(frozen=True)
class Packing:
    """What config.json says of one packed weight.

    Attributes:
        format: bitmap | nm | csr.
        shape: (out, in) of the linear, however the dense weight was stored.
        nonzero: values that are stored; for nm out * in * n / m.
        n, m: the pattern of format nm, 0 otherwise.
        transposed: the dense weight was stored as [in, out] (GPT-2's Conv1D).
    """

    format: str
    shape: tuple[int, int]
    nonzero: int
    n: int = 0
    m: int = 0
    transposed: bool = False

    @classmethod
    def read(cls, name: str, entry: Any) -> Packing:
        """From an entry of config.json; InputError naming the weight."""
        try:
            packing = cls(**{**entry, "shape": tuple(entry["shape"])})
            numbers = (*packing.shape, packing.nonzero, packing.n, packing.m)
            if len(packing.shape) != 2 or any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError("shape is two whole numbers, nonzero, n and m are one each")
            if packing.format == "nm" and not 1 <= packing.n <= packing.m <= 16:
                raise ValueError(f"{packing.n}:{packing.m} needs 1 <= N <= M <= 16")
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"config.json is damaged: its entry for {name} is unusable ({error})") from error
        if packing.format not in FORMATS:
            raise InputError(
                f"{name} is packed as {packing.format!r}, which is none of {', '.join(FORMATS)}: update sparc3"
            )
        return packing

    def entry(self) -> dict[str, Any]:
        """For config.json: everything but what is at its default."""
        default = {"n": 0, "m": 0, "transposed": False}
        return {
            key: list(value) if key == "shape" else value
            for key, value in asdict(self).items()
            if key not in default or value != default[key]
        }

    def layout(self) -> Layout:
        """Shape and dtype of each stored tensor."""
        return FORMATS[self.format].layout(self)


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W [out, in] packed: its values as ``weight``, the places where they belong as buffers.

    For inference: no gradient flows to ``weight`` or x. The values have the name of the dense weight so that a loader
    that does not know the format stops at their shape, instead of leaving the weight random.

    On a CUDA device with kernels for the format the module holds the weight in tensor-core order instead
    (``arranged``). Moving, casting and loading restore the stored form first; state dicts have it, on the host, since
    a device need not have room for the weights twice.

    Args:
        packing: what is packed, and how.
        bias: whether there is one.
        name: for messages.
        dtype, device: of the empty tensors that are made, to be filled by ``load_state_dict``.
    """

    format: ClassVar[str]
    arranged = False

    def __init__(
        self,
        packing: Packing,
        bias: bool = False,
        name: str = "weight",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.packing, self.name = packing, name
        self.out_features, self.in_features = packing.shape
        for tensor, (shape, kind) in packing.layout().items():
            empty = torch.empty(shape, dtype=kind or dtype, device=device)
            if tensor == "weight":
                self.weight = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(tensor, empty)
        self.register_parameter("bias", None)
        if bias:
            empty = torch.empty(self.out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        self.register_load_state_dict_post_hook(_check_loaded)

    @staticmethod
    def layout(packing: Packing) -> Layout:
        """Shape and dtype of each stored tensor."""
        raise NotImplementedError

    @staticmethod
    def pack_weight(weight: torch.Tensor, n: int, m: int) -> dict[str, torch.Tensor]:
        """The stored tensors of a dense weight [out, in]; ValueError where it cannot be packed so."""
        raise NotImplementedError

    @staticmethod
    def check(packing: Packing, tensors: Mapping[str, torch.Tensor]) -> None:
        """ValueError saying what is wrong with the stored tensors."""
        raise NotImplementedError

    def dense(self) -> torch.Tensor:
        """The weight [out, in] with its zeros."""
        raise NotImplementedError

    def stored(self) -> dict[str, torch.Tensor]:
        """The stored tensors, without the bias."""
        if self.arranged:
            return self._restored()
        return {name: getattr(self, name).detach() for name in self.packing.layout()}

    def arrange(self) -> None:
        """Hold the weight in tensor-core order, where the device and its library have kernels for that."""
        rows, columns = self.packing.shape
        if not self.arranged and self._can_arrange() and packed_cuda.takes(self.weight, rows, columns):
            self._hold(self._arrange())
            self.arranged = True

    def _can_arrange(self) -> bool:
        """Whether there is an order of tensor cores for this packing."""
        return False

    def _arrange(self) -> dict[str, torch.Tensor]:
        """What is held in tensor-core order, the values as ``weight``."""
        raise NotImplementedError

    def _restored(self) -> dict[str, torch.Tensor]:
        """The stored tensors again, of an arranged weight."""
        raise NotImplementedError

    def _restore(self) -> None:
        if self.arranged:
            self._hold(self._restored())
            self.arranged = False

    def _hold(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._buffers.clear()
        for name, tensor in tensors.items():
            if name == "weight":
                self.weight = nn.Parameter(tensor, requires_grad=False)
            else:
                self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseLinear:
        empty = self.weight.is_meta
        self._restore()
        super()._apply(fn, recurse)
        if not empty:  # else nothing has been loaded yet
            self.arrange()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.arranged:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        bias = {} if self.bias is None else {"bias": self.bias.detach()}
        for name, tensor in {**self.stored(), **bias}.items():
            destination[prefix + name] = tensor.cpu()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        kept = self.packing.nonzero / max(1, self.out_features * self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"kept={kept:.1%}"
        )


class BitmapLinear(SparseLinear):
    """A linear in format bitmap (sparc3_kernels.bitmap)."""

    format = "bitmap"
    bits: torch.Tensor
    offsets: torch.Tensor
    masks: torch.Tensor
    starts: torch.Tensor
    deepest: int

    @staticmethod
    def layout(packing: Packing) -> Layout:
        rows, columns = packing.shape
        return {
            "weight": ((packing.nonzero,), None),
            "bits": ((rows, (columns + 31) // 32 * 4), torch.uint8),
            "offsets": ((rows + 1,), torch.int64),
        }

    @staticmethod
    def pack_weight(weight: torch.Tensor, n: int, m: int) -> dict[str, torch.Tensor]:
        bits, values, offsets = pack_bitmap(weight)
        return {"weight": values, "bits": bits, "offsets": offsets}

    @staticmethod
    def check(packing: Packing, tensors: Mapping[str, torch.Tensor]) -> None:
        check_bitmap(tensors["bits"], tensors["weight"], tensors["offsets"], packing.shape[1])

    def _can_arrange(self) -> bool:
        return True

    def _arrange(self) -> dict[str, torch.Tensor]:
        masks, starts, values, self.deepest = arrange_bitmap(
            self.bits, self.weight.detach(), self.offsets, self.in_features
        )
        return {"weight": values, "masks": masks, "starts": starts}

    def _restored(self) -> dict[str, torch.Tensor]:
        held = ArrangedBitmap(self.masks, self.starts, self.weight.detach(), self.deepest)
        bits, values, offsets = restore_bitmap(held, *self.packing.shape)
        return {"weight": values, "bits": bits, "offsets": offsets}

    def dense(self) -> torch.Tensor:
        weight = self.weight.detach()
        if self.arranged:
            return unpack_arranged_bitmap(self.masks, self.starts, weight, self.deepest, *self.packing.shape)
        return unpack_bitmap(self.bits, weight, self.offsets, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.arranged:
            return arranged_bitmap_linear(
                x, self.masks, self.starts, self.weight, self.deepest, *self.packing.shape, self.bias
            )
        return bitmap_linear(x, self.bits, self.weight, self.offsets, self.bias)


class NMLinear(SparseLinear):
    """A linear in format nm (sparc3_kernels.nm)."""

    format = "nm"
    indices: torch.Tensor
    places: torch.Tensor

    @staticmethod
    def layout(packing: Packing) -> Layout:
        rows, kept = packing.shape[0], packing.shape[1] // packing.m * packing.n
        width = 2 if packing.m <= 4 else 4
        return {"weight": ((rows, kept), None), "indices": ((rows, (kept * width + 7) // 8), torch.uint8)}

    @staticmethod
    def pack_weight(weight: torch.Tensor, n: int, m: int) -> dict[str, torch.Tensor]:
        values, indices = pack_nm(weight, n, m)
        return {"weight": values, "indices": indices}

    @staticmethod
    def check(packing: Packing, tensors: Mapping[str, torch.Tensor]) -> None:
        check_nm(tensors["weight"], tensors["indices"], packing.n, packing.m)

    def _can_arrange(self) -> bool:
        return (self.packing.n, self.packing.m) == (2, 4)

    def _arrange(self) -> dict[str, torch.Tensor]:
        values, places = arrange_two_of_four(self.weight.detach(), self.indices)
        return {"weight": values, "places": places}

    def _restored(self) -> dict[str, torch.Tensor]:
        values, indices = restore_two_of_four(self.weight.detach(), self.places, *self.packing.shape)
        return {"weight": values, "indices": indices}

    def dense(self) -> torch.Tensor:
        weight = self.weight.detach()
        if self.arranged:
            return unpack_arranged_two_of_four(weight, self.places, *self.packing.shape)
        return unpack_nm(weight, self.indices, self.packing.n, self.packing.m)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.arranged:
            return arranged_two_of_four_linear(x, self.weight, self.places, *self.packing.shape, self.bias)
        return nm_linear(x, self.weight, self.indices, self.packing.n, self.packing.m, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.packing.n}:{self.packing.m}"


class CSRLinear(SparseLinear):
    """A linear in format csr (sparc3_kernels.csr)."""

    format = "csr"
    indices: torch.Tensor
    offsets: torch.Tensor

    @staticmethod
    def layout(packing: Packing) -> Layout:
        rows, columns = packing.shape
        return {
            "weight": ((packing.nonzero,), None),
            "indices": ((packing.nonzero,), index_dtype(columns)),
            "offsets": ((rows + 1,), torch.int64),
        }

    @staticmethod
    def pack_weight(weight: torch.Tensor, n: int, m: int) -> dict[str, torch.Tensor]:
        indices, values, offsets = pack_csr(weight)
        return {"weight": values, "indices": indices, "offsets": offsets}

    @staticmethod
    def check(packing: Packing, tensors: Mapping[str, torch.Tensor]) -> None:
        check_csr(tensors["indices"], tensors["weight"], tensors["offsets"], packing.shape[1])

    def dense(self) -> torch.Tensor:
        return unpack_csr(self.indices, self.weight.detach(), self.offsets, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return csr_linear(x, self.indices, self.weight, self.offsets, self.bias)


FORMATS: dict[str, type[SparseLinear]] = {kind.format: kind for kind in (BitmapLinear, NMLinear, CSRLinear)}


def check_packed(name: str, packing: Packing, tensors: Mapping[str, torch.Tensor]) -> None:
    """InputError naming the weight unless the stored tensors are what ``packing`` says and agree with each other."""
    for part, (shape, dtype) in packing.layout().items():
        if part not in tensors:
            raise InputError(
                f"{name} is packed as {packing.format} and lacks its {part}; the checkpoint is incomplete"
            )
        tensor = tensors[part]
        expected = DTYPES if dtype is None else (dtype,)
        if tuple(tensor.shape) != shape or tensor.dtype not in expected:
            raise InputError(
                f"{name} is damaged: its {part} is {tensor.dtype} {list(tensor.shape)}, config.json says "
                f"{' or '.join(map(str, expected))} {list(shape)}"
            )
    try:
        FORMATS[packing.format].check(packing, tensors)
    except ValueError as error:
        raise InputError(f"{name} is damaged: {error}") from error


def _check_loaded(module: SparseLinear, _: Any) -> None:
    tensors = module.stored()
    # On the meta device there are no values yet.
    if not any(tensor.is_meta for tensor in tensors.values()):
        check_packed(module.name, module.packing, tensors)
        module.arrange()
