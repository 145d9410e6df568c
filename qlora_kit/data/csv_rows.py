"""Reads CSV: rows with the line on which they start come out, and every fault with its place."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO

from qlora_kit.conversation import MAX_ROW_BYTES
from qlora_kit.data.ledger import Problem
from qlora_kit.data.rows import Item, Row, decode_line, skip_line, too_long

_CELLS = 'comma-separated cells, quoted by "'
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(name: str, file: BinaryIO) -> Iterator[Item]:
    """One row a record behind a first line of column names; blank lines are no rows."""
    lines = _CsvLines(name, file)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        start = lines.line + 1
        try:
            cells = _next_record(reader)
        except csv.Error as error:
            yield lines.take_problem() or _not_csv(name, start, lines.line, error)
            continue
        problem_of_line = lines.take_problem()
        if problem_of_line is not None:
            yield replace(problem_of_line, stops=header is None)
            if header is None:
                return
        elif cells is None:
            return
        elif not cells:
            continue
        elif header is not None:
            yield _row(name, start, header, cells)
        else:
            header, problem_of_header = cells, _bad_header(name, start, cells)
            if problem_of_header is not None:
                yield problem_of_header
                return


def _not_csv(name: str, start: int, end: int, error: csv.Error) -> Problem:
    if "unexpected end of data" in str(error):
        reason = f"a quote opens in this row and is never closed: lines {start} to {end} would be one cell"
        fix = "close the quote, and double each quote inside a quoted cell"
        return Problem(name, start, reason, _CELLS, fix, stops=True)
    fix = "quote the cell, double each quote inside it, or remove the row"
    return Problem(name, start, f"not valid CSV: {error}", _CELLS, fix)


def _bad_header(name: str, line: int, cells: list[str]) -> Problem | None:
    expected = "a first line of distinct column names, separated by commas"
    separator = next((mark for mark in _OTHER_SEPARATORS if mark in cells[0]), None) if len(cells) == 1 else None
    if separator is not None:
        reason = f"the columns are separated by {_OTHER_SEPARATORS[separator]}: {cells[0]!r}"
        fix = "save the file with commas (in a spreadsheet program: CSV UTF-8, comma delimited)"
        return Problem(name, line, reason, expected, fix, stops=True)
    doubled = [cell for cell in dict.fromkeys(cells) if cells.count(cell) > 1]
    if "" in cells:
        reason = f"column {cells.index('') + 1} has no name: {', '.join(map(repr, cells))}"
        return Problem(name, line, reason, expected, "name each column, or remove it", stops=True)
    if doubled:
        reason = f"two columns have the same name {doubled[0]!r}"
        return Problem(name, line, reason, expected, "rename one of them", stops=True)
    return None


def _row(name: str, line: int, header: list[str], cells: list[str]) -> Row | Problem:
    if len(cells) != len(header):
        reason = f"the row has {len(cells)} cell{'s' * (len(cells) != 1)}"
        expected = f"{len(header)} cells, as in the first line ({', '.join(header)})"
        return Problem(name, line, reason, expected, "quote cells that hold a comma or a line break")
    if sum(map(len, cells)) > MAX_ROW_BYTES:
        return too_long(name, line)
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
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            skip_line(self._file)
            self._problem = self._problem or too_long(self._name, self.line)
            return raw.decode("utf-8", errors="replace")
        text = decode_line(self._name, self.line, raw)
        if isinstance(text, Problem):
            self._problem = self._problem or text
            return raw.decode("utf-8", errors="replace")
        return text

    def take_problem(self) -> Problem | None:
        """The fault of the lines read since the last call; it is then forgotten."""
        problem, self._problem = self._problem, None
        return problem
