"""What the columns of a Hub data set hold: features in, the media among them refused, a converter to plain rows out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Converter = Callable[[Any], Any]

# The keys of one turn. `datasets` stores a list of turns, written by its older `Sequence`, as one list for each key.
TURN_KEYS = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True)
class Columns:
    """How the columns of a data set become plain Python values.

    Attributes:
        converters: For each column that is not taken as it is, what makes the plain value of it.
        refused: Columns that hold no text (``image``), with the name of their type.
        notes: What is changed in which column, in words.
    """

    converters: dict[str, Converter]
    refused: dict[str, str]
    notes: tuple[str, ...]

    def convert(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """One row as plain values.

        Raises:
            ValueError: The lists of a list of turns differ in length.
        """
        row = dict(values)
        for name, convert in self.converters.items():
            if row.get(name) is not None:
                row[name] = convert(row[name])
        return row


def read_columns(features: Mapping[str, Any] | None) -> Columns:
    """Describes columns by ``features`` of `datasets`; None, where a stream does not know them, means as they are."""
    converters: dict[str, Converter] = {}
    refused: dict[str, str] = {}
    notes: list[str] = []
    for name, feature in (features or {}).items():
        kind = _unreadable(feature)
        if kind is not None:
            refused[name] = kind
            continue
        converter = _converter(feature)
        if converter is not None:
            converters[name] = converter
            notes += [f"column {name!r}: {change}" for change in _changes(feature)]
    return Columns(converters, refused, tuple(notes))


def _unreadable(feature: Any) -> str | None:
    """The type's name where a feature, or one inside it, is none that holds text, numbers or lists of them."""
    import datasets

    if isinstance(feature, dict):
        return next((kind for kind in map(_unreadable, feature.values()) if kind is not None), None)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _unreadable(feature.feature)
    plain = (
        datasets.Value,
        datasets.ClassLabel,
        datasets.Json,
        datasets.Translation,
        datasets.TranslationVariableLanguages,
    )
    return None if isinstance(feature, plain) else type(feature).__name__


def _is_turn_list(feature: Any) -> bool:
    import datasets

    if not isinstance(feature, dict) or not any(keys <= feature.keys() for keys in TURN_KEYS):
        return False
    return all(isinstance(inner, datasets.List | datasets.LargeList) for inner in feature.values())


def _converter(feature: Any) -> Converter | None:
    """What makes a plain value of a feature's value that is not None; None where it is plain already."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        return lambda number: names[number] if number >= 0 else None
    if isinstance(feature, datasets.List | datasets.LargeList):
        convert = _converter(feature.feature)
        return None if convert is None else lambda items: [None if item is None else convert(item) for item in items]
    if not isinstance(feature, dict):
        return None
    inner = Columns({key: convert for key, value in feature.items() if (convert := _converter(value))}, {}, ())
    if _is_turn_list(feature):
        return lambda lists: _turns(inner.convert(lists))
    return inner.convert if inner.converters else None


def _turns(lists: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]


def _changes(feature: Any) -> list[str]:
    """What ``_converter`` changes, in words, the feature itself first."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return [f"the class numbers are read as their names ({', '.join(map(str, feature.names[:8]))}{_rest(feature)})"]
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _changes(feature.feature)
    if not isinstance(feature, dict):
        return []
    inner = [change for value in feature.values() for change in _changes(value)]
    return ["the lists of each key are read as one list of turns", *inner] if _is_turn_list(feature) else inner


def _rest(feature: Any) -> str:
    return ", ..." if len(feature.names) > 8 else ""
