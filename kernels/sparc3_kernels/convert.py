"""From one packed format to another (sparc3_kernels.bitmap, csr, nm) without the dense weight.

Bitmap and CSR have the same values and offsets: only bits or indices are made, and a kept zero stays kept. N:M holds
the nonzero values: what comes out is what packing the unpacked weight gives, bit by bit. CSR and N:M turn into each
other by way of the bits. The C libraries go row by row, on the CPU and on CUDA devices; the references of N:M unpack.
"""

import ctypes

import torch
from torch import Tensor

from sparc3_kernels import bitmap, csr, native, nm
from sparc3_kernels.backend import choose
from sparc3_kernels.packed import check_offsets, check_status
from sparc3_kernels.select import pack_bits, unpack_bits
from sparc3_kernels.select_native import stream_of


def bitmap_to_csr_indices(bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Return the CSR indices of a bitmap; values and offsets stay as they are.

    Raises:
        ValueError: what `check_bitmap` finds.
    """
    where = _where("bitmap_to_csr_indices", values)
    _check_bitmap(where, bits, values, offsets, columns)
    if where == "reference":
        kept = unpack_bits(bits, (bits.shape[0], bits.shape[1] * 8))
        return kept.nonzero()[:, 1].to(csr.index_dtype(columns))
    bits, values, offsets = bits.contiguous(), values.contiguous(), offsets.contiguous()
    indices = _empty(values, values.numel(), dtype=csr.index_dtype(columns))
    weight = bitmap.struct_of(bits, values, offsets, columns)
    status = _call("bitmap_to_csr", where, values.device, ctypes.byref(weight), indices.data_ptr())
    check_status(status, lambda: bitmap.check_bitmap(bits, values, offsets, columns))
    return indices


def csr_to_bitmap_bits(indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Return the bits of a CSR weight; values and offsets stay as they are.

    Raises:
        ValueError: what `check_csr` finds.
    """
    where = _where("csr_to_bitmap_bits", values)
    _check_csr(where, indices, values, offsets, columns)
    rows = offsets.numel() - 1
    if where == "reference":
        kept = torch.zeros(rows, bitmap.row_bytes(columns) * 8, dtype=torch.bool, device=values.device)
        kept[csr.rows_of(offsets), indices.to(torch.int64)] = True
        return pack_bits(kept).view(rows, bitmap.row_bytes(columns))
    indices, values, offsets = indices.contiguous(), values.contiguous(), offsets.contiguous()
    bits = _empty(values, rows, bitmap.row_bytes(columns), dtype=torch.uint8)
    weight = csr.struct_of(indices, values, offsets, columns)
    status = _call("csr_to_bitmap", where, values.device, ctypes.byref(weight), bits.data_ptr())
    check_status(status, lambda: csr.check_csr(indices, values, offsets, columns))
    return bits


def bitmap_to_nm(
    bits: Tensor, values: Tensor, offsets: Tensor, columns: int, n: int, m: int
) -> tuple[Tensor, Tensor]:
    """Return a bitmap as (values, indices) of an N:M weight. Waits for the device.

    Raises:
        ValueError: what `check_bitmap` finds, or what `pack_nm` refuses.
    """
    nm.check_pattern(n, m, columns)
    where = _where("bitmap_to_nm", values)
    _check_bitmap(where, bits, values, offsets, columns)
    if where == "reference":
        return nm.pack_nm_reference(bitmap.unpack_bitmap_reference(bits, values, offsets, columns), n, m)
    bits, values, offsets = bits.contiguous(), values.contiguous(), offsets.contiguous()
    rows, kept = bits.shape[0], columns // m * n
    grouped = _empty(values, rows, kept, dtype=values.dtype)
    indices = _empty(values, rows, nm.index_bytes(kept, m), dtype=torch.uint8)
    wrong = torch.full((1,), -1, device=values.device)
    weight = bitmap.struct_of(bits, values, offsets, columns)
    status = _call(
        *("bitmap_to_nm", where, values.device, ctypes.byref(weight), n, m),
        *(grouped.data_ptr(), indices.data_ptr(), wrong.data_ptr()),
    )
    if status in (native.OK, native.PATTERN) and (first := int(wrong)) >= 0:
        row, group = divmod(first, columns // m)
        begin, end = offsets[row : row + 2].tolist()
        one = (bits[row : row + 1], values[begin:end], offsets[row : row + 2] - begin)
        nm.refuse_group(bitmap.unpack_bitmap(*one, columns)[0], row, group, n, m)
    check_status(status, lambda: bitmap.check_bitmap(bits, values, offsets, columns))
    return grouped, indices


def nm_to_bitmap(values: Tensor, indices: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an N:M weight as (bits, values, offsets) of a bitmap. Waits for the device.

    Raises:
        ValueError: what `check_nm` finds.
    """
    where = _where("nm_to_bitmap", values)
    (nm.check_shapes if where == "cpu" else nm.check_nm)(values, indices, n, m)
    if where == "reference":
        return bitmap.pack_bitmap_reference(nm.unpack_nm_reference(values, indices, n, m))
    values, indices = values.contiguous(), indices.contiguous()
    rows, columns = values.shape[0], values.shape[1] // n * m
    weight, device = nm.struct_of(values, indices, n, m), values.device
    offsets = _empty(values, rows + 1, dtype=torch.int64)
    native.check(_call("nm_count_kept", where, device, ctypes.byref(weight), offsets.data_ptr()))
    kept = _empty(values, int(offsets[-1]), dtype=values.dtype)
    bits = _empty(values, rows, bitmap.row_bytes(columns), dtype=torch.uint8)
    status = _call(
        *("nm_to_bitmap", where, device, ctypes.byref(weight), offsets.data_ptr()),
        *(bits.data_ptr(), kept.data_ptr(), kept.numel()),
    )
    check_status(status, lambda: nm.check_nm(values, indices, n, m))
    return bits, kept, offsets


def csr_to_nm(
    indices: Tensor, values: Tensor, offsets: Tensor, columns: int, n: int, m: int
) -> tuple[Tensor, Tensor]:
    """Return a CSR weight as (values, indices) of an N:M weight. Waits for the device.

    Raises:
        ValueError: what `check_csr` finds, or what `pack_nm` refuses.
    """
    bits = csr_to_bitmap_bits(indices, values, offsets, columns)
    return bitmap_to_nm(bits, values, offsets, columns, n, m)


def nm_to_csr(values: Tensor, indices: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an N:M weight as (indices, values, offsets) of a CSR weight. Waits for the device.

    Raises:
        ValueError: what `check_nm` finds.
    """
    bits, kept, offsets = nm_to_bitmap(values, indices, n, m)
    return bitmap_to_csr_indices(bits, kept, offsets, values.shape[1] // n * m), kept, offsets


def _where(op: str, values: Tensor) -> str:
    """The backend of a conversion: cpu, cuda or reference."""
    device, unfit = values.device, None
    if values.dtype not in native.DTYPES:
        unfit = f"it takes fp32, bf16 and fp16, not {values.dtype}"
    elsewhere = f"the tensors are on {device}"
    return choose(
        op,
        {kind: unfit or (None if device.type == kind else elsewhere) for kind in ("cpu", "cuda")},
    )


def _call(function: str, where: str, device: torch.device, *arguments: object) -> int:
    """Status of a C function, which ends with the number of threads on the CPU and with a stream on a device."""
    if where == "cpu":
        return int(getattr(native.library(), f"sparc3_{function}")(*arguments, torch.get_num_threads()))
    with stream_of(device) as stream:
        return int(getattr(native.library("sparc3_cuda"), f"sparc3_cuda_{function}")(*arguments, stream))


def _empty(like: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    if like.device.type == "cpu":
        return native.huge_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _check_bitmap(where: str, bits: Tensor, values: Tensor, offsets: Tensor, columns: int) -> None:
    """All of it, but on the CPU, where the library notices what is wrong within the rows."""
    if where != "cpu":
        return bitmap.check_bitmap(bits, values, offsets, columns)
    bitmap.check_shapes(bits, values, offsets, columns)
    if offsets[0] != 0 or offsets[-1] != values.numel():
        check_offsets(values, offsets)


def _check_csr(where: str, indices: Tensor, values: Tensor, offsets: Tensor, columns: int) -> None:
    """Likewise."""
    if where != "cpu":
        return csr.check_csr(indices, values, offsets, columns)
    csr.check_shapes(indices, values, offsets, columns)
    if offsets[0] != 0 or offsets[-1] != values.numel():
        check_offsets(values, offsets)
