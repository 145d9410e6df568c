"""What reading a data file yields: rows that know their place, and the faults that several kinds of file share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO

from qlora_kit.conversation import MAX_ROW_BYTES
from qlora_kit.data.ledger import Problem, locate

BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"


@dataclass(frozen=True)
class Row:
    """One raw record and its place.

    Attributes:
        file: The file as the user would name it.
        line: Line (JSONL, text, and CSV where the row starts) or 1-based row number (JSON, Parquet).
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
Reader = Callable[[str, BinaryIO], Iterator[Item]]


def read_lines(name: str, file: BinaryIO) -> Iterator[tuple[int, str | Problem]]:
    """Each line with its number: its text without the line break, or why it is none.

    No more than a row's limit of a line is held in memory.
    """
    line = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        line += 1
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            skip_line(file)
            yield line, too_long(name, line)
            continue
        text = decode_line(name, line, raw)
        yield line, text if isinstance(text, Problem) else text.rstrip("\r\n")


def decode_line(name: str, line: int, raw: bytes) -> str | Problem:
    """A line's text with its line break, or why it is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return bad_encoding(name, line, error)
    if text.startswith(BYTE_ORDER_MARK):
        reason = "a byte order mark stands at the start of the line, as where files were joined"
        return Problem(name, line, reason, "one at the start of the file at most", "remove the bytes EF BB BF there")
    return text


def bad_encoding(name: str, line: int, error: UnicodeDecodeError) -> Problem:
    """The fault of a byte that is not UTF-8."""
    reason = f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
    fix = f"convert the file, for example: iconv -f CP1252 -t UTF-8 {name} > utf8{PurePath(name).suffix}"
    return Problem(name, line, reason, "UTF-8 text", fix)


def too_long(name: str, line: int) -> Problem:
    """The fault of a row over the limit."""
    limit = f"{MAX_ROW_BYTES // 1024} KiB"
    return Problem(
        name, line, f"the row is longer than {limit}", f"rows of at most {limit}", "split or shorten the row"
    )


def skip_line(file: BinaryIO) -> None:
    """Leaves ``file`` behind the end of the line."""
    while chunk := file.readline(MAX_ROW_BYTES):
        if chunk.endswith(b"\n"):
            return
