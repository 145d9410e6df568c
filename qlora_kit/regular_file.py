"""Opens files in folders that others may change: only regular files, judged by what was opened, not by its path."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path, *, follow_links: bool = True) -> BinaryIO:
    """Open ``path`` for reading.

    What stands at a path can change after a look at it; the check here is on the open file itself, and opening a named
    pipe does not wait for its other end.

    Args:
        path: The file.
        follow_links: Whether ``path`` may be a symbolic link to a regular file.

    Raises:
        OSError: It cannot be opened, is no regular file, or is a link and links are not followed.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def folder_identity(path: Path) -> tuple[int, int, int] | None:
    """Changes when another folder takes the place of ``path``, or its entries change; None when it cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns
