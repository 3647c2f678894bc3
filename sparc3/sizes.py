"""Sizes in bytes, in words and out of them."""

from __future__ import annotations

import math

from sparc3.errors import InputError

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
