"""The data of a config as training takes them: checked and tokenised rows of each split on disk, with their ledger."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_kit.atomic import full_disk_errors
from qlora_kit.config import DataPart, RunConfig
from qlora_kit.data.chat import control_tokens, read_turn_format, template_system_prompt
from qlora_kit.data.ledger import SPLITS, DataReport, Ledger, Problem, data_error
from qlora_kit.data.preparing import READING_ORDER, Examination
from qlora_kit.data.segments import ContentChangesTemplate, SegmentRenderer
from qlora_kit.data.sources import Sources
from qlora_kit.data.token_cache import TokenCache, token_folder, token_key
from qlora_kit.data.token_file import TokenWriter, open_tokens
from qlora_kit.data.tokenising import TokenRules, tokenise

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
LEDGER_FILE = "ledger.jsonl"


@dataclass(frozen=True)
class PartRows:
    """The rows of one part of the training data.

    Attributes:
        task: The part's task.
        rows: How many there are.
        weight: How often each is seen in an epoch.
        seen: How many are seen in an epoch.
    """

    task: str
    rows: int
    weight: float
    seen: int


@dataclass(frozen=True)
class TokenisedData:
    """The tokenised rows of a config.

    Attributes:
        train: Columns ``input_ids``, ``labels`` and ``source`` (``file:line``), one epoch by the parts' weights; None
            if no row is left.
        validation: The same for the validation loss; None where the config names no data.
        test: The same for the scorecard's data.
        parts: What the training rows are made of.
        ledger: What happened to every other row, and all counts.
        stopping: The problems because of which these rows must not be used; empty if all is well.
        from_cache: Whether they were kept from an earlier run.
        keeper: Holds a temporary folder, where the cache could not be written, as long as this lives.
    """

    train: Dataset | None
    validation: Dataset | None
    test: Dataset | None
    parts: tuple[PartRows, ...]
    ledger: Ledger
    stopping: tuple[Problem, ...]
    from_cache: bool
    keeper: TemporaryDirectory[str] | None = None

    @property
    def report(self) -> DataReport:
        """The counts of all splits together."""
        return self.ledger.report()

    def require_usable(self) -> None:
        """Refuse what must not be trained on.

        Raises:
            DataError: All faults of all files.
        """
        if self.stopping:
            raise data_error(self.stopping)


def tokenised_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, cache: TokenCache | None = None
) -> TokenisedData:
    """Read, check and tokenise all data of a config; memory holds one batch of rows, whatever their number.

    Args:
        config: Names the data, the tasks and the rules.
        tokenizer: The base's.
        cache: Where tokenised data are kept; None for the user's cache folder.

    Raises:
        BaseModelError: The tokenizer has no usable chat template, or what it encodes does not decode to the answer.
    """
    cache = TokenCache() if cache is None else cache
    sources = Sources(config)
    data = _hashes(config, sources)
    key = None if data is None else token_key(config, tokenizer, data)
    if key is not None:
        kept = _from_cache(config, cache, key)
        if kept is not None:
            return kept
    if key is None:  # what cannot be read now cannot be kept either: this pass tells why
        temporary = TemporaryDirectory(prefix="qlora-kit-tokens-")
        with full_disk_errors(Path(temporary.name)):
            return _made(config, tokenizer, Path(temporary.name), sources=sources, keeper=temporary)
    try:
        with token_folder(cache, key) as (folder, temporary_folder):
            made = _made(config, tokenizer, folder, sources=sources, keeper=temporary_folder)
            if made.stopping:
                raise _NotKept(made)
            if data != _hashes(config, sources):
                raise _NotKept(_changed_while_read(made))
    except _NotKept as refused:
        return refused.data
    if temporary_folder is not None:
        made.ledger.notes.append(f"{cache.root}: cannot be written, so the tokenised data are not kept for later runs")
        return made
    try:
        return _load(config, cache.root / key, from_cache=False)
    except FileNotFoundError:  # another process needed the room
        temporary = TemporaryDirectory(prefix="qlora-kit-tokens-")
        with full_disk_errors(Path(temporary.name)):
            return _made(config, tokenizer, Path(temporary.name), sources=sources, keeper=temporary)


class _NotKept(Exception):
    """Leaves the cache's folder without publishing it."""

    def __init__(self, data: TokenisedData) -> None:
        self.data = data


def _hashes(config: RunConfig, sources: Sources) -> dict[str, Any] | None:
    """Split -> the hash of each source; None where a source cannot be read, which reading it will tell."""
    found: dict[str, Any] = {}
    try:
        for split in SPLITS:
            found[split] = []
            for entry in config.sources(split):
                named = sources.of(entry)
                if isinstance(named, Problem):
                    return None
                found[split] += [[source.name, source.sha256()] for source in named]
    except OSError:
        return None
    return found


def _made(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    sources: Sources,
    keeper: TemporaryDirectory[str] | None,
) -> TokenisedData:
    """Read all rows and write what is kept into ``folder``."""
    try:
        renderer = SegmentRenderer(tokenizer, read_turn_format(tokenizer))
        return _one_pass(config, tokenizer, folder, sources=sources, keeper=keeper, renderer=renderer)
    except ContentChangesTemplate:
        logger.info("the chat template looks into the texts: each row is rendered by it")
        return _one_pass(config, tokenizer, folder, sources=sources, keeper=keeper, renderer=None)


