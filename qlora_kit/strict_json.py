"""Reads one JSON object from a file that is not trusted: bounded size, UTF-8, no doubled keys, no NaN or Infinity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_kit.errors import QloraKitError


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse ``text`` as one JSON object.

    Raises:
        ValueError: Not UTF-8, not JSON, not an object, a key twice in one object, nested too deeply, NaN or Infinity.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_doubled_keys, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
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
        with path.open("rb") as file:
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
        raise ValueError("a key appears twice in one object")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
