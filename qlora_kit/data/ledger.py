"""The row ledger: what happened to every row that is not trained on as it stands, and the counts made of it.

Entries go to a file that stays in memory only while it is small, so that a ledger does not grow with the data.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Literal

from qlora_kit.adapters import DataFile
from qlora_kit.errors import DataError, Fault, QloraKitError

Action = Literal["dropped", "truncated", "duplicate", "leaked"]

FAULTS_SHOWN = 20
PROBLEMS_KEPT = 10_000
SPOOLED_BYTES = 1 << 20
SPLITS = ("train", "validation", "test")


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


@dataclass(frozen=True)
class ReadFile:
    """A file, or a data set of the Hub, that was read to its end.

    Attributes:
        split: train, validation or test.
        name: As the user would name it.
        record: As a contract records it: a file's name without its folder, a data set with its commit.
        sha256: Of the file's bytes, or of what identifies the data set.
        rows: How many rows it holds.
    """

    split: str
    name: str
    record: str
    sha256: str
    rows: int


class Ledger:
    """Collects what happens to the rows of one run, from reading to tokenising.

    Attributes:
        notes: Harmless facts worth telling (a byte order mark).
        rows: Rows read, by split.
        files: Each file read.
        supervised_tokens: Tokens that the loss sees, by split.
        lengths: Tokens of a row -> how many rows, by split.
        stopped_rows: Rows whose last supervised token ends an answer, by split.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: Counter[str] = Counter()
        self.files: list[ReadFile] = []
        self.supervised_tokens: Counter[str] = Counter()
        self.lengths: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self.stopped_rows: Counter[str] = Counter()
        self._actions: Counter[tuple[str, str]] = Counter()
        self._problems: dict[str, list[Problem]] = {split: [] for split in SPLITS}
        self._problems_not_kept = 0
        self._entries = SpooledTemporaryFile(max_size=SPOOLED_BYTES, mode="w+", encoding="utf-8", newline="\n")  # noqa: SIM115
        weakref.finalize(self, self._entries.close)

    def record(self, split: str, source: str, action: Action, reason: str) -> None:
        """Adds an entry for the row at ``source`` (``file:line``)."""
        file, line = split_source(source)
        self._actions[split, action] += 1
        self._entries.write(json.dumps(asdict(LedgerEntry(split, file, line, action, reason)), ensure_ascii=False))
        self._entries.write("\n")

    def refuse(self, split: str, problem: Problem) -> None:
        """Adds a problem; beyond ``PROBLEMS_KEPT``, problems are only counted."""
        if len(self._problems[split]) < PROBLEMS_KEPT:
            self._problems[split].append(problem)
        else:
            self._problems_not_kept += 1

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem that was kept: those of train, of validation, of test."""
        return tuple(problem for split in SPLITS for problem in self._problems[split])

    def stopping(self, on_error: str) -> tuple[Problem, ...]:
        """The problems because of which the rows must not be used."""
        return tuple(problem for problem in self.problems if problem.stops or on_error == "stop")

    @property
    def entries(self) -> Iterator[LedgerEntry]:
        """What was recorded, in the order in which it happened."""
        self._entries.seek(0)
        try:
            for line in self._entries:
                yield LedgerEntry(**json.loads(line))
        finally:
            self._entries.seek(0, 2)

    def report(self, split: str | None = None) -> DataReport:
        """The counts of one split, or of all of them together.

        Problems and notes are those of all splits.
        """
        splits = list(self.rows) if split is None else [split]
        actions = Counter[str]()
        for (name, action), count in self._actions.items():
            actions[action] += count if name in splits else 0
        rows = sum(self.rows[name] for name in splits)
        unkept = f"{self._problems_not_kept:,} more problems were counted and not kept"
        return DataReport(
            rows=rows,
            kept=rows - actions["dropped"] - actions["duplicate"],
            dropped=actions["dropped"],
            truncated=actions["truncated"],
            duplicates=actions["duplicate"],
            leaked=actions["leaked"],
            supervised_tokens=sum(self.supervised_tokens[name] for name in splits),
            total_tokens=sum(self.total_tokens(name) for name in splits),
            problems=self.problems,
            notes=(*self.notes, *([unkept] if self._problems_not_kept else [])),
        )

    def data_files(self, *splits: str) -> tuple[DataFile, ...]:
        """What was read for ``splits``, as a contract records it."""
        files = sorted((file for file in self.files if file.split in splits), key=lambda file: (file.split, file.name))
        return tuple(DataFile(file.split, file.record, file.sha256, file.rows) for file in files)

    def total_tokens(self, split: str) -> int:
        """Tokens of a split, prompts and answers."""
        return sum(length * rows for length, rows in self.lengths[split].items())

    def write(self, path: Path) -> None:
        """Writes ``ledger.jsonl``: one entry a line, in the order in which things happened."""
        temporary = path.with_name(path.name + ".partial")
        self._entries.seek(0)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            shutil.copyfileobj(self._entries, file)
        self._entries.seek(0, 2)
        temporary.replace(path)

    def state(self) -> dict[str, Any]:
        """Everything but the entries, as plain JSON that ``restore`` takes."""
        return {
            "notes": self.notes,
            "rows": dict(self.rows),
            "files": [asdict(file) for file in self.files],
            "supervised_tokens": dict(self.supervised_tokens),
            "stopped_rows": dict(self.stopped_rows),
            "lengths": {split: sorted(counts.items()) for split, counts in self.lengths.items()},
            "actions": [[split, action, count] for (split, action), count in sorted(self._actions.items())],
            "problems": {split: [asdict(problem) for problem in found] for split, found in self._problems.items()},
            "problems_not_kept": self._problems_not_kept,
        }

    @classmethod
    def restore(cls, state: dict[str, Any], entries: Path) -> Ledger:
        """The ledger whose ``state`` and entries (``write``) were kept."""
        ledger = cls()
        ledger.notes = list(state["notes"])
        ledger.rows.update(state["rows"])
        ledger.files = [ReadFile(**file) for file in state["files"]]
        ledger.supervised_tokens.update(state["supervised_tokens"])
        ledger.stopped_rows.update(state["stopped_rows"])
        ledger.lengths = {split: Counter(dict(counts)) for split, counts in state["lengths"].items()}
        ledger._actions = Counter({(split, action): count for split, action, count in state["actions"]})
        ledger._problems = {split: [Problem(**kept) for kept in found] for split, found in state["problems"].items()}
        ledger._problems_not_kept = state["problems_not_kept"]
        with entries.open(encoding="utf-8", newline="\n") as file:
            shutil.copyfileobj(file, ledger._entries)
        return ledger


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
