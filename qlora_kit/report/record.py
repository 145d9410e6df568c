"""What a report is made of: the record, contract, config and ledger of a run folder, read and checked."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qlora_kit.adapters import AdapterContract
from qlora_kit.adapters.card import RUN_CONFIG_FILE
from qlora_kit.data.ledger import LedgerEntry
from qlora_kit.data.lengths import Lengths
from qlora_kit.errors import AdapterError, Fault, QloraKitError
from qlora_kit.strict_json import read_json_object

RECORD_FILE = "metrics.json"
LEDGER_FILE = "ledger.jsonl"
MAX_RECORD_BYTES = 2**28
MAX_CONFIG_BYTES = 2**20
ENTRIES_SHOWN = 12
_FIX = "give the folder of a finished run (runs/NAME); train again where a file of it was lost or changed"
_LAX = ConfigDict(frozen=True, extra="ignore")


class SplitData(BaseModel):
    """The rows of a split; rows = kept + dropped + duplicates. Units are rows, or tokens where named."""

    model_config = _LAX

    rows: int
    kept: int
    dropped: int
    truncated: int
    duplicates: int
    leaked: int
    supervised_tokens: int
    total_tokens: int
    lengths: Lengths | None
    """Of the kept rows; None where none was kept."""


class Answer(BaseModel):
    """A greedy answer without its stop token, and whether it ended by itself (``stop``)."""

    model_config = _LAX

    text: str
    finish_reason: Literal["stop", "length"]


class Sample(BaseModel):
    """One validation prompt as the model sees it, the expected answer, and the answers of base and trained adapter."""

    model_config = _LAX

    prompt: str
    expected: str
    base: Answer
    adapter: Answer


class Record(BaseModel):
    """``metrics.json``, as far as the report needs it; the figures are those of ``TrainResult``."""

    model_config = _LAX

    steps: int
    kept_step: int
    train_loss: float
    eval_loss: float | None
    stop_rate: float | None
    tokens_per_second: float
    trainable_parameters: int
    peak_bytes: int
    seconds: float
    device: str
    """The GPU's name, or CPU."""
    data: dict[str, SplitData]
    """train, validation and test, those that have rows."""
    samples: tuple[Sample, ...]
    history: tuple[dict[str, Any], ...]
    """Log lines of the trainer, oldest first."""

    def logged(self, name: str) -> tuple[tuple[float, float], ...]:
        """(step, value) of every log line that holds ``name`` as a number."""
        return tuple(
            (float(line["step"]), float(line[name]))
            for line in self.history
            if isinstance(line.get("step"), int | float) and isinstance(line.get(name), int | float)
        )


@dataclass(frozen=True)
class Run:
    """A finished run, as its folder tells it.

    Attributes:
        record: Figures, data, samples and log lines.
        contract: The adapter's contract.
        config_text: The resolved configuration, as YAML.
        actions: How many ledger entries there are of each (split, action).
        entries: The first ``ENTRIES_SHOWN`` of them.
    """

    record: Record
    contract: AdapterContract
    config_text: str
    actions: dict[tuple[str, str], int]
    entries: tuple[LedgerEntry, ...]


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Raises:
        AdapterError: The folder or a file is missing or not as a run wrote it; with all faults.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder", expected="the folder of a finished run", fix=_FIX)
    faults: list[Fault] = []
    found: dict[str, Any] = {}
    readers = {"record": _record, "contract": AdapterContract.load, "config_text": _config_text, "ledger": _ledger}
    for name, read in readers.items():
        try:
            found[name] = read(folder)
        except QloraKitError as error:
            faults += error.faults
    if faults:
        raise AdapterError.of(faults)
    actions, entries = found.pop("ledger")
    return Run(**found, actions=actions, entries=entries)


def _record(folder: Path) -> Record:
    path = folder / RECORD_FILE
    content = read_json_object(path, max_bytes=MAX_RECORD_BYTES, error=AdapterError, fix=_FIX)
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first, *rest = error.errors()
        where = ".".join(map(str, first["loc"]))
        more = f", and {len(rest)} more faults" if rest else ""
        raise AdapterError(
            f"{path}: {where}: {first['msg'].lower()}{more}", expected="the record that a run writes", fix=_FIX
        ) from error


def _config_text(folder: Path) -> str:
    path = folder / RUN_CONFIG_FILE
    return _text(path, limit=MAX_CONFIG_BYTES)


def _text(path: Path, *, limit: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise AdapterError(f"{path}: the file is too large", expected=f"at most {limit} bytes", fix=_FIX)
        return content.decode("utf-8")
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}", expected="a file", fix=_FIX) from error
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: is not UTF-8", expected="the text that a run writes", fix=_FIX) from error


def _ledger(folder: Path) -> tuple[dict[tuple[str, str], int], tuple[LedgerEntry, ...]]:
    """Counts and the first entries, read line by line: a ledger may be large."""
    path = folder / LEDGER_FILE
    actions: Counter[tuple[str, str]] = Counter()
    entries: list[LedgerEntry] = []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                entry = LedgerEntry(**json.loads(line))
                actions[entry.split, entry.action] += 1
                if len(entries) < ENTRIES_SHOWN:
                    entries.append(entry)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}", expected="a file", fix=_FIX) from error
    except (ValueError, TypeError) as error:
        number = sum(actions.values()) + 1
        raise AdapterError(f"{path}:{number}: is no entry", expected="one JSON object a line", fix=_FIX) from error
    return dict(actions), tuple(entries)
