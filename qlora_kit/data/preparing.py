"""Reads and checks the data of a config as a stream: rows go in, checked examples come out, faults go to the ledger."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from qlora_kit.config import DataPart, RunConfig
from qlora_kit.conversation import DataFault, Example, check_texts, control_pattern
from qlora_kit.data.duplicates import DigestSet, example_digest
from qlora_kit.data.ledger import DataReport, Ledger, Problem, ReadFile, data_error, locate
from qlora_kit.data.near_duplicates import NearDuplicates
from qlora_kit.data.reading import Item, Note, Row
from qlora_kit.data.sources import DataSource, Sources
from qlora_kit.format_detection import detect_format, extra_columns
from qlora_kit.formats import check_format, to_example

logger = logging.getLogger(__name__)

_Columns = dict[frozenset[str], tuple[int, tuple[str, ...]]]
"""Each set of columns that rows have: the line of the first of them, and the columns in its order."""
DETECTED_ROWS = 1000  # rows that are looked at before the first is converted; all others are held to their format


@dataclass(frozen=True)
class PreparedData:
    """The checked rows of a config.

    Attributes:
        train: Rows to train on.
        validation: Rows for the validation loss; empty where the config names no file.
        test: Rows for the scorecard; empty where the config names no file.
        ledger: What happened to all other rows.
        stopping: The problems because of which these rows must not be used; empty if all is well.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    ledger: Ledger
    stopping: tuple[Problem, ...] = ()

    @property
    def report(self) -> DataReport:
        """The counts of all splits together."""
        return self.ledger.report()


