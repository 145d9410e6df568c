"""Matches the regular expressions of an adapter's configuration in polynomial time, whatever their author had in mind.

Python's ``re`` backtracks: ``(a|a)(a|a)...`` takes 2^n steps. Here a part of a pattern maps the set of positions where
it may start to the set of those where it may end, so no position is tried twice for one part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

MAX_CHARACTERS = 1000
MAX_NAME_CHARACTERS = 128
"""No expression names a longer module."""
_MAX_DEPTH = 20
_ATOM = re.compile(
    r"\[\^?\]?(?:[^\[\]\\&|~]|\\[^A-Za-z0-9]|\\[dDsSwW])*\]"  # a class
    r"|\\[dDsSwWbBAZ]|\\[^A-Za-z0-9\s]|[^\\()\[\]{}*+?|]"
)
_REPEAT = re.compile(r"([*+?]|\{\d{1,3}(?:,\d{0,3})?\}|\{,\d{1,3}\})\??(?![*+?{])")
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_ZERO_WIDTH = ("^", "$", r"\b", r"\B", r"\A", r"\Z")
_OPENINGS: tuple[tuple[str, bool | None], ...] = (("(?=", True), ("(?!", False), ("(?:", None), ("(", None))
_Positions = frozenset[int]


@dataclass(frozen=True)
class _Atom:
    """One character, class or zero-width assertion, matched by ``re`` at one position."""

    expression: re.Pattern[str]

    def ends(self, text: str, starts: _Positions) -> _Positions:
        found = (self.expression.match(text, start) for start in starts)
        return frozenset(match.end() for match in found if match is not None)


@dataclass(frozen=True)
class _Repeat:
    part: _Part
    least: int
    most: int | None

    def ends(self, text: str, starts: _Positions) -> _Positions:
        for _ in range(self.least):
            starts = self.part.ends(text, starts)
        reached = new = starts
        times = len(text) + 1 if self.most is None else self.most - self.least
        while new and times > 0:
            new = self.part.ends(text, new) - reached
            reached |= new
            times -= 1
        return reached


@dataclass(frozen=True)
class _Look:
    """``(?=...)`` and ``(?!...)``."""

    part: _Part
    wanted: bool

    def ends(self, text: str, starts: _Positions) -> _Positions:
        return frozenset(start for start in starts if bool(self.part.ends(text, frozenset([start]))) == self.wanted)


@dataclass(frozen=True)
class _Choice:
    """Alternatives, each a sequence of parts."""

    alternatives: tuple[tuple[_Part, ...], ...]

    def ends(self, text: str, starts: _Positions) -> _Positions:
        reached: _Positions = frozenset()
        for sequence in self.alternatives:
            positions = starts
            for part in sequence:
                positions = part.ends(text, positions)
            reached |= positions
        return reached


_Part = _Atom | _Repeat | _Look | _Choice


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.looking = False

    def choice(self, depth: int) -> _Choice:
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        alternatives: list[tuple[_Part, ...]] = []
        sequence: list[_Part] = []
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "|":
                self.at += 1
                alternatives.append(tuple(sequence))
                sequence = []
            else:
                sequence.append(self._repeated(depth))
        return _Choice((*alternatives, tuple(sequence)))

    def _repeated(self, depth: int) -> _Part:
        is_group = self.text[self.at] == "("
        part = self._group(depth) if is_group else self._atom()
        match = _REPEAT.match(self.text, self.at)
        if match is None:
            return part
        self.at = match.end()
        least, most = _bounds(match[1])
        if is_group and (isinstance(part, _Look) or (least, most) != (0, 1)):
            raise ValueError("a repeated group")
        if isinstance(part, _Atom) and part.expression.pattern in _ZERO_WIDTH:
            raise ValueError(f"a repeated {part.expression.pattern}")
        return _Repeat(part, least, most)

    def _group(self, depth: int) -> _Part:
        opening, wanted = next(item for item in _OPENINGS if self.text.startswith(item[0], self.at))
        if wanted is not None and self.looking:
            raise ValueError("a lookahead inside another")  # each level would multiply the time
        self.at += len(opening)
        outside, self.looking = self.looking, self.looking or wanted is not None
        inside = self.choice(depth + 1)
        self.looking = outside
        if self.at >= len(self.text):
            raise ValueError("a group without its end")
        self.at += 1
        return inside if wanted is None else _Look(inside, wanted)

    def _atom(self) -> _Atom:
        match = _ATOM.match(self.text, self.at)
        if match is None:
            raise ValueError(f"{self.text[self.at]!r} is not understood here")
        self.at = match.end()
        return _Atom(re.compile(match[0]))


@dataclass(frozen=True)
class ModulePattern:
    """A regular expression that was understood whole."""

    _whole: _Choice

    def names(self, module: str) -> bool:
        """Whether it matches all of ``module``, as ``re.fullmatch`` would."""
        return len(module) in self._whole.ends(module, frozenset([0]))

    def names_end_of(self, module: str) -> bool:
        """Whether it matches ``module`` or what follows one of its dots: PEFT's rule for rank and alpha patterns."""
        starts = frozenset({0, *(index + 1 for index, character in enumerate(module) if character == ".")})
        return len(module) in self._whole.ends(module, starts)


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> ModulePattern:
    """Understand ``text``: characters, classes, groups, alternatives, lookahead; repeats of anything but groups.

    Raises:
        ValueError: It is empty, too long, no regular expression, or uses something else (backreferences, flags, ...).
    """
    if not 0 < len(text) <= MAX_CHARACTERS or not text.isprintable():
        raise ValueError(f"it is not of 1 to {MAX_CHARACTERS} printable characters")
    parser = _Parser(text)
    try:
        whole = parser.choice(0)
    except re.error as error:
        raise ValueError(str(error)) from error
    if parser.at < len(text):
        raise ValueError("a group ends that was not begun")
    return ModulePattern(whole)


def module_matcher(modules: tuple[str, ...] | str) -> frozenset[str] | ModulePattern | None:
    """Names and endings, a pattern, or None for PEFT's ``all-linear``."""
    if modules == "all-linear":
        return None
    return parse_pattern(modules) if isinstance(modules, str) else frozenset(modules)


def names_module(modules: frozenset[str] | ModulePattern | None, module: str) -> bool:
    """Whether what ``module_matcher`` returned names ``module``: PEFT's rules."""
    if modules is None:
        return module.rpartition(".")[2] != "lm_head"
    if isinstance(modules, ModulePattern):
        return len(module) <= MAX_NAME_CHARACTERS and modules.names(module)
    parts = module.split(".")
    return any(".".join(parts[start:]) in modules for start in range(len(parts)))


def is_plain(text: str) -> bool:
    """Whether the pattern ``text`` is a name: its dots are its only special characters."""
    return _PLAIN.fullmatch(text) is not None


def pattern_names_end_of(text: str, module: str) -> bool:
    """``ModulePattern.names_end_of`` of the pattern ``text``; plain names, often thousands, are quick."""
    if not is_plain(text):
        return parse_pattern(text).names_end_of(module)
    start = len(module) - len(text)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    return all(wanted in (".", found) for wanted, found in zip(text, module[start:], strict=True))


def _bounds(repeat: str) -> tuple[int, int | None]:
    simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if repeat in simple:
        return simple[repeat]
    least, comma, most = repeat[1:-1].partition(",")
    bounds = int(least or 0), (int(most) if most else None) if comma else int(least)
    if bounds[1] is not None and bounds[0] > bounds[1]:
        raise ValueError("a repeat whose bounds are the wrong way round")
    return bounds
