"""Which format a data file is in: the columns of all its rows in, the name of one format out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qlora_kit.conversation import DataFault
from qlora_kit.formats import FORMATS, PLAIN_TEXT, TASK_COLUMNS
from qlora_kit.suggest import nearest
from qlora_kit.tasks import Task


def _formats_of(columns: frozenset[str], task: Task) -> tuple[str, ...]:
    """The formats whose columns are all present.

    The task's own columns win, since its template asks for them. Plain text is the last choice: many conversations
    bring a column ``text`` too, and where the task has one of that name, a row without the others is incomplete.
    """
    matches = [name for name, entry in FORMATS.items() if _fits(columns, entry.required(task))]
    if TASK_COLUMNS in matches:
        return (TASK_COLUMNS,)
    if len(matches) > 1 or "text" in task.fields:
        matches = [name for name in matches if name != PLAIN_TEXT]
    return tuple(matches)


def _fits(columns: frozenset[str], required: tuple[str, ...]) -> bool:
    return bool(required) and columns.issuperset(required)


def _columns_of_formats(task: Task) -> str:
    names = {name: " + ".join(entry.required(task)) for name, entry in FORMATS.items()}
    known = [f"{columns} ({name})" for name, columns in names.items() if columns]
    return f"the columns of one format: {', '.join(known)}"


def _renaming(columns: Sequence[str], task: Task) -> str:
    """Which columns to rename: those nearest to what a format lacks, where that makes it whole."""
    for entry in FORMATS.values():
        required = entry.required(task) if entry.name != PLAIN_TEXT else ()
        spare = [column for column in columns if column not in required]
        names = {column: nearest(column, spare) for column in required if column not in columns}
        if names and None not in names.values() and len(set(names.values())) == len(names):
            pairs = ", ".join(f"{near!r} to {column!r}" for column, near in names.items())
            return f"did you mean the format {entry.name}? rename {pairs}"
    return (
        "rename the columns (a CSV names them in its first line), or set data.prompt and data.completion to "
        "templates of your columns"
    )


def detect_format(rows: Iterable[Iterable[str]], task: Task, *, lines: Iterable[int] | None = None) -> str:
    """The one format of all rows, found over all of them and not from the first.

    A row that fits no format is left to ``to_messages``, which says what it lacks, as long as another row fits.

    Args:
        rows: Each row's column names (a dict serves as it is).
        task: Gives the columns of the format ``task``.
        lines: Each row's line for the message; counted from 1 when None.

    Raises:
        DataFault: There are no rows, no row fits a format, the formats are mixed, or one row fits several.
    """
    first_lines: dict[tuple[str, ...], int] = {}
    seen: dict[frozenset[str], tuple[int, tuple[str, ...]]] = {}
    for number, row in enumerate(rows, start=1) if lines is None else zip(lines, rows, strict=True):
        ordered = tuple(row)
        columns = frozenset(ordered)
        if columns not in seen:
            seen[columns] = number, ordered
            first_lines.setdefault(_formats_of(columns, task), number)
    if not seen:
        raise DataFault("there are no rows", expected="at least one row", fix="give a file that is not empty")
    fitting = {formats: line for formats, line in first_lines.items() if formats}
    if not fitting:
        line, ordered = next(iter(seen.values()))
        raise DataFault(
            f"the columns {', '.join(map(repr, ordered)) or '(none)'} fit no format",
            expected=_columns_of_formats(task),
            fix=_renaming(ordered, task),
            line=line,
        )
    if len(fitting) > 1:
        samples = ", ".join(f"{' or '.join(formats)} (line {line})" for formats, line in fitting.items())
        raise DataFault(f"mixed formats: {samples}", expected="one format in all rows", fix="split the file by format")
    (formats, line), *_ = fitting.items()
    if len(formats) > 1:
        raise DataFault(
            f"the columns fit several formats: {', '.join(formats)}",
            expected="columns of one format",
            fix=f"set data.format to one of {', '.join(formats)}",
            line=line,
        )
    return formats[0]


def extra_columns(columns: Iterable[str], *, format: str, task: Task) -> tuple[str, ...]:
    """The columns that nothing uses, sorted, for the caller to report."""
    entry = FORMATS[format]
    return tuple(sorted(set(columns) - {*entry.required(task), *entry.optional, *task.extra}))
