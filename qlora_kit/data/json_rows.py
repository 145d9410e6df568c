"""Reads JSONL and JSON: rows with their line or number come out, and every fault with its place."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from qlora_kit.conversation import kind_of
from qlora_kit.data.ledger import Problem
from qlora_kit.data.rows import Item, Row, bad_encoding, read_lines
from qlora_kit.strict_json import json_reason, parse_json

_SPACE = re.compile(r"\s*")
_LINE = "one JSON object on each line"
_LIST = "one JSON list of objects"


def read_jsonl(name: str, file: BinaryIO) -> Iterator[Item]:
    """One object a line; blank lines are no rows."""
    rows_before = False
    for line, text in read_lines(name, file):
        if isinstance(text, Problem):
            yield text
        elif text.strip():
            item = _parse_object(name, line, text, expected=_LINE)
            if not rows_before and isinstance(item, Problem) and _begins_a_list(text):
                fix = "rename the file so that it ends in .json"
                reason = "the file holds one JSON list, as .json files do"
                yield Problem(name, None, reason, _LINE, fix, stops=True)
                return
            yield item
        else:
            continue
        rows_before = True


def _begins_a_list(text: str) -> bool:
    """Whether this first line is a list of objects, or the opening of one that goes on in the next lines."""
    start = text.strip()
    return start.startswith("[") and start[1:].lstrip()[:1] in ("", "{")


def _parse_object(name: str, number: int, text: str, *, expected: str) -> Row | Problem:
    try:
        value = parse_json(text)
    except ValueError as error:
        reason = f"not valid JSON: {json_reason(error)}"
        return Problem(name, number, reason, expected, _how_to_mend(name, text.strip(), reason))
    return _as_row(name, number, value)


def _how_to_mend(name: str, text: str, reason: str) -> str:
    if text in ("{", "[", "}", "},", "]"):
        return f"write each row on one line: jq -c . {name}"
    if text.startswith(("{'", "[{'")):
        return "write the rows with json.dumps: Python's own notation, with single quotes, is not JSON"
    if "Invalid control character" in reason:
        return "write a line break as \\n and a tab as \\t, remove other control characters, or remove the row"
    return "correct the row, or remove it"


def _as_row(name: str, number: int, value: Any) -> Row | Problem:
    if isinstance(value, dict):
        return Row(name, number, value)
    expected = 'a JSON object such as {"prompt": ..., "completion": ...}'
    return Problem(name, number, f"the row is {kind_of(value)}", expected, "correct the row, or remove it")


def read_json(name: str, file: BinaryIO) -> Iterator[Item]:
    """One list of objects; it is read as a whole."""
    try:
        text = file.read().decode("utf-8")
        value = parse_json(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        yield replace(bad_encoding(name, line, error), stops=True)
        return
    except ValueError as error:
        yield from _each_element(name, text, error)
        return
    if not isinstance(value, list):
        yield _not_a_list(name, value)
        return
    for number, item in enumerate(value, start=1):
        yield _as_row(name, number, item)


def _each_element(name: str, text: str, error: ValueError) -> Iterator[Item]:
    """The elements of a list that is well formed but holds what is refused (a doubled key, NaN), one at a time."""
    try:
        elements = None if isinstance(error, json.JSONDecodeError) else _element_texts(text)
    except (ValueError, RecursionError):
        elements = None
    if elements is None:
        yield _not_json(name, text, error)
        return
    for number, element in enumerate(elements, start=1):
        yield _parse_object(name, number, element, expected=_LIST)


def _element_texts(text: str) -> list[str] | None:
    """The text of each element of a JSON list; None where ``text`` is not one whole list."""
    decoder, texts = json.JSONDecoder(), []
    position, mark = _skip_space(text, 0), "["
    while text.startswith(mark, position):
        start = _skip_space(text, position + 1)
        _, end = decoder.raw_decode(text, start)
        texts.append(text[start:end])
        position, mark = _skip_space(text, end), ","
    return texts if text[position:].strip() == "]" else None


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return start if match is None else match.end()


def _not_json(name: str, text: str, error: ValueError) -> Problem:
    if not isinstance(error, json.JSONDecodeError):
        return Problem(name, None, f"not valid JSON: {error}", _LIST, "correct the file", stops=True)
    if error.msg == "Extra data" and text.lstrip().startswith("{"):
        fix = "rename the file so that it ends in .jsonl"
        return Problem(name, None, f"the file holds {_LINE}, as .jsonl files do", _LIST, fix, stops=True)
    fix = "correct the file there; where it ends too early, write or download it again"
    return Problem(name, error.lineno, f"not valid JSON: {json_reason(error)}", _LIST, fix, stops=True)


def _not_a_list(name: str, value: Any) -> Problem:
    fix = "put the objects into one list: [{...}, {...}]"
    if isinstance(value, dict):
        lists = [
            key for key, entry in value.items() if isinstance(entry, list) and entry and isinstance(entry[0], dict)
        ]
        if lists:
            fix = f"keep only the list under {lists[0]!r}: jq .{lists[0]} {name} > new.json"
    return Problem(name, None, f"the file holds {kind_of(value)}", _LIST, fix, stops=True)