def prepare(config: RunConfig, *, control_tokens: Sequence[str] = ()) -> PreparedData:
    """Reads and checks all data that ``config`` names, and keeps every row in memory.

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
    examination = Examination(config, control_tokens)
    rows = {split: tuple(examination.read(split)) for split in READING_ORDER}
    ledger = examination.ledger
    tell_notes(ledger)
    return PreparedData(rows["train"], rows["validation"], rows["test"], ledger, ledger.stopping(config.data.on_error))


def tell_notes(ledger: Ledger) -> None:
    """Log what users should hear of their files."""
    for note in ledger.notes:
        logger.warning("%s", note)


READING_ORDER = ("test", "validation", "train")  # train comes last: its rows are compared with those of the other two


@dataclass
class _Split:
    name: str
    near: NearDuplicates | None
    digests: DigestSet = field(default_factory=DigestSet)
    formats: dict[str, str] = field(default_factory=dict)  # of one part: format -> the first source that is in it
    kept: int = 0


class Examination:
    """One pass over the data of a config; splits are read in ``READING_ORDER``.

    Args:
        config: Names the files, the tasks, and what to do with faulty rows.
        control_tokens: Strings that no text may hold, since a tokenizer would make control tokens of them.
        sources: What the config's entries name; None to look it up.

    Raises:
        ConfigError: Near duplicates are asked for, and the library that finds them is not installed.
    """

    def __init__(
        self, config: RunConfig, control_tokens: Sequence[str] = (), *, sources: Sources | None = None
    ) -> None:
        self.config = config
        self._sources = Sources(config) if sources is None else sources
        self.ledger = Ledger()
        self._control = control_pattern(control_tokens)
        threshold = config.data.near_duplicates
        self._splits = {
            name: _Split(name, None if threshold is None else NearDuplicates(threshold)) for name in READING_ORDER
        }

    def read(self, name: str) -> Iterator[Example]:
        """The checked rows of a split, of all parts."""
        return chain.from_iterable(self.read_part(name, part) for part in self.config.parts())

    def read_part(self, name: str, part: DataPart) -> Iterator[Example]:
        """The checked rows of one part of a split, as they are read; faults and all other rows go to the ledger."""
        split = self._splits[name]
        split.formats = {}
        kept_before, rows_before = split.kept, self.ledger.rows[name]
        stopped = False
        for entry in part.section.of(name):
            sources = self._sources.of(entry)
            if isinstance(sources, Problem):
                self.ledger.refuse(name, sources)
                stopped = True
                continue
            for source in sources:
                source_stopped = yield from self._read_source(split, part, source)
                stopped = stopped or source_stopped
        if len(split.formats) > 1:
            reason = f"{name} mixes formats: {', '.join(f'{key} ({file})' for key, file in split.formats.items())}"
            first = min(split.formats.values())
            self.ledger.refuse(
                name, Problem(first, None, reason, "one format", "bring the files into one format", stops=True)
            )
        if part.section.of(name) and split.kept == kept_before and not stopped:
            reason = f"no row of {name} is left of {self.ledger.rows[name] - rows_before}"
            entry = part.section.of(name)[0]
            place = entry if isinstance(entry, str) else entry.hub
            self.ledger.refuse(name, Problem(place, None, reason, "at least one row", "correct the rows", stops=True))

    def _read_source(self, split: _Split, part: DataPart, source: DataSource) -> Generator[Example, None, bool]:
        """Yields the checked rows of one source; returns whether a problem was met that stops the run."""
        items = source.read()
        head = list(islice(items, DETECTED_ROWS))
        columns = _first_lines(head)
        if not columns:  # the first rows are all faulty: the columns of later ones must say the format
            columns = _first_lines(source.read())
        format_name = self._format_of(split, part, source, columns)
        rows = 0
        stopped = False
        for item in chain(head, items):
            if isinstance(item, Note):
                self.ledger.notes.append(item.text)
            elif isinstance(item, Problem):
                stopped = stopped or item.stops
                rows += 0 if item.stops else 1
                self._refuse(split, item)
            else:
                rows += 1
                self.ledger.rows[split.name] += 1
                columns.setdefault(frozenset(item.values), (item.line, tuple(item.values)))
                if format_name is None:
                    self.ledger.record(split.name, item.source, "dropped", "the format of its file is refused")
                    continue
                example = self._checked(split, part, item, format_name)
                if example is not None:
                    split.kept += 1
                    yield example
        if part.section.format == "auto" and format_name is not None:  # now that the columns of all rows are known
            format_name = self._format_of(split, part, source, columns)
        if format_name is not None:
            self._note_unused(part, source, columns, format_name)
            split.formats.setdefault(format_name, source.name)
        if rows:
            stopped = not self._note_file(split, source, rows) or stopped
        return stopped or (bool(columns) and format_name is None)

    def _note_file(self, split: _Split, source: DataSource, rows: int) -> bool:
        """Notes what was read; False where the file has gone meanwhile."""
        try:
            self.ledger.files.append(ReadFile(split.name, source.name, source.record, source.sha256(), rows))
        except OSError as error:
            reason = f"the file cannot be read any more ({error.strerror})"
            fix = "start again when nothing moves or writes it"
            self.ledger.refuse(split.name, Problem(source.name, None, reason, "a file at rest", fix, stops=True))
            return False
        return True

    def _refuse(self, split: _Split, problem: Problem) -> None:
        """Notes a problem that was met while reading; one of a single row counts as a row, dropped."""
        self.ledger.refuse(split.name, problem)
        if not problem.stops:
            self.ledger.rows[split.name] += 1
            self.ledger.record(split.name, locate(problem.file, problem.line), "dropped", problem.reason)

    def _format_of(self, split: _Split, part: DataPart, source: DataSource, columns: _Columns) -> str | None:
        """The format of a source whose rows have these columns; None where there is none, which the ledger tells."""
        if not columns:
            return None
        name = part.section.format
        try:
            if name == "auto":
                lines, rows = zip(*columns.values(), strict=True)
                name = detect_format(rows, part.task, lines=lines)
            check_format(name, part.task)
            return name
        except DataFault as fault:
            self.ledger.refuse(
                split.name, Problem(source.name, fault.line, fault.what, fault.expected, fault.fix, stops=True)
            )
            return None

    def _note_unused(self, part: DataPart, source: DataSource, columns: _Columns, format_name: str) -> None:
        unused = extra_columns(frozenset().union(*columns), format=format_name, task=part.task)
        if unused:
            self.ledger.notes.append(f"{source.name}: nothing uses the columns {', '.join(unused)}")

    def _checked(self, split: _Split, part: DataPart, row: Row, format_name: str) -> Example | None:
        """The row as an example that is to be kept; None when it went to the ledger."""
        try:
            example = to_example(row.values, format=format_name, task=part.task, source=row.source)
            check_texts(example, self._control)
        except DataFault as fault:
            self.ledger.refuse(split.name, Problem(row.file, row.line, fault.what, fault.expected, fault.fix))
            self.ledger.record(split.name, row.source, "dropped", fault.what)
            return None
        digest = example_digest(example)
        if not split.digests.add(digest):
            self.ledger.record(split.name, row.source, "duplicate", "exact duplicate of an earlier row")
            return None
        text = "" if split.near is None else _varying_text(example)
        near = None if split.near is None else split.near.add(text, row.source)
        if near is not None:
            reason = f"near duplicate of {near[0]} (similarity about {near[1]:.2f})"
            self.ledger.record(split.name, row.source, "duplicate", reason)
            return None
        if split.name == "train":
            self._look_for_leak(split, row, digest, text)
        return example

    def _look_for_leak(self, split: _Split, row: Row, digest: bytes, text: str) -> None:
        held_out = [self._splits[name] for name in ("validation", "test")]
        found_in = [other.name for other in held_out if digest in other.digests]
        if found_in:
            self._note_leak(split, row, f"the same row is in {' and '.join(found_in)}")
            return
        for other in held_out:
            near = None if other.near is None else other.near.find(text)
            if near is not None:
                self._note_leak(split, row, f"nearly the same row (similarity about {near[1]:.2f}) is {near[0]}")
                return

    def _note_leak(self, split: _Split, row: Row, reason: str) -> None:
        self.ledger.record(split.name, row.source, "leaked", reason)
        if not self.config.data.allow_leakage:
            fix = "remove it from one of the two, or set data.allow_leakage=true"
            expected = "train rows that no held-out split holds"
            self.ledger.refuse(split.name, Problem(row.file, row.line, reason, expected, fix, stops=True))


def _varying_text(example: Example) -> str:
    """What tells rows apart: every turn but the system's, which all rows of a task share."""
    if example.text is not None:
        return example.text
    return "\n".join(message.content for message in example.messages if message.role != "system")


def _first_lines(items: Iterator[Item] | list[Item]) -> _Columns:
    found: _Columns = {}
    for item in items:
        if isinstance(item, Row):
            found.setdefault(frozenset(item.values), (item.line, tuple(item.values)))
    return found
