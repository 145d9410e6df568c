"""How much memory this process has taken, and how much the host, and its control groups, have left for it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_UNLIMITED_BYTES = 2**60  # version 1 of cgroups writes a number of this size for "no limit"


def peak_rss_bytes() -> int:
    """The most that was resident of this process so far, mapped files counted."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def give_back_freed_memory() -> None:
    """Let the C library return what this process has freed, where it is glibc, which keeps it otherwise.

    Tensors below 32 MiB come from its heap, which shrinks at its end only: blocks of many sizes, made and dropped by
    turns, leave it in pieces. At 28 layers of a 1.5B model, a layer at a time, it held twice what was in use.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library
        return
    trim(0)


def free_memory_bytes() -> int | None:
    """What this process can still take: the less of the two below; None where neither is known."""
    known = [free for free in (available_memory_bytes(), cgroup_free_bytes()) if free is not None]
    return min(known, default=None)


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that a new program may take, as Linux estimates it; None elsewhere."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def cgroup_free_bytes(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the process's control group, or one above it, still grants; None where nothing limits it."""
    if not membership.is_file():
        return None
    free: list[int] = []
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            top, limit, used = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):  # version 1
            top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = top / group.strip("/")
        for place in (folder, *folder.parents):
            if place == top.parent:
                break
            limit_bytes, used_bytes = _number(place / limit), _number(place / used)
            if limit_bytes is not None and used_bytes is not None and limit_bytes < _UNLIMITED_BYTES:
                free.append(limit_bytes - used_bytes)
    return min(free, default=None)


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None for ``max``, or where the file is not there."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
