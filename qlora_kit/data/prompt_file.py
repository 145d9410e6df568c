"""Reads prompts to answer: a file of text lines, or of rows with the column ``prompt``, in; user turns out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.data.ledger import Problem, data_error
from qlora_kit.data.reading import Note, Row, read_rows
from qlora_kit.suggest import nearest

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "text")  # a `.txt` file's lines come as the column `text`
_ADAPTER = "adapter"
_SYSTEM = "system"


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        text: The user's turn.
        adapter: Which adapter the row names, ``base`` for none; None where the row does not say.
        system: The system prompt that the row asks for; None where it does not say.
    """

    text: str
    adapter: str | None = None
    system: str | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in ``path``, in their order.

    Args:
        path: ``.txt`` (a prompt a line), or ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` with the column ``prompt``
            and, where rows ask for them, ``adapter`` and ``system``.

    Raises:
        DataError: The file cannot be read, holds no row, or a row holds no prompt or a misspelt column; every such row.
    """
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    column = COLUMNS[path.suffix.lower() == ".txt"]
    unused: set[str] = set()
    for item in read_rows(path):
        if isinstance(item, Note):
            logger.warning("%s", item.text)
        elif isinstance(item, Problem):
            problems.append(item)
        else:
            unused |= item.values.keys() - {column, _ADAPTER, _SYSTEM}
            prompt = _prompt(item, column)
            if isinstance(prompt, Problem):
                problems.append(prompt)
            else:
                prompts.append(prompt)
    if problems:
        raise data_error(problems)
    if unused:
        logger.warning("%s: nothing uses the columns %s", path, ", ".join(sorted(unused)))
    return prompts


def _prompt(row: Row, column: str) -> Prompt | Problem:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        what = "is missing" if column not in row.values else "holds no text"
        fix = f"write a text into the column {column!r}, or remove the row"
        return Problem(row.file, row.line, f"the column {column!r} {what}", "a prompt in each row", fix)
    for name in row.values.keys() - {column, _ADAPTER, _SYSTEM}:  # or the wrong model would answer
        near = nearest(name, (_ADAPTER, _SYSTEM), cutoff=0.8)
        if near is not None:
            expected = f"the columns {column}, {_ADAPTER} and {_SYSTEM}"
            fix = f"did you mean {near!r}? rename the column, or remove it"
            return Problem(row.file, row.line, f"the column {name!r} is unknown", expected, fix)
    asked: dict[str, str | None] = {}
    for name in (_ADAPTER, _SYSTEM):
        entry = row.values.get(name)
        if entry is not None and not isinstance(entry, str):
            fix = f"write a text into the column {name!r}, or leave it empty"
            return Problem(row.file, row.line, f"the column {name!r} holds no text", "a text, or nothing", fix)
        asked[name] = entry or None  # an empty field of a CSV file says nothing
    return Prompt(value, adapter=asked[_ADAPTER], system=asked[_SYSTEM])
