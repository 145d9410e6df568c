"""What an adapter may be called."""

from __future__ import annotations

import re
from pathlib import PurePath

from qlora_kit.errors import AdapterError
from qlora_kit.safetensors_header import shown

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
"""What a run, a task and an adapter may be called."""
_NAME = re.compile(NAME_PATTERN)
_BASE = "base"


def is_name(text: str) -> bool:
    """Whether an adapter may have this name."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str) -> str:
    """Return ``name`` if it may name an adapter.

    Raises:
        AdapterError: It may not.
    """
    if not is_name(name):
        raise AdapterError(
            f"{shown(name)} cannot name an adapter",
            expected="1 to 64 letters, digits, - and _, the first a letter or digit",
            fix="choose such a name, for example sentiment-v2",
        )
    return name


def require_unambiguous(name: str, *, base: str | None = None) -> None:
    """Refuse names that requests give to the base: ``base``, and on a server the last part of the base's id.

    Args:
        name: Of a new adapter.
        base: The id of its base, where that is known.

    Raises:
        AdapterError: It is such a name, in upper or lower case.
    """
    if name.casefold() == _BASE:
        what = f"{name!r} means the base alone, in files of prompts and in the chat"
    elif base is not None and PurePath(base).name.casefold() == name.casefold():
        what = f"{name!r} is the name of the adapter's base, {base}"
    else:
        return
    raise AdapterError(what, expected="a name that no request could mean otherwise", fix="give another name")
