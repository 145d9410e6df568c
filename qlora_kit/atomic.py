"""Writes files and folders so that they appear whole or not at all: a temporary sibling, synced, then renamed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qlora_kit.errors import OutputError

logger = logging.getLogger(__name__)

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_FULL_DISK_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",  # torch.save says no more than that it could not write,
    ". unexpected pos ",  # and this when it then closes the file
)
_LEFTOVER = re.compile(r"^\.(?P<name>.+)\.[0-9a-f]{12}\.(?P<kind>partial|old)$", re.DOTALL)


def is_leftover(name: str) -> bool:
    """Whether ``name`` is that of a temporary sibling, which only a killed process leaves behind."""
    return _LEFTOVER.match(name) is not None


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside ``target`` to write into: it becomes ``target`` when the block ends, vanishes when it raises.

    Args:
        target: The folder to make; missing parents are made too (and removed again on failure). A link is followed.
        overwrite: Replace an occupied ``target``. It stays untouched until the new folder is complete and on disk.

    Yields:
        The empty temporary folder, on the file system of ``target``.

    Raises:
        OutputError: ``target`` is occupied, its parent cannot be written to, or the disk is full.
    """
    target = checked_target(target)
    with _disk_errors(target, target):
        _restore_moved_aside(target)
        _refuse_occupied(target, overwrite=overwrite)
    with _parents(target.parent), ExitStack() as held:
        with _disk_errors(target, target):
            _delete_abandoned(target)
            temporary = held.enter_context(_locked_sibling(target))
        try:
            with full_disk_errors(target):
                yield temporary
                _sync_tree(temporary)
            with _disk_errors(target, temporary):
                _refuse_occupied(target, overwrite=overwrite)
                _swap_in(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write one file to: it replaces ``path`` when the block ends, vanishes when it raises.

    Raises:
        OutputError: ``path`` is a folder, its parent is missing or cannot be written to, or the disk is full.
    """
    path = Path(os.path.realpath(path))
    with _disk_errors(path, path):
        if path.is_dir():
            raise OutputError(f"{path}: is a folder", expected="the path of a file", fix="give another path")
    temporary = _sibling(path, "partial")
    try:
        with _disk_errors(path, temporary):
            temporary.touch(exist_ok=False)
        with full_disk_errors(path):
            yield temporary
        with _disk_errors(path, temporary):
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_free_space(path: Path, needed_bytes: int) -> None:
    """Refuse before writing what cannot fit.

    Args:
        path: Where it will be written; need not exist yet.
        needed_bytes: How many bytes it will take.

    Raises:
        OutputError: The file system of ``path`` has fewer free bytes.
    """
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{path}: {free_bytes / 2**30:.2f} GiB are free on its disk",
            expected=f"at least {needed_bytes / 2**30:.2f} GiB",
            fix="free some space, or write to another disk",
        )


def recover_leftovers(folder: Path) -> None:
    """Undo what a killed process left in ``folder``; call it only where no other process can be writing there.

    A folder that was moved aside and never replaced gets its name back; every other leftover is deleted.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.match(path.name)
        if match is None:
            continue
        target = folder / match["name"]
        if match["kind"] == "old" and not os.path.lexists(target):
            path.rename(target)
            logger.warning("restored %s, which an interrupted process had moved aside", target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def moved_aside_names(names: list[str]) -> set[str]:
    """The names, among the entries ``names`` of one folder, that an interrupted replacement left moved aside."""
    matches = [match for match in map(_LEFTOVER.match, names) if match is not None and match["kind"] == "old"]
    return {match["name"] for match in matches} - set(names)


def discard_directory(path: Path) -> None:
    """Delete a folder so that no reader sees it half deleted: it loses its name first.

    Raises:
        OutputError: The folder that holds it cannot be written to.
    """
    aside = _sibling(path, "partial")
    with _disk_errors(path, aside):
        path.rename(aside)
        _sync(path.parent)
        shutil.rmtree(aside)


def checked_target(target: Path) -> Path:
    """The real path of a folder that is to be made or replaced as a whole.

    Raises:
        OutputError: It is the current folder, one that holds it, or the home folder.
    """
    target = Path(os.path.realpath(target))
    current = Path.cwd()
    if target in (current, *current.parents, Path.home()):
        raise OutputError(
            f"{target}: is the current folder, one that holds it, or the home folder",
            expected="a folder that may be made, or replaced, as a whole",
            fix="give the path of a new folder",
        )
    return target


def require_own_folder(target: Path, marks: Sequence[str]) -> None:
    """Refuse to replace or delete a folder that the kit did not write: no slip of the hand takes someone's own files.

    Args:
        target: The folder that is to go; a missing or empty one passes.
        marks: Names of files, one of which every folder of the kit's own holds.

    Raises:
        OutputError: ``target`` holds something, and none of ``marks``.
    """
    target = Path(os.path.realpath(target))
    with _disk_errors(target, target):
        if not target.is_dir() or not any(target.iterdir()) or any((target / name).is_file() for name in marks):
            return
    raise OutputError(
        f"{target}: this command did not write the folder, so that it stays as it is",
        expected=f"a folder that holds {' or '.join(marks)}, or a new one",
        fix="give another folder, or remove this one yourself",
    )


def _refuse_occupied(target: Path, *, overwrite: bool) -> None:
    if target.is_dir():
        if overwrite or not any(target.iterdir()):
            return
        what, fix = f"{target}: the folder is not empty", "give another folder, or --overwrite to replace this one"
    elif os.path.lexists(target):
        what, fix = f"{target}: is not a folder", "give another path"
    else:
        return
    raise OutputError(what, expected="a new or empty folder", fix=fix)


def _restore_moved_aside(target: Path) -> None:
    """Give ``target`` back its name when an earlier overwrite was killed between its two renames."""
    if os.path.lexists(target) or not target.parent.is_dir():
        return
    for path in target.parent.iterdir():
        match = _LEFTOVER.match(path.name)
        if match is not None and match["name"] == target.name and match["kind"] == "old":
            path.rename(target)
            logger.warning("restored %s, which an interrupted process had moved aside", target)
            return


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """``folder`` and its parents exist inside the block; those that were made for it go when it raises."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with _disk_errors(folder, folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


@contextmanager
def _locked_sibling(target: Path) -> Iterator[Path]:
    """A new empty folder beside ``target``, locked while this process lives, so that others know it is in use."""
    while True:
        temporary = _sibling(target, "partial")
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        try:
            with suppress(OSError):  # a network's file system may lock no folders: then none is ever abandoned
                fcntl.flock(lock, fcntl.LOCK_SH)
            if temporary.exists():  # another process may have taken it for abandoned before it was locked
                yield temporary
                return
        finally:
            os.close(lock)


def _delete_abandoned(target: Path) -> None:
    """Delete the folders that killed processes left of ``target``: unlocked new ones, old ones that are replaced."""
    for path in target.parent.iterdir():
        match = _LEFTOVER.match(path.name)
        if match is None or match["name"] != target.name or not path.is_dir():
            continue
        if match["kind"] == "old" and not os.path.lexists(target):
            continue
        try:
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
            logger.warning("deleted %s, which an interrupted process had left", path)
        except OSError:  # in use, or not ours to delete
            pass
        finally:
            os.close(lock)


def _swap_in(temporary: Path, target: Path) -> None:
    aside = _sibling(target, "old")
    try:
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.{kind}")


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, as Python or as a library reports it, into an OutputError; leave other errors alone."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # re-raised unless it is a full disk: libraries wrap it in classes of their own
        full = isinstance(error, OSError) and error.errno in _FULL_DISK
        if not full and not any(text in str(error) for text in _FULL_DISK_TEXTS):
            raise
        raise _full_disk(target) from error


@contextmanager
def _disk_errors(target: Path, touched: Path) -> Iterator[None]:
    """Turn every OSError of our own file operations into an OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise _full_disk(target) from error
        raise OutputError(
            f"{target}: cannot be written: {error.strerror} ({touched.parent})",
            expected="a folder on a disk that may be written to",
            fix="give another path, or make the folder writable",
        ) from error


def _full_disk(target: Path) -> OutputError:
    return OutputError(
        f"{target}: the disk is full (or a quota is used up)",
        expected="enough free space for the whole output",
        fix="free some space, or write to another disk; nothing that looks finished was kept",
    )
