"""The file of a contract: reads ``qlora_kit.json`` with every key checked, writes it atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_kit.atomic import atomic_file
from qlora_kit.errors import AdapterError, Fault
from qlora_kit.strict_json import read_json_object

CONTRACT_FILE = "qlora_kit.json"
FORMAT_VERSION = 2
MAX_CONTRACT_BYTES = 16_000_000
MAX_FAULTS = 20
NF4_CODES = "nf4_codes"
TRAINED, ADOPTED, COMBINED = ORIGINS = ("trained", "adopted", "combined")
_FIX = "train the adapter again, or restore the file from where the adapter was published"


def read_contract_json(path: Path) -> dict[str, Any]:
    """The contract in ``path`` as plain JSON of the present version, checked; keys that it does not know are in it too.

    The contract of an older version is migrated in memory; its file stays as it is.

    Raises:
        AdapterError: No file, no sound JSON, a newer format, or keys that are missing or of another type (all of them).
    """
    content = read_json_object(path, max_bytes=MAX_CONTRACT_BYTES, error=AdapterError, fix=_FIX)
    _require_known_version(path, content)
    content = _migrated(content)
    faults = _content_faults(path, content)
    if faults:
        raise AdapterError.of(faults, at_most=MAX_FAULTS)
    return content


def write_contract_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to ``path`` atomically, keys sorted, so that equal contracts are equal files."""
    try:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"{path}: the contract cannot be written as JSON: {error}",
            expected="texts, finite numbers, lists and objects",
            fix="look for a metric or setting that is NaN, infinite, or no plain value",
        ) from error
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _require_known_version(path: Path, content: Mapping[str, Any]) -> None:
    version = content.get("format_version")
    if type(version) is int and 1 <= version <= FORMAT_VERSION:
        return
    newer = type(version) is int and version > FORMAT_VERSION
    raise AdapterError(
        f"{path}: format_version is {version!r}" if version is not None else f"{path}: format_version is missing",
        expected=f"a version from 1 to {FORMAT_VERSION}",
        fix="upgrade qlora-kit: a newer one wrote this adapter" if newer else _FIX,
    )


def _migrated(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` as the present version has it."""
    for version in range(content["format_version"], FORMAT_VERSION):
        content = {**_MIGRATIONS[version](content), "format_version": version + 1}
    return content


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 knew neither adopted adapters nor bases that are quantized already."""
    quantization = content.get("quantization")
    if isinstance(quantization, dict):
        quantization = {**quantization, "prequantized": False}
    migrated = {**content, "origin": TRAINED, "not_measured": []}
    return migrated if quantization is None else {**migrated, "quantization": quantization}


# Version -> what makes the next one of it.
_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_version_1}


def _content_faults(path: Path, content: Mapping[str, Any]) -> list[Fault]:
    faults = _key_faults(path, "", content, _KINDS)
    if isinstance(content.get("base"), dict):
        faults += _key_faults(path, "base.", content["base"], _BASE_KEYS)
    rows = content.get("data")
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        if isinstance(row, dict):
            faults += _key_faults(path, f"data[{index}].", row, _DATA_KEYS)
        else:
            faults.append(Fault(f"{path}: data[{index}] is not an object", "an object", _FIX))
    return faults


def _key_faults(path: Path, prefix: str, content: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> list[Fault]:
    faults = []
    for key, (expected, accepts) in kinds.items():
        if key not in content and key not in _OPTIONAL:
            faults.append(Fault(f"{path}: {prefix}{key} is missing", expected, _FIX))
        elif key in content and not accepts(content[key]):
            faults.append(Fault(f"{path}: {prefix}{key} is {repr(content[key])[:80]}", expected, _FIX))
    return faults


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_filled_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_texts_object(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_count(item) for item in value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_origin(value: Any) -> bool:
    return isinstance(value, str) and value in ORIGINS


def _is_earlier_adapter(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(_is_filled_text(value.get(key)) for key in ("name", "sha256"))


def _is_combination(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not _is_filled_text(value.get("method")):
        return False
    parts = value.get("parts")
    return isinstance(parts, list) and all(
        _is_earlier_adapter(part) and part is not None and type(part.get("weight")) in (int, float) for part in parts
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_quantization(value: Any) -> bool:
    if not isinstance(value, dict) or type(value.get("load_in_4bit")) is not bool:
        return False
    codes = value.get(NF4_CODES)
    if type(value.get("prequantized", False)) is not bool:
        return False
    return codes is None or _is_texts_object(codes)


def _is_generation(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    limit = value.get("max_new_tokens")
    return limit is None or (type(limit) is int and limit >= 1)


def _is_time(value: Any) -> bool:
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


_OPTIONAL = ("name", "continued_from", "combined_from")
_Kind = tuple[str, Callable[[Any], bool]]
_BASE_KEYS: dict[str, _Kind] = {
    "id": ("a text", _is_filled_text),
    "revision": ("a text or null", _is_text_or_null),
    "fingerprint": ("a text", _is_filled_text),
}
_DATA_KEYS: dict[str, _Kind] = {
    "split": ("a text", _is_text),
    "name": ("a text", _is_text),
    "sha256": ("a text", _is_text),
    "rows": ("a whole number", _is_count),
}
_KINDS: dict[str, _Kind] = {
    "quantization": ("an object with load_in_4bit (and nf4_codes as texts)", _is_quantization),
    "chat_template_sha256": ("a text or null", _is_text_or_null),
    "system_prompt": ("a text or null", _is_text_or_null),
    "generation": ("an object (max_new_tokens a whole number from 1)", _is_generation),
    "task": ("a text", _is_filled_text),
    "config_sha256": ("a text or null", _is_text_or_null),
    "versions": ("an object of texts", _is_texts_object),
    "created": ("a time as ISO 8601", _is_time),
    "kit_version": ("a text", _is_text),
    "metrics": ("an object", _is_object),
    "base": ("an object with id, revision and fingerprint", _is_object),
    "stop_token_ids": ("a list of at least one token id", _is_token_ids),
    "metric_names": ("a list of texts", _is_texts),
    "data": ("a list of data files", _is_list),
    "name": ("a text or null", _is_text_or_null),
    "origin": (f"one of {', '.join(ORIGINS)}", _is_origin),
    "not_measured": ("a list of texts", _is_texts),
    "continued_from": ("null, or an object with name and sha256", _is_earlier_adapter),
    "combined_from": ("null, or an object with method and parts (name, sha256, weight)", _is_combination),
}
