"""Reads JSONL, JSON, CSV, Parquet and text files: rows out, and every fault, each with its place."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qlora_kit.conversation import MAX_ROW_BYTES
from qlora_kit.data.csv_rows import read_csv
from qlora_kit.data.file_kinds import look_at_head, unknown_ending
from qlora_kit.data.json_rows import read_json, read_jsonl
from qlora_kit.data.ledger import Problem
from qlora_kit.data.rows import Item, Note, Reader, Row, read_lines

__all__ = ["MAX_ROW_BYTES", "READERS", "Item", "Note", "Row", "display_name", "find_files", "no_match", "read_rows"]

PARQUET_BATCH_ROWS = 1024


def find_files(path: Path) -> list[Path]:
    """The files that ``path`` names: itself, or the sorted matches where it is a glob (``**`` included)."""
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]


def read_rows(path: Path) -> Iterator[Item]:
    """Yields the rows of one file, or of all files that a glob matches, in order.

    A faulty row is yielded as a ``Problem`` in its place, and reading goes on behind it.
    """
    files = find_files(path)
    if not files:
        yield no_match(path)
    for file in files:
        yield from _read_file(file)


def no_match(path: Path) -> Problem:
    """The fault of a glob that matches nothing."""
    fix = "correct the pattern; it is searched from the current folder, else from the YAML's folder"
    return Problem(display_name(path), None, "no file matches this pattern", "at least one file", fix, stops=True)


def display_name(path: Path) -> str:
    """The path as a user would type it: relative to the current folder where it lies below it."""
    absolute = os.path.abspath(path)
    current = os.getcwd() + os.sep
    return absolute[len(current) :] if absolute.startswith(current) else str(path)


def _read_file(path: Path) -> Iterator[Item]:
    name = display_name(path)
    suffix = path.suffix.lower()
    reader = READERS.get(suffix)
    if path.is_dir():
        fix = f"name its files, as a pattern such as '{name}/*.csv'"
        yield Problem(name, None, "is a folder", "a file, a list of files or a pattern", fix, stops=True)
        return
    if reader is None:
        yield unknown_ending(name, path.suffix, ", ".join(READERS))
        return
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                yield Problem(
                    name, None, "the file is empty", "at least one row", "fill the file or name another", stops=True
                )
                return
            finding = look_at_head(name, suffix, file)
            if finding is not None:
                yield finding
            if not isinstance(finding, Problem):
                yield from _with_row_check(name, reader(name, file))
    except FileNotFoundError:
        fix = "correct the path; it is searched from the current folder, else from the YAML's folder"
        yield Problem(name, None, "the file does not exist", "an existing file", fix, stops=True)
    except IsADirectoryError:
        fix = f"name the files in it, for example {name}/*.jsonl"
        yield Problem(name, None, "this is a folder", "a file or a pattern", fix, stops=True)
    except PermissionError:
        yield Problem(name, None, "no permission to read", "a readable file", f"chmod u+r {name}", stops=True)


def _with_row_check(name: str, items: Iterator[Item]) -> Iterator[Item]:
    found = False
    for item in items:
        found = found or not isinstance(item, Note)
        yield item
    if not found:
        yield Problem(
            name, None, "the file holds no row", "at least one row", "fill the file or name another", stops=True
        )


def _read_text(name: str, file: BinaryIO) -> Iterator[Item]:
    """One plain text a line, as the ``text`` builder of Hugging Face ``datasets`` reads it; blank lines are no rows."""
    for line, text in read_lines(name, file):
        if isinstance(text, Problem):
            yield text
        elif text.strip():
            yield Row(name, line, {"text": text})


def _read_parquet(name: str, file: BinaryIO) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_BATCH_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield Row(name, number, values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = f"not readable as Parquet: {str(error).splitlines()[0]}"
        yield Problem(
            name,
            number + 1 if number else None,
            reason,
            "a whole Parquet file",
            "write or download it again",
            stops=True,
        )


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
