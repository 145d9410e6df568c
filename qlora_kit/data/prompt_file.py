"""Reads prompts to answer: a file of text lines, or of rows with the column ``prompt``, in; user turns out."""

from __future__ import annotations

import logging
from pathlib import Path

from qlora_kit.data.ledger import Problem, data_error
from qlora_kit.data.reading import Note, Row, read_rows

logger = logging.getLogger(__name__)

COLUMNS = ("prompt", "text")  # a `.txt` file's lines come as the column `text`


def read_prompts(path: Path) -> list[str]:
    """The prompts in ``path``, in their order.

    Args:
        path: ``.txt`` (a prompt a line), or ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` with the column ``prompt``.

    Raises:
        DataError: The file cannot be read, or a row holds no prompt; with every such row.
    """
    prompts: list[str] = []
    problems: list[Problem] = []
    column = COLUMNS[path.suffix.lower() == ".txt"]
    for item in read_rows(path):
        if isinstance(item, Note):
            logger.warning("%s", item.text)
        elif isinstance(item, Problem):
            problems.append(item)
        else:
            prompt = _prompt(item, column)
            if isinstance(prompt, Problem):
                problems.append(prompt)
            else:
                prompts.append(prompt)
    if problems:
        raise data_error(problems)
    return prompts


def _prompt(row: Row, column: str) -> str | Problem:
    value = row.values.get(column)
    if isinstance(value, str) and value.strip():
        return value
    what = "is missing" if column not in row.values else "holds no text"
    fix = f"write a text into the column {column!r}, or remove the row"
    return Problem(row.file, row.line, f"the column {column!r} {what}", "a prompt in each row", fix)
