"""Reads JSON that is not trusted: bounded size, UTF-8, no doubled keys, no NaN or Infinity."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from qlora_kit.errors import QloraKitError
from qlora_kit.regular_file import open_regular

MAX_DEPTH = 64
"""Deeper nesting is refused: what walks or prints the value afterwards must not run out of stack."""
MAX_VALUES = 3_000_000
"""More values than this are refused: small as they are in the text, each takes 60 bytes and more."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(text: str) -> Any:
    """Parse ``text`` as JSON.

    Raises:
        ValueError: Not JSON (``JSONDecodeError``, which knows the place), a key twice in one object, nested too deeply,
            NaN or Infinity.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:  # brackets that are not closed
        raise ValueError("it is nested too deeply") from error


def json_reason(error: ValueError) -> str:
    """Why ``parse_json`` refused a text, with the column where that is known; the line is the caller's to say."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error)


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse ``text``, which comes from a stranger, as one JSON object.

    Raises:
        ValueError: As of ``parse_json``, not UTF-8, not an object, too many values, half a character (a lone
            surrogate), or a number that readers take differently (-0, one beyond the range of a float).
    """
    _refuse_bulk(text)
    try:
        value = _EXACT_DECODER.decode(text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _SURROGATE.search(text) is not None:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a character is a ValueError
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_json_object(path: Path, *, max_bytes: int, error: type[QloraKitError], fix: str) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Args:
        path: A regular file (or, where the caller allows it, a link to one).
        max_bytes: Larger files are refused unread.
        error: The class to raise.
        fix: What the user can do when the file cannot be used.

    Raises:
        QloraKitError: Of class ``error``, when the file cannot be read or does not hold one sound JSON object.
    """
    expected = f"a JSON object in UTF-8, at most {max_bytes} bytes"
    try:
        if not path.is_file():
            raise error(f"{path}: there is no such file", expected=expected, fix=fix)
        with open_regular(path) as file:
            text = file.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}", expected=expected, fix=fix) from problem
    if len(text) > max_bytes:
        raise error(f"{path}: the file is too large", expected=expected, fix=fix)
    try:
        return parse_json_object(text)
    except ValueError as problem:
        raise error(f"{path}: not usable JSON: {problem}", expected=expected, fix=fix) from problem


def _no_doubled_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {doubled!r} appears twice in one object")
    return result


def _refuse_bulk(text: bytes) -> None:
    brackets_at_most = text.count(b"[") + text.count(b"{")
    if brackets_at_most <= MAX_DEPTH and brackets_at_most + text.count(b",") <= MAX_VALUES:
        return  # even if every one of them were outside strings
    bare = _STRING.sub(b"", text)
    if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES} values")
    brackets = bare.translate(_BRACKETS, delete=_NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    if brackets and brackets.count(b"[") == brackets.count(b"]"):
        raise ValueError("it is nested too deeply")


def _plain_int(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is not a whole number")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is beyond the range of a float")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_doubled_keys, parse_constant=_no_constant)
_EXACT_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_doubled_keys, parse_constant=_no_constant, parse_int=_plain_int, parse_float=_finite_float
)