def _one_pass(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    sources: Sources,
    keeper: TemporaryDirectory[str] | None,
    renderer: SegmentRenderer | None,
) -> TokenisedData:
    rules = TokenRules.of(config)
    examination = Examination(config, control_tokens(tokenizer), sources=sources)
    ledger = examination.ledger
    counts: dict[str, list[int]] = {}
    for split in READING_ORDER:
        counts[split] = []
        with TokenWriter(_path(folder, split)) as writer:
            for part in config.parts():
                before = writer.rows
                rows = examination.read_part(split, part)
                for batch in tokenise(rows, tokenizer, rules, ledger=ledger, split=split, renderer=renderer):
                    writer.write(batch)
                counts[split].append(writer.rows - before)
        if ledger.rows[split] and not writer.rows and not ledger.problems:
            reason = f"no {split} row is left after tokenising {ledger.rows[split]}"
            expected = f"at least one row of at most {rules.max_length} tokens"
            fix = "raise train.max_length or shorten the rows"
            ledger.refuse(split, Problem(ledger.files[-1].name, None, reason, expected, fix, stops=True))
    ledger.notes += _system_prompt_notes(config, tokenizer)
    ledger.notes += _weight_notes(_part_rows(config, counts["train"]))
    ledger.write(folder / LEDGER_FILE)
    state = {"ledger": ledger.state(), "counts": counts}
    (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    stopping = ledger.stopping(config.data.on_error)
    return _opened(config, folder, ledger, counts, stopping=stopping, from_cache=False, keeper=keeper)


def _from_cache(config: RunConfig, cache: TokenCache, key: str) -> TokenisedData | None:
    folder = cache.find(key)
    if folder is None:
        return None
    try:
        kept = _load(config, folder, from_cache=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: the tokenised data cannot be read (%s) and are made again", folder, error)
        cache.remove(key)
        return None
    return kept


def _load(config: RunConfig, folder: Path, *, from_cache: bool) -> TokenisedData:
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    ledger = Ledger.restore(state["ledger"], folder / LEDGER_FILE)
    return _opened(config, folder, ledger, state["counts"], stopping=(), from_cache=from_cache, keeper=None)


def _opened(
    config: RunConfig,
    folder: Path,
    ledger: Ledger,
    counts: dict[str, list[int]],
    *,
    stopping: tuple[Problem, ...],
    from_cache: bool,
    keeper: TemporaryDirectory[str] | None,
) -> TokenisedData:
    rows = {split: open_tokens(_path(folder, split)) if sum(counts[split]) else None for split in SPLITS}
    for split, found in rows.items():
        if found is not None and len(found) != sum(counts[split]):
            raise ValueError(f"{_path(folder, split)} holds {len(found)} rows, not {sum(counts[split])}")
    parts = _part_rows(config, counts["train"])
    train = rows["train"]
    if train is not None and any(part.weight != 1 for part in parts):
        train = train.select(weighted_rows(parts, seed=config.train.seed))
    return TokenisedData(
        train, rows["validation"], rows["test"], parts, ledger, stopping, from_cache=from_cache, keeper=keeper
    )


def weighted_rows(parts: Sequence[PartRows], *, seed: int) -> list[int]:
    """The rows of one epoch: each part's rows as often as its weight says, a rest chosen at random by ``seed``."""
    generator = np.random.default_rng(seed)
    chosen: list[list[int]] = []
    start = 0
    for part in parts:
        whole, rest = divmod(part.seen, part.rows) if part.rows else (0, 0)
        some = np.sort(generator.permutation(part.rows)[:rest])
        chosen += [list(range(start, start + part.rows))] * whole + [[start + int(row) for row in some]]
        start += part.rows
    return list(chain.from_iterable(chosen))


def _part_rows(config: RunConfig, counts: Sequence[int]) -> tuple[PartRows, ...]:
    def rows_of(part: DataPart, rows: int) -> PartRows:
        weight = part.section.weight
        return PartRows(part.task.name, rows, weight, seen=max(round(rows * weight), min(rows, 1)))

    return tuple(rows_of(part, rows) for part, rows in zip(config.parts(), counts, strict=True))


def _system_prompt_notes(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    own = template_system_prompt(tokenizer)
    talks = [part for part in config.parts() if part.section.format != "text"]
    without = [part.task.name for part in talks if not part.task.system_prompt]
    if own is None or not without:
        return []
    return [f"{', '.join(without)}: rows without a system turn get the chat template's own system prompt, {own!r}"]


def _weight_notes(parts: Sequence[PartRows]) -> list[str]:
    return [
        f"{part.task}: {part.seen:,} rows are seen in an epoch, of {part.rows:,} (weight {part.weight:g})"
        for part in parts
        if part.weight != 1
    ]


def _changed_while_read(made: TokenisedData) -> TokenisedData:
    name = ", ".join(sorted({file.name for file in made.ledger.files}))
    reason, fix = "the data changed while they were read", "start again when nothing writes to them any more"
    return replace(made, stopping=(Problem(name, None, reason, "files that nothing writes to", fix, stops=True),))


def _path(folder: Path, split: str) -> Path:
    return folder / f"{split}.arrow"
