"""The row ledger: what happened to every row that is not trained on as it stands, and the counts made of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlora_kit.errors import DataError, Fault, QloraKitError

Action = Literal["dropped", "truncated", "duplicate", "leaked"]

FAULTS_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a data file.

    Attributes:
        file: The file as the user would name it.
        line: Line (JSONL, and CSV where the row starts) or 1-based row number (JSON, Parquet); None for the whole file.
        reason: What is wrong.
        expected: What was expected there.
        fix: What the user can do now.
        stops: Whether dropping one row does not help, so that the run stops whatever ``data.on_error`` says.
    """

    file: str
    line: int | None
    reason: str
    expected: str
    fix: str
    stops: bool = False

    @property
    def fault(self) -> Fault:
        """The same as the three parts of an error message."""
        return Fault(f"{locate(self.file, self.line)}: {self.reason}", self.expected, self.fix)


@dataclass(frozen=True)
class LedgerEntry:
    """What happened to one row.

    Attributes:
        split: train, validation or test.
        file: The file as the user would name it.
        line: As in ``Problem``: the row's id within the file.
        action: dropped and duplicate rows are not kept; truncated and leaked rows are.
        reason: Why, in words.
    """

    split: str
    file: str
    line: int | None
    action: Action
    reason: str


@dataclass(frozen=True)
class DataReport:
    """The counts of ``qlora-kit data``; rows = kept + dropped + duplicates. Units are rows, or tokens where named."""

    rows: int
    kept: int
    dropped: int
    truncated: int
    duplicates: int
    leaked: int
    supervised_tokens: int
    total_tokens: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        values = {name: value for name, value in asdict(self).items() if name not in ("problems", "notes")}
        problems = [{"file": p.file, "line": p.line, "reason": p.reason} for p in self.problems]
        return {**values, "problems": problems, "notes": list(self.notes)}


@dataclass
class Ledger:
    """Collects what happens to the rows of one run, from reading to tokenising.

    Attributes:
        entries: One for each row dropped, truncated, removed as a duplicate, or found leaked.
        problems: Every fault found, also those that stop the run.
        notes: Harmless facts worth telling (a byte order mark).
        rows: Rows read, by split.
        files: Each file read: its split, its path, its rows.
        supervised_tokens: Tokens that the loss sees, by split.
        total_tokens: Tokens in all, by split.
    """

    entries: list[LedgerEntry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    files: list[tuple[str, Path, int]] = field(default_factory=list)
    supervised_tokens: Counter[str] = field(default_factory=Counter)
    total_tokens: Counter[str] = field(default_factory=Counter)

    def record(self, split: str, source: str, action: Action, reason: str) -> None:
        """Adds an entry for the row at ``source`` (``file:line``)."""
        file, line = split_source(source)
        self.entries.append(LedgerEntry(split, file, line, action, reason))

    def report(self, split: str | None = None) -> DataReport:
        """The counts of one split, or of all of them together.

        Problems and notes are those of all splits.
        """
        splits = list(self.rows) if split is None else [split]
        actions = Counter(entry.action for entry in self.entries if entry.split in splits)
        rows = sum(self.rows[name] for name in splits)
        return DataReport(
            rows=rows,
            kept=rows - actions["dropped"] - actions["duplicate"],
            dropped=actions["dropped"],
            truncated=actions["truncated"],
            duplicates=actions["duplicate"],
            leaked=actions["leaked"],
            supervised_tokens=sum(self.supervised_tokens[name] for name in splits),
            total_tokens=sum(self.total_tokens[name] for name in splits),
            problems=tuple(self.problems),
            notes=tuple(self.notes),
        )

    def write(self, path: Path) -> None:
        """Writes ``ledger.jsonl``: one entry a line, in the order in which things happened."""
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("w", encoding="utf-8") as file:
            for entry in self.entries:
                file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
        temporary.replace(path)


def locate(file: str, line: int | None) -> str:
    """``file:line``, or the file alone where there is no line."""
    return file if line is None else f"{file}:{line}"


def split_source(source: str) -> tuple[str, int | None]:
    """The file and line of an ``Example.source``."""
    file, separator, line = source.rpartition(":")
    return (file, int(line)) if separator and line.isdigit() else (source, None)


def data_error(problems: Sequence[Problem]) -> QloraKitError:
    """One ``DataError`` for ``problems`` (at least one): the first ``FAULTS_SHOWN``, then the number of the rest."""
    faults = [problem.fault for problem in problems[:FAULTS_SHOWN]]
    rest = problems[FAULTS_SHOWN:]
    if rest:
        places = f"from {locate(rest[0].file, rest[0].line)} to {locate(rest[-1].file, rest[-1].line)}"
        what = f"{len(rest)} more problems of {len(problems)} in all, {places}"
        faults.append(Fault(what, "no problems", "see them all with `qlora-kit data CONFIG --json`"))
    return DataError.of(faults)
