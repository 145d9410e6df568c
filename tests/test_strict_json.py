"""JSON that is not trusted: what readers may take differently, or what takes too much of anything, is refused."""

from __future__ import annotations

import json
import sys
import tracemalloc

import pytest

from qlora_kit.strict_json import MAX_DEPTH, parse_json_object


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


BAD = {
    "not UTF-8": b'{"a":"\xff"}',
    "an array": b"[]",
    "nothing": b"",
    "doubled key": b'{"a":1,"a":1}',
    "NaN": b'{"a":NaN}',
    "infinite": b'{"a":-Infinity}',
    "beyond a float": b'{"a":1e999}',
    "minus zero": b'{"a":-0}',
    "half a character": b'{"a":"\\ud800"}',
    "half a character in a key": b'{"\\udfff":1}',
    "too many digits": b'{"a":' + b"9" * 5000 + b"}",
    "too deep": nested(MAX_DEPTH + 1),
    "far too deep": nested(100_000),
    "open": b'{"a":' + b"[" * 100_000,
    "open objects": b'{"a":' * 100_000,
    "too many lists": b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
    "quotes in an open string": b'{"' + b'\\"' * 1_000_000,
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_json_is_a_value_error(kind: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json_object(BAD[kind])


@pytest.mark.parametrize(
    "value",
    [{}, {"a": "[[[[{{"}, {"é": "\U0001f600"}, {"a": [1, -1, 0, 0.0, -0.5, 1e300, True, None, "\\", '"', '\\"']}],
    ids=str,
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_sound_json_is_read(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_json_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_what_is_read_can_be_printed() -> None:
    """Nesting up to the limit leaves room for whoever walks it, deep in the stack as he may be."""
    value = parse_json_object(nested(MAX_DEPTH))

    def deeper(levels: int) -> str:
        return repr(value) if levels == 0 else deeper(levels - 1)

    assert deeper(sys.getrecursionlimit() // 2)


def test_refusing_bulk_takes_little_memory() -> None:
    text = BAD["too many lists"]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="values"):
            parse_json_object(text)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    finally:
        tracemalloc.stop()
