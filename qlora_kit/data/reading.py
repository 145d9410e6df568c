"""Reads JSONL, JSON, CSV and Parquet files: rows that know their place come out, and every fault with its place."""

from __future__ import annotations

import codecs
import csv
import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from qlora_kit.data.ledger import Problem, locate

MAX_ROW_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 1024
OTHER_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True)
class Row:
    """One raw record and its place.

    Attributes:
        file: The file as the user would name it.
        line: Line (JSONL, and CSV where the row starts) or 1-based row number (JSON, Parquet).
        values: The record.
    """

    file: str
    line: int
    values: dict[str, Any]

    @property
    def source(self) -> str:
        """``file:line``."""
        return locate(self.file, self.line)


@dataclass(frozen=True)
class Note:
    """A harmless fact about a file that the user should hear of."""

    text: str


Item = Row | Problem | Note


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
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        expected = f"one of {', '.join(READERS)}"
        yield Problem(
            name, None, f"unknown file type {path.suffix!r}", expected, "convert the file, or rename it", stops=True
        )
        return
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                yield Problem(
                    name, None, "the file is empty", "at least one row", "fill the file or name another", stops=True
                )
                return
            mark = _byte_order_mark(name, file)
            if mark is not None:
                yield mark
            if not isinstance(mark, Problem):
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


def _read_jsonl(name: str, file: BinaryIO) -> Iterator[Item]:
    line = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            _skip_line(file)
            yield _too_long(name, line)
        elif raw.strip():
            yield _parse_object(name, line, raw)


def _parse_object(name: str, line: int, raw: bytes) -> Row | Problem:
    try:
        value = json.loads(raw.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return _bad_encoding(name, line, error)
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
        return Problem(name, line, reason, "one JSON object on each line", "correct or remove the line")
    except (ValueError, RecursionError) as error:
        return Problem(name, line, f"not readable JSON: {error}", "one JSON object on each line", "remove the line")
    return _as_row(name, line, value)


def _as_row(name: str, line: int, value: Any) -> Row | Problem:
    if isinstance(value, dict):
        return Row(name, line, value)
    reason = f"the row is {_json_type(value)}"
    return Problem(name, line, reason, 'a JSON object such as {"prompt": ..., "completion": ...}', "correct the row")


def _read_json(name: str, file: BinaryIO) -> Iterator[Item]:
    expected = "one JSON list of objects"
    try:
        value = json.loads(file.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield replace(_bad_encoding(name, line, error), stops=True)
        return
    except json.JSONDecodeError as error:
        reason = f"not valid JSON: {error.msg} at column {error.colno}"
        fix = "correct it, or rename the file to .jsonl if it holds one object on each line"
        yield Problem(name, error.lineno, reason, expected, fix, stops=True)
        return
    except (ValueError, RecursionError) as error:
        yield Problem(name, None, f"not readable JSON: {error}", expected, "correct the file", stops=True)
        return
    if not isinstance(value, list):
        yield Problem(
            name, None, f"the file holds {_json_type(value)}", expected, "put the rows into a list", stops=True
        )
        return
    for number, item in enumerate(value, start=1):
        yield _as_row(name, number, item)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _read_csv(name: str, file: BinaryIO) -> Iterator[Item]:
    lines = _CsvLines(name, file)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        start = lines.line + 1
        try:
            cells = _next_record(reader)
        except csv.Error as error:
            fix = "close the quote that opens there, and double each quote inside a quoted cell"
            problem = Problem(name, start, f"not valid CSV: {error}", 'comma-separated cells, quoted by "', fix)
            yield lines.take_problem() or problem
            continue
        problem_of_line = lines.take_problem()
        if problem_of_line is not None:
            yield replace(problem_of_line, stops=header is None)
        elif cells is None:
            return
        elif header is not None:
            if cells:
                yield _csv_row(name, start, header, cells)
        elif len(set(cells)) < len(cells) or "" in cells:
            reason = f"a column has no name, or two have the same: {', '.join(map(repr, cells))}"
            yield Problem(name, start, reason, "a first line of distinct column names", "correct it", stops=True)
            return
        else:
            header = cells
        if problem_of_line is not None and header is None:
            return


def _csv_row(name: str, line: int, header: list[str], cells: list[str]) -> Row | Problem:
    if len(cells) != len(header):
        fix = "quote cells that hold a comma or a line break"
        return Problem(name, line, f"{len(cells)} cells", f"{len(header)} cells ({', '.join(header)})", fix)
    if sum(map(len, cells)) > MAX_ROW_BYTES:
        return _too_long(name, line)
    return Row(name, line, dict(zip(header, cells, strict=True)))


def _next_record(reader: Iterator[list[str]]) -> list[str] | None:
    # The field limit belongs to the whole process: it is lent for one record and given back.
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(limit)


class _CsvLines:
    """Decoded lines for ``csv.reader``; counts them and keeps the first fault of a line until it is taken."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        self._file = file
        self._problem: Problem | None = None
        self.line = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(MAX_ROW_BYTES + 1)
        if not raw:
            raise StopIteration
        self.line += 1
        problem = None
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            _skip_line(self._file)
            problem = _too_long(self._name, self.line)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = problem or _bad_encoding(self._name, self.line, error)
            return raw.decode("utf-8", errors="replace")
        finally:
            self._problem = self._problem or problem

    def take_problem(self) -> Problem | None:
        """The fault of the lines read since the last call; it is then forgotten."""
        problem, self._problem = self._problem, None
        return problem


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
        yield Problem(name, number + 1 if number else None, reason, "a Parquet file", "write it again", stops=True)


READERS: dict[str, Callable[[str, BinaryIO], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _byte_order_mark(name: str, file: BinaryIO) -> Note | Problem | None:
    """Leaves ``file`` behind a UTF-8 mark, else at its start; another Unicode form is a fault of the whole file."""
    head = file.read(4)
    if head.startswith(codecs.BOM_UTF8):
        file.seek(len(codecs.BOM_UTF8))
        return Note(f"{name}: starts with a UTF-8 byte order mark, which was skipped")
    file.seek(0)
    encoding = next((form for mark, form in OTHER_BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if encoding is None:
        return None
    fix = f"convert the file: iconv -f {encoding} -t UTF-8 {name}"
    return Problem(name, None, f"the file is {encoding} (by its byte order mark)", "UTF-8 text", fix, stops=True)


def _bad_encoding(name: str, line: int, error: UnicodeDecodeError) -> Problem:
    reason = f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
    fix = f"convert the file, for example: iconv -f CP1252 -t UTF-8 {name}"
    return Problem(name, line, reason, "UTF-8 text", fix)


def _too_long(name: str, line: int) -> Problem:
    limit = f"{MAX_ROW_BYTES // 1024} KiB"
    return Problem(
        name, line, f"the row is longer than {limit}", f"rows of at most {limit}", "split or shorten the row"
    )


def _skip_line(file: BinaryIO) -> None:
    while chunk := file.readline(MAX_ROW_BYTES):
        if chunk.endswith(b"\n"):
            return
