"""Rows that go through the model together: those of the bank share a lane, each adapter of PEFT's path has its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.engine.row import Row
from qlora_kit.generation.kv_rows import KvRows

if TYPE_CHECKING:
    import torch

PREFILL_TOKENS = 1024
"""Prompt tokens in one step at most: rows under way never wait for more."""


class Lane:
    """The rows under way, those whose prompts are still to be read, and their keys and values."""

    def __init__(self, model: torch.nn.Module, peft_slot: str | None) -> None:
        self.peft_slot = peft_slot
        self.rows: list[Row] = []
        self.entering: list[Row] = []
        self.reading: Row | None = None  # a prompt longer than one step, at the place behind the rows
        self.kv = KvRows(model)

    @property
    def count(self) -> int:
        """Rows in the lane, whatever their state."""
        return len(self.rows) + len(self.entering) + (self.reading is not None)

    def next_group(self) -> list[Row]:
        """The rows whose prompts are read in this step: one long prompt, or several that fit together."""
        if self.reading is not None:
            return [self.reading]
        self.entering.sort(key=_unread)
        size = 0
        while size < len(self.entering) and (size + 1) * _unread(self.entering[size]) <= PREFILL_TOKENS:
            size += 1
        size = max(size, min(1, len(self.entering)))
        group, self.entering = self.entering[:size], self.entering[size:]
        return group

    def prepare(self, group: list[Row]) -> list[tuple[int, ...]]:
        """Make room for the group behind the rows, with the prefixes that are known; the tokens to feed now."""
        first, chunk = len(self.rows), PREFILL_TOKENS // len(group)
        self.kv.reserve(first + len(group), max(len(row.prompt_ids) for row in group))
        if self.reading is None:
            for place, row in enumerate(group):
                if row.prefix is not None:
                    stored, row.length = row.prefix
                    self.kv.restore(first + place, stored, row.length)
                    row.prefix = None
        return [row.prompt_ids[row.length : row.length + chunk] for row in group]

    def entered(self, group: list[Row]) -> bool:
        """Whether the group's prompts are read whole; then its rows are under way."""
        row = group[0]
        if row.length < len(row.prompt_ids):
            self.reading = row
            return False
        self.reading = None
        self.rows.extend(group)
        return True

    def remove(self, place: int) -> Row:
        """Take the row at ``place`` out; the last one takes its place."""
        row, last = self.rows[place], len(self.rows) - 1
        self.kv.move(last, place, self.rows[last].length)
        self.rows[place] = self.rows[last]
        self.rows.pop()
        if self.reading is not None:
            self.kv.move(last + 1, last, self.reading.length)
        return row

    def all_rows(self) -> list[Row]:
        """Every row of the lane."""
        return [*self.rows, *self.entering, *([] if self.reading is None else [self.reading])]


def _unread(row: Row) -> int:
    return len(row.prompt_ids) - (0 if row.prefix is None else row.prefix[1])
