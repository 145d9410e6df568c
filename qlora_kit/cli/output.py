"""How the command line shows things: results on stdout, progress and remarks on stderr, sizes in units for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_kit.units import counted as counted
from qlora_kit.units import in_time as in_time
from qlora_kit.units import in_units as in_units

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

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


def files_table(title: str, sizes: Iterable[tuple[str, int]]) -> Table:
    """Files by path with their sizes in bytes."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, "table.title"), box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", justify="right")
    for path, size_bytes in sizes:
        table.add_row(Text(path), in_units(size_bytes))
    return table


@contextmanager
def counting(description: str) -> Iterator[Progress]:
    """A progress bar on stderr with one task, number 0: ``progress.update(0, completed=..., total=...)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr_console(), transient=False) as progress:
        progress.add_task(description, total=None, note="")
        yield progress


@contextmanager
def counting_bytes(description: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with the bytes done and in all; with its first call a bar with size and time left appears."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=stderr_console(), transient=False)
    task = progress.add_task(description, total=None)

    def show(done_bytes: int, total_bytes: int) -> None:
        if not progress.live.is_started:
            progress.start()
        progress.update(task, completed=done_bytes, total=total_bytes)

    try:
        yield show
    finally:
        if progress.live.is_started:  # one that never was would print an empty line
            progress.stop()
