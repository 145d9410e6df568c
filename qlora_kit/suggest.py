"""Name the known word that is nearest to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The word of ``known`` that is most like ``word``, or None when none is like it."""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def advice(word: str, known: Iterable[str]) -> str:
    """What to do about an unknown ``word``: its nearest match where there is one, else to choose a known one."""
    match = nearest(word, known)
    return f"did you mean {match!r}?" if match is not None else "use one of the names above, or remove it"
