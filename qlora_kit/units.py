"""Sizes and durations in units for people."""

from __future__ import annotations

import re

_UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb|mib|mb)", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """The bytes of a size such as ``24GiB`` or ``500 MB``; None where the text is no size above 0."""
    size = _SIZE.fullmatch(text.strip())
    return None if size is None else int(float(size[1]) * _UNITS[size[2].lower()]) or None


def in_units(count_bytes: float) -> str:
    """A size for people: KiB, MiB or GiB; below a KiB, bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count_bytes >= size:
            return f"{count_bytes / size:.2f} {unit}"
    return f"{count_bytes / 2**10:.0f} KiB" if count_bytes >= 2**10 else f"{count_bytes:.0f} bytes"


def counted(number: int, noun: str) -> str:
    """A number of things for people: ``1 step``, ``2,000 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def in_time(seconds: float) -> str:
    """A duration for people: seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
