"""The fields of the installed TRL's ``SFTConfig`` (names, types, choices), read from its source without importing it.

Importing TRL costs seconds and brings torch in; reading three files with ``ast`` costs a small part of a second.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import ConfigError

_NAMES = {"int": "int", "float": "float", "bool": "bool", "str": "str", "list": "list", "dict": "dict", "None": "null"}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "list": "a list"}
_WORDS |= {"dict": "a mapping", "null": "null"}


@dataclass(frozen=True)
class SftField:
    """One field of ``SFTConfig``.

    Attributes:
        name: Its name.
        kinds: The kinds of YAML value that it takes; empty where the annotation says nothing simple.
        choices: The only texts that it takes; empty for any.
    """

    name: str
    kinds: frozenset[str]
    choices: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        """Whether a YAML value is of a kind that the field takes, and one of its choices."""
        if self.kinds and not self.kinds & _kinds_of(value):
            return False
        return not (self.choices and isinstance(value, str) and value not in self.choices)

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        kinds = [word for kind, word in _WORDS.items() if kind in self.kinds and not (kind == "str" and self.choices)]
        return " or ".join([*kinds, f"one of {', '.join(self.choices)}"] if self.choices else kinds)


def _kinds_of(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"bool"}
    if isinstance(value, int):
        return {"int", "float"}
    return {type(value).__name__}


@functools.cache
def sft_fields() -> Mapping[str, SftField]:
    """The fields of the installed ``SFTConfig`` with those that it inherits, by name.

    Raises:
        ConfigError: TRL or transformers is not installed.
    """
    trl, transformers = _package_folder("trl"), _package_folder("transformers")
    arguments = _parse(transformers / "training_args.py")
    enums = _enums((arguments, _parse(transformers / "trainer_utils.py")))
    base_config = trl / "trainer" / "base_config.py"
    modules = [arguments, *([_parse(base_config)] if base_config.is_file() else [])]
    modules.append(_parse(trl / "trainer" / "sft_config.py"))
    fields: dict[str, SftField] = {}
    for module in modules:  # from the base class down: a subclass's declaration wins
        for declaration in _declarations(module):
            field = _read_field(declaration, enums)
            fields[field.name] = field
    return fields


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the package {package} is not installed", expected=package, fix=f"pip install {package}")
    return Path(spec.submodule_search_locations[0])


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


_CLASSES = ("TrainingArguments", "_BaseConfig", "SFTConfig")


def _declarations(module: ast.Module) -> Iterator[ast.AnnAssign]:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name in _CLASSES:
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
                    yield item


def _enums(modules: tuple[ast.Module, ...]) -> dict[str, tuple[str, ...]]:
    """The values of each class of text constants, such as ``SchedulerType``."""
    enums = {}
    for module in modules:
        for node in module.body:
            if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and "Enum" in b.id for b in node.bases):
                values = [item.value.value for item in node.body if _is_constant(item)]  # type: ignore[attr-defined]
                enums[node.name] = tuple(value for value in values if isinstance(value, str))
    return enums


def _is_constant(item: ast.stmt) -> bool:
    return isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)


def _read_field(declaration: ast.AnnAssign, enums: Mapping[str, tuple[str, ...]]) -> SftField:
    names = list(_annotation_names(declaration.annotation))
    enum_choices = [choice for name in names for choice in enums.get(name, ())]
    kinds = {_NAMES.get(name, "str" if name in enums else "") for name in names}
    if "" in kinds:  # a class of the library: leave it to the library
        kinds = set()
    choices = tuple(enum_choices) if "list" not in kinds else ()
    return SftField(
        ast.unparse(declaration.target), frozenset(kinds), choices or _choices_of_metadata(declaration.value)
    )


def _annotation_names(node: ast.expr) -> Iterator[str]:
    """The outermost type names of an annotation: those of a union one by one, ``list`` of ``list[str]``."""
    if isinstance(node, ast.BinOp):
        yield from _annotation_names(node.left)
        yield from _annotation_names(node.right)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id in ("Optional", "Union"):
            yield from ("None",) if node.value.id == "Optional" else ()
            for part in node.slice.elts if isinstance(node.slice, ast.Tuple) else (node.slice,):
                yield from _annotation_names(part)
        elif node.value.id == "Literal" and isinstance(node.slice, ast.Constant):
            yield type(node.slice.value).__name__
        else:
            yield node.value.id.lower()
    elif isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.Name):
        yield node.id


def _choices_of_metadata(value: ast.expr | None) -> tuple[str, ...]:
    """``metadata={"choices": [...]}`` of a dataclass field."""
    for keyword in value.keywords if isinstance(value, ast.Call) else ():
        if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
            for key, entry in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(entry, ast.List):
                    return tuple(item.value for item in entry.elts if isinstance(item, ast.Constant))  # type: ignore[misc]
    return ()
