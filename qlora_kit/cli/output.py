"""How the command line shows things: results on stdout, progress and remarks on stderr, sizes in units for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_kit.units import in_time as in_time
from qlora_kit.units import in_units as in_units

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line on stdout.")]


def stdout_console() -> Console:
    """Where results go."""
    from rich.console import Console

    return Console(highlight=False)


def stderr_console() -> Console:
    """Where progress and remarks go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(content: dict[str, Any]) -> None:
    """The ``--json`` object, alone on the last line of stdout."""
    print(json.dumps(content, ensure_ascii=False), flush=True)


def say(text: str) -> None:
    """One remark on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def counting(description: str, *, unit: str = "") -> Iterator[Progress]:
    """A progress bar on stderr with one task, number 0: ``progress.update(0, completed=..., total=...)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr_console(), transient=False) as progress:
        progress.add_task(description, total=None, note="")
        yield progress
