"""The JSONL file of answers: rows appended one by one to a partial file beside it, which a later run can go on from."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qlora_kit.atomic import atomic_file, full_disk_errors
from qlora_kit.errors import OutputError

_KEY = "answers_of"


def require_new_file(path: Path, *, overwrite: bool) -> None:
    """What can be said of ``path`` before anything is loaded.

    Raises:
        OutputError: It exists and is not to be overwritten, is a folder, or its folder is not there.
    """
    if path.is_dir() or (not overwrite and os.path.lexists(path)):
        fix = "give another --out" if path.is_dir() else "give another --out, or --overwrite to replace it"
        raise OutputError(f"{path}: exists already", expected="a new file", fix=fix)
    if not path.parent.is_dir():
        raise OutputError(
            f"{path}: its folder does not exist", expected="a file in a folder that exists", fix="correct --out"
        )


class AnswerLog:
    """Rows that are on disk as soon as they are added; the file itself appears when all are there."""

    def __init__(self, path: Path, partial: Path, file: BinaryIO, done: int) -> None:
        self.path = path
        self.done = done
        self._partial = partial
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, key: str, overwrite: bool = False) -> Iterator[AnswerLog]:
        """The log of the answers to one set of questions.

        Args:
            path: The file to write at the end.
            key: Names the questions, adapters and settings; a partial file of another key is not gone on from.
            overwrite: Replace ``path`` and forget what another run left of it.

        Yields:
            The log; ``done`` rows are in it already.

        Raises:
            OutputError: As ``require_new_file``, or another run's rows or another process stand in the way, or the
                folder is not writable.
        """
        require_new_file(path, overwrite=overwrite)
        partial = path.with_name(f".{path.name}.unfinished")
        with full_disk_errors(path):
            try:
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise OutputError(
                    f"{path}: its folder cannot be written to: {error.strerror}",
                    expected="a file in a folder that exists",
                    fix="correct --out",
                ) from None
            with os.fdopen(descriptor, "r+b", buffering=0) as file:
                _lock(file, path)
                done = _rows_of(file, key, path, overwrite=overwrite)
                yield cls(path, partial, file, done)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.done += 1

    def finish(self) -> None:
        """All rows are there: the file appears, whole, and the partial one goes."""
        self._file.seek(0)
        self._file.readline()
        with atomic_file(self.path) as temporary, temporary.open("wb") as whole:
            shutil.copyfileobj(self._file, whole)
        self._partial.unlink()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise OutputError(
            f"{path}: another process is writing it", expected="one at a time", fix="wait for it, or give another --out"
        ) from None


def _rows_of(file: BinaryIO, key: str, path: Path, *, overwrite: bool) -> int:
    """How many whole rows are there; the file ends behind them."""
    head = file.readline()
    if not head.endswith(b"\n"):  # new, or its first line was never finished
        return _begin(file, key)
    if _key_of(head) != key:
        if not overwrite:
            raise OutputError(
                f"{path}: an unfinished run left answers to other prompts, adapters or settings",
                expected="the command that it was begun with, to go on from there",
                fix="repeat that command, give another --out, or --overwrite to begin again",
            )
        return _begin(file, key)
    rows, end = 0, file.tell()
    for line in iter(file.readline, b""):
        if not line.endswith(b"\n"):
            break  # cut by the kill
        rows, end = rows + 1, file.tell()
    file.truncate(end)
    file.seek(end)
    return rows


def _begin(file: BinaryIO, key: str) -> int:
    file.seek(0)
    file.truncate(0)
    file.write((json.dumps({_KEY: key}) + "\n").encode())
    return 0


def _key_of(head: bytes) -> str | None:
    try:
        content = json.loads(head)
    except ValueError:
        return None
    return content.get(_KEY) if isinstance(content, dict) else None
