"""What pydantic finds wrong with a configuration, in the kit's words: its errors in, problems out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlora_kit.config.run_config import SECTIONS, RunConfig
from qlora_kit.config.sections import FILE_TAG, HUB_TAG, HubDataset, MixedPart
from qlora_kit.config.synonyms import meant_by
from qlora_kit.config.train_section import Problem, settable_fields
from qlora_kit.config.yaml_source import KeyPath
from qlora_kit.suggest import advice

_FOLLOW_UP = "default_factory_not_called"  # pydantic adds it to another key's fault
_KIND_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid dictionary": "a mapping",
}


def problems_of(error: ValidationError) -> list[Problem]:
    """One problem a key."""
    return _merged(_problem_of(entry) for entry in error.errors() if entry["type"] != _FOLLOW_UP)


def _merged(problems: Iterable[Problem]) -> list[Problem]:
    """One problem a key: a union reports each of its types."""
    merged: dict[KeyPath, Problem] = {}
    for problem in problems:
        first = merged.setdefault(problem.path, problem)
        if first is not problem:
            merged[problem.path] = replace(first, expected=f"{first.expected} or {problem.expected}")
    return list(merged.values())


def _problem_of(error: ErrorDetails) -> Problem:
    """pydantic's error in the kit's words."""
    path = _key_path(error["loc"])
    dotted, value = ".".join(path), error["input"]
    expected = error["msg"].replace("Input should be ", "").replace("String should", "a text that should")
    expected = _KIND_WORDS.get(expected, expected)
    if error["type"] == "extra_forbidden":
        return Problem(path, "is an unknown key", f"one of {', '.join(_known_keys(path))}", _where_it_belongs(path))
    if error["type"] == "missing":
        return Problem(path, "is missing", "a value", f"add {dotted}")
    if error["type"] in ("model_type", "model_attributes_type"):
        return Problem(path, f"is {value!r}", "a section with keys of its own", f"write the keys below '{dotted}:'")
    if error["type"] == "string_pattern_mismatch":
        expected = "1-64 letters, digits, '-' and '_', beginning with a letter or digit"
    if error["type"] == "literal_error":
        choices = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return Problem(path, f"is {value!r}", expected, advice(str(value), choices))
    known = error.get("ctx", {}).get("known", ())
    if known and isinstance(value, str):
        return Problem(path, f"is {value!r}", expected, advice(value, known))
    return Problem(path, f"is {value!r}", expected, f"correct {dotted}")


def _key_path(location: tuple[int | str, ...]) -> KeyPath:
    """The key of the config that ``loc`` of an error lies in; deeper parts are keys only in mixed parts and sources."""
    parts = tuple(str(part) for part in location)
    if parts[0] not in SECTIONS:
        return parts[:1]
    depth = 4 if parts[:2] == ("data", "mix") else 2
    if FILE_TAG in parts or HUB_TAG in parts:
        depth = len(parts)
    return tuple(part for part in parts[:depth] if part not in (FILE_TAG, HUB_TAG))


def _known_keys(path: KeyPath) -> tuple[str, ...]:
    model: type[BaseModel] = RunConfig
    if len(path) == 2:
        model = SECTIONS[path[0]]
    elif len(path) > 2:
        model = MixedPart if path[:2] == ("data", "mix") and len(path) == 4 else HubDataset
    return tuple(model.model_fields)


def _where_it_belongs(path: KeyPath) -> str:
    """The section that has the unknown key, else its nearest match in its own section."""
    key = path[-1]
    for section, model in SECTIONS.items() if len(path) <= 2 else ():
        if key in (settable_fields() if section == "train" else model.model_fields):
            return f"it belongs to the section {section}: write {section}.{key}"
    own = path[0] if len(path) == 2 else ""
    return (meant_by(key, section=own) if len(path) <= 2 else None) or advice(key, _known_keys(path))
