"""Read YAML as the kit means it: plain values out, with the line of every key, and each fault in three parts.

Plain values follow YAML 1.2's core schema, where PyYAML follows 1.1: ``1e-4`` is a number, and ``no``, ``on``,
``1:30`` and ``2024-01-01`` are text. Duplicate keys, anchors and tags are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.errors import ConfigError, Fault

KeyPath = tuple[str, ...]

_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL)?$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789.")),
)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name) is used", self.peek_event().start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would not read back as text."""


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


@dataclass(frozen=True)
class Source:
    """A YAML mapping.

    Attributes:
        values: Its plain values.
        lines: The line, from 1, of each key, by its path of keys.
    """

    values: dict[str, Any]
    lines: dict[KeyPath, int]


_DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx", ".txt")


def read_yaml(path: Path) -> Source:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: The file is missing, unreadable or not UTF-8, is not YAML, repeats a key or holds no mapping.
    """
    if path.suffix.lower() in _DATA_SUFFIXES and path.is_file():
        raise ConfigError(
            f"{path}: is a file of data, not a config",
            expected="a config (YAML), which names the data",
            fix=f"give a config and the data behind it: configs/sentiment.yaml data.train={path}",
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file", expected="a config file", fix="check the path; configs/ holds examples"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8", expected="a file in UTF-8", fix="save the file as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror})",
            expected="a readable file",
            fix="check the path and its rights",
        ) from error
    return parse_yaml(text, name=str(path))


def parse_yaml(text: str, *, name: str) -> Source:
    """The mapping in ``text``; ``name`` stands in messages.

    Raises:
        ConfigError: As ``read_yaml``.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[KeyPath, int] = {}
        faults: list[Fault] = []
        _walk(node, (), lines, faults, name)
        if faults:
            raise ConfigError.of(faults)
        values = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _syntax_error(error, name) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name}: holds {'nothing' if values is None else 'no mapping'}",
            expected="a mapping of keys to values",
            fix="write one 'key: value' a line; configs/ holds examples",
        )
    return Source(values, lines)


def _syntax_error(error: Exception, name: str) -> ConfigError:
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    line = f":{mark.line + 1}" if mark is not None else ""
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error).splitlines()[0]
    return ConfigError(
        f"{name}{line}: not valid YAML: {problem}",
        expected="plain YAML: one document, no tabs, anchors or tags",
        fix="correct the line; put quotes around text that holds ': ', '#' or braces",
    )


def _walk(node: yaml.Node | None, path: KeyPath, lines: dict[KeyPath, int], faults: list[Fault], name: str) -> None:
    """Note the line of every key, and find keys that are repeated or not text."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, str(index)), lines, faults, name)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            faults.append(Fault(f"{name}:{line}: the key {shown!r} is not text", "a name", "put quotes around the key"))
            continue
        here = (*path, key.value)
        if here in lines:
            what = f"{name}:{line}: {'.'.join(here)} is given again (first on line {lines[here]})"
            faults.append(Fault(what, "each key once", "remove one of the two"))
            continue
        lines[here] = line
        _walk(value, here, lines, faults, name)


def parse_value(text: str) -> Any:
    """The plain value that ``text`` stands for, as on the right of ``key:``; empty text is null.

    Raises:
        ValueError: The text is not YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error).splitlines()[0]) from error


def dump_yaml(values: dict[str, Any]) -> str:
    """``values`` as YAML that ``parse_yaml`` reads back to the same, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
