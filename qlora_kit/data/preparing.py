"""Reads and checks the data files of a config: rows go in, checked examples of each split and their ledger come out."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_kit.config import RunConfig
from qlora_kit.data.duplicates import DigestSet, conversation_digest
from qlora_kit.data.ledger import DataReport, Ledger, Problem, data_error, locate
from qlora_kit.data.reading import MAX_ROW_BYTES, Note, Row, display_name, find_files, no_match, read_rows
from qlora_kit.format_detection import detect_format, extra_columns
from qlora_kit.formats import DataFault, Example, to_example

logger = logging.getLogger(__name__)

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class PreparedData:
    """The checked rows of a config.

    Attributes:
        train: Rows to train on.
        validation: Rows for the validation loss; empty where the config names no file.
        test: Rows for the scorecard; empty where the config names no file.
        ledger: What happened to all other rows; encoding goes on writing in it.
        stopping: The problems because of which these rows must not be used; empty if all is well.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    ledger: Ledger
    stopping: tuple[Problem, ...] = ()

    @property
    def report(self) -> DataReport:
        """The counts of all splits together, as of now."""
        return self.ledger.report()


def prepare(config: RunConfig, *, control_tokens: Sequence[str] = ()) -> PreparedData:
    """Reads and checks all data files that ``config`` names.

    Args:
        config: Names the files, the task, and what to do with faulty rows.
        control_tokens: Strings that no text may hold, since a tokenizer would make control tokens of them.

    Raises:
        DataError: All faults of all files at once; with ``data.on_error: drop`` only those that are not of single rows.
    """
    prepared = examine(config, control_tokens=control_tokens)
    if prepared.stopping:
        raise data_error(prepared.stopping)
    return prepared


def examine(config: RunConfig, *, control_tokens: Sequence[str] = ()) -> PreparedData:
    """As ``prepare``, but the faults that would stop it are returned in ``stopping`` beside what could be read."""
    examination = _Examination(config, control_tokens)
    # Train comes last: its rows are compared with those of the other two.
    test = examination.read("test", config.data.test)
    validation = examination.read("validation", config.data.validation)
    train = examination.read("train", config.data.train, held_out=(validation, test))
    ledger = examination.ledger
    for note in ledger.notes:
        logger.warning("%s", note)
    problems = [problem for split in (train, validation, test) for problem in split.problems]
    ledger.problems.extend(problems)
    stopping = tuple(problem for problem in problems if problem.stops or config.data.on_error == "stop")
    return PreparedData(tuple(train.examples), tuple(validation.examples), tuple(test.examples), ledger, stopping)


@dataclass
class _Split:
    name: str
    examples: list[Example] = field(default_factory=list)
    digests: DigestSet = field(default_factory=DigestSet)
    problems: list[Problem] = field(default_factory=list)


