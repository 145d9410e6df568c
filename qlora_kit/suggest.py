"""Name the known word that is nearest to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_WORD_LENGTH = 64
"""Of a longer word, which may come from anywhere, only the beginning is compared: the time grows with the square."""


def like(word: str, known: Iterable[str], *, most: int, cutoff: float = 0.6) -> list[str]:
    """The words of ``known`` that are like ``word``, upper and lower case the same, the nearest first.

    Args:
        word: Any text.
        known: What it may be a misspelling of.
        most: How many at most.
        cutoff: The least likeness, from 0 (everything) to 1 (the same), by ``difflib``.
    """
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word[:MAX_WORD_LENGTH].lower(), list(by_lower), n=most, cutoff=cutoff)
    return [by_lower[match] for match in matches]


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The first of ``like``, or None when no word is like it."""
    return next(iter(like(word, known, most=1, cutoff=cutoff)), None)


def advice(word: str, known: Iterable[str]) -> str:
    """What to do about an unknown ``word``: its nearest match where there is one, else to choose a known one."""
    match = nearest(word, known)
    return f"did you mean {match!r}?" if match is not None else "use one of the names above, or remove it"
