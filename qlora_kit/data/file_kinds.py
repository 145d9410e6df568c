"""Tells by its first bytes that a file is not what its ending says: an archive, a web page, another encoding."""

from __future__ import annotations

import codecs
import re
from typing import BinaryIO

from qlora_kit.data.ledger import Problem
from qlora_kit.data.rows import Note

HEAD_BYTES = 512
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_AS_CSV = "open it in the spreadsheet program and save it as CSV (UTF-8, commas)"
# First bytes -> what the file is, and what to do.
_OTHER_KINDS = {
    b"\x1f\x8b": ("compressed by gzip", "unpack it: gunzip -c {name} > unpacked{suffix}"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook (.xlsx)", f"unpack it, or {_AS_CSV}"),
    b"\xd0\xcf\x11\xe0": ("an old Office document (.xls)", _AS_CSV),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it: zstd -dc {name} > unpacked{suffix}"),
    b"BZh": ("compressed by bzip2", "unpack it: bzip2 -dc {name} > unpacked{suffix}"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it: xz -dc {name} > unpacked{suffix}"),
    b"%PDF": ("a PDF", "extract the rows from it"),
    b"PAR1": ("a Parquet file", "rename it so that it ends in .parquet"),
    b"ARROW1": ("an Arrow file", "save it as Parquet: Dataset.to_parquet"),
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
_ENDINGS = {
    ".gz": "unpack it: gunzip {name}",
    ".zst": "unpack it: zstd -d {name}",
    ".bz2": "unpack it: bunzip2 {name}",
    ".zip": "unpack it: unzip {name}",
    ".xlsx": _AS_CSV,
    ".xls": _AS_CSV,
    ".tsv": "replace the tabs by commas (quote cells that hold commas) and name it .csv",
    ".ndjson": "rename it so that it ends in .jsonl",
}


def unknown_ending(name: str, suffix: str, known: str) -> Problem:
    """The fault of a file whose ending no reader knows."""
    fix = _ENDINGS.get(suffix.lower(), "convert the file, or rename it").format(name=name)
    return Problem(name, None, f"unknown file type {suffix!r}", f"one of {known}", fix, stops=True)


def look_at_head(name: str, suffix: str, file: BinaryIO) -> Note | Problem | None:
    """Reads the first bytes of ``file`` and leaves it at its start, or behind a UTF-8 byte order mark.

    Returns:
        Why the file cannot be read as ``suffix`` says, a note on a UTF-8 mark, or None.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if head.startswith(_LFS_POINTER):
        fix = "fetch the data: git lfs install && git lfs pull"
        return _whole(name, "the file is a Git LFS pointer, not the data itself", "the data", fix)
    if suffix == ".parquet":
        return None if head.startswith(b"PAR1") else _no_parquet(name, head)
    encoding = next((form for mark, form in _WIDE_MARKS.items() if head.startswith(mark)), None)
    if encoding is not None:
        fix = f"convert the file: iconv -f {encoding} -t UTF-8 {name} > utf8{suffix}"
        return _whole(name, f"the file is {encoding} (by its byte order mark)", "UTF-8 text", fix)
    for magic, (kind, fix) in _OTHER_KINDS.items():
        if head.startswith(magic):
            return _whole(name, f"the file is {kind}", f"a {suffix} file", fix.format(name=name, suffix=suffix))
    if suffix != ".txt" and _WEB_PAGE.match(head.removeprefix(codecs.BOM_UTF8)):
        return _web_page(name)
    if head.count(b"\0") > len(head) // 4:
        fix = f"convert the file, for example: iconv -f UTF-16LE -t UTF-8 {name} > utf8{suffix}"
        return _whole(name, "every second byte or so is NUL, as in UTF-16 text", "UTF-8 text", fix)
    if head.startswith(codecs.BOM_UTF8):
        file.seek(len(codecs.BOM_UTF8))
        return Note(f"{name}: starts with a UTF-8 byte order mark, which was skipped")
    return None


def _no_parquet(name: str, head: bytes) -> Problem:
    if _WEB_PAGE.match(head):
        return _web_page(name)
    fix = "write or download it again, or rename it by what it holds (.jsonl, .json, .csv)"
    return _whole(name, "the file does not begin as Parquet does (PAR1)", "a Parquet file", fix)


def _web_page(name: str) -> Problem:
    fix = "download the data itself (on a code host: the raw file), after logging in if the site asks for it"
    return _whole(name, "the file is a web page (HTML), not data", "the data", fix)


def _whole(name: str, reason: str, expected: str, fix: str) -> Problem:
    return Problem(name, None, reason, expected, fix, stops=True)