class _Examination:
    """One pass over the files of a config."""

    def __init__(self, config: RunConfig, control_tokens: Sequence[str]) -> None:
        self.config = config
        self.task = config.task_spec()
        self.control = re.compile("|".join(map(re.escape, control_tokens))) if control_tokens else None
        self.ledger = Ledger()

    def read(self, name: str, paths: Sequence[str], *, held_out: Sequence[_Split] = ()) -> _Split:
        split = _Split(name)
        formats: dict[str, str] = {}  # format -> first file
        for path in paths:
            for file in self._find(split, path):
                rows = self._read_file(split, file)
                format_name = self._format_of(split, file, rows)
                if format_name is not None:
                    formats.setdefault(format_name, display_name(file))
                    self._check_rows(split, rows, format_name, held_out)
        if len(formats) > 1:
            reason = f"{name} mixes formats: {', '.join(f'{key} ({file})' for key, file in formats.items())}"
            fix = "bring the files into one format"
            split.problems.append(Problem(min(formats.values()), None, reason, "one format", fix, stops=True))
        if paths and not split.examples and not any(problem.stops for problem in split.problems):
            reason = f"no row of {name} is left of {self.ledger.rows[name]}"
            split.problems.append(Problem(paths[0], None, reason, "at least one row", "correct the rows", stops=True))
        return split

    def _find(self, split: _Split, named: str) -> list[Path]:
        path = self.config.resolve(named)
        if glob.has_magic(named) and not path.exists():
            # The folder before the first wildcard is what can be looked for beside the YAML.
            parts = Path(named).parts
            fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
            path = self.config.resolve(str(Path(*parts[:fixed]))).joinpath(*parts[fixed:])
        files = find_files(path)
        if not files:
            split.problems.append(no_match(path))
        return files

    def _read_file(self, split: _Split, file: Path) -> list[Row]:
        rows: list[Row] = []
        rows_before = self.ledger.rows[split.name]
        for item in read_rows(file):
            if isinstance(item, Note):
                self.ledger.notes.append(item.text)
            elif isinstance(item, Row):
                rows.append(item)
            else:
                self._refuse(split, item)
        self.ledger.rows[split.name] += len(rows)
        self.ledger.files.append((split.name, file, self.ledger.rows[split.name] - rows_before))
        return rows

    def _refuse(self, split: _Split, problem: Problem) -> None:
        """Notes a problem that was met while reading; one of a single row counts as a row, dropped."""
        split.problems.append(problem)
        if not problem.stops:
            self.ledger.rows[split.name] += 1
            self.ledger.record(split.name, locate(problem.file, problem.line), "dropped", problem.reason)

    def _format_of(self, split: _Split, file: Path, rows: list[Row]) -> str | None:
        if not rows:
            return None
        name = self.config.data.format
        if name == "auto":
            try:
                name = detect_format((row.values for row in rows), self.task, lines=(row.line for row in rows))
            except DataFault as fault:
                split.problems.append(
                    Problem(display_name(file), None, fault.what, fault.expected, fault.fix, stops=True)
                )
                return None
        unused = extra_columns({column for row in rows for column in row.values}, format=name, task=self.task)
        if unused:
            self.ledger.notes.append(f"{display_name(file)}: nothing uses the columns {', '.join(unused)}")
        return name

    def _check_rows(self, split: _Split, rows: list[Row], format_name: str, held_out: Sequence[_Split]) -> None:
        for row in rows:
            try:
                example = to_example(row.values, format=format_name, task=self.task, source=row.source)
                self._check_text(example)
            except DataFault as fault:
                split.problems.append(Problem(row.file, row.line, fault.what, fault.expected, fault.fix))
                self.ledger.record(split.name, row.source, "dropped", fault.what)
                continue
            digest = conversation_digest(example.messages)
            if not split.digests.add(digest):
                self.ledger.record(split.name, row.source, "duplicate", "exact duplicate of an earlier row")
                continue
            found_in = [other.name for other in held_out if digest in other.digests]
            if found_in:
                self._note_leak(split, row, " and ".join(found_in))
            split.examples.append(example)

    def _note_leak(self, split: _Split, row: Row, found_in: str) -> None:
        reason = f"the same row is in {found_in}"
        self.ledger.record(split.name, row.source, "leaked", reason)
        if not self.config.data.allow_leakage:
            fix = "remove it from one of the two, or set data.allow_leakage=true"
            split.problems.append(
                Problem(row.file, row.line, reason, "train rows that no held-out split holds", fix, stops=True)
            )

    def _check_text(self, example: Example) -> None:
        for number, message in enumerate(example.messages, start=1):
            where = f"turn {number} ({message.role})"
            found = None if self.control is None else self.control.search(message.content)
            if found is not None:
                raise DataFault(
                    f"{where} holds the control token {found.group()}",
                    expected="plain text, which cannot end or open a turn",
                    fix="remove the token from the text, or remove the row",
                )
            if LONE_SURROGATE.search(message.content):
                raise DataFault(
                    f"{where} holds half a character (a lone surrogate)",
                    expected="whole Unicode characters",
                    fix="write both halves of the escape, such as \\ud83d\\ude00, or remove the row",
                )
        if sum(len(message.content) for message in example.messages) > MAX_ROW_BYTES:
            limit = f"{MAX_ROW_BYTES // 1024} KiB"
            raise DataFault(
                f"the row is longer than {limit}", expected=f"at most {limit}", fix="split or shorten the row"
            )
