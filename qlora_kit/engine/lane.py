"""Rows that go through the model together: those of the bank share a lane, each adapter of PEFT's path has its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.engine.row import Row
from qlora_kit.generation.kv_rows import KvRows, columns_for

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
        """The rows whose prompts are read in this step: the one that came first, and those like it that fit beside it.

        The first one leads, or a prompt of many tokens would wait as long as shorter ones come.
        """
        if self.reading is not None:
            return [self.reading]
        if not self.entering:
            return []
        first, *others = self.entering
        group, longest = [first], _unread(first)
        for row in sorted(others, key=lambda row: abs(_unread(row) - _unread(first))):  # little padding
            if (len(group) + 1) * max(longest, _unread(row)) <= PREFILL_TOKENS:
                group, longest = [*group, row], max(longest, _unread(row))
        self.entering = [row for row in others if row not in group]
        return group

    def bytes_with(self, row: Row | None) -> int:
        """Memory of a block that holds every row of the lane, and ``row``, each with its longest answer."""
        rows = [*self.all_rows(), *([] if row is None else [row])]
        columns = columns_for(max((one.final_length for one in rows), default=0))
        return len(rows) * columns * self.kv.token_bytes

    @property
    def granted_bytes(self) -> int:
        """What the lane's rows may come to."""
        return self.bytes_with(None)

    def shrink(self) -> None:
        """Give back the memory that no row has tokens in."""
        held = self._held_rows()
        if held:
            self.kv.resize(len(held), columns_for(max(row.length for row in held)))
        else:
            self.kv.release()

    def prepare(self, group: list[Row], room_bytes: int) -> list[tuple[int, ...]]:
        """Make room for the group behind the rows, with the prefixes that are known; the tokens to feed now.

        Args:
            group: What ``next_group`` gave.
            room_bytes: How large the block may be with room to spare.
        """
        first, chunk = len(self.rows), PREFILL_TOKENS // len(group)
        length = max(len(row.prompt_ids) for row in group)
        self._reserve(first + len(group), length, room_bytes)
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

    def stop_reading(self) -> None:
        """Forget a prompt that was read in part. Nobody has looked whether it is finite, as ``KvRows.clear`` asks."""
        if self.reading is not None:
            self.kv.clear(len(self.rows))
            self.reading = None

    def make_room(self, room_bytes: int) -> None:
        """One more token for each row under way; ``room_bytes`` as in ``prepare``."""
        self._reserve(len(self._held_rows()), max(row.length for row in self.rows) + 1, room_bytes)

    def _reserve(self, rows: int, length: int, room_bytes: int) -> None:
        longest = max((row.length for row in self._held_rows()), default=0)
        self.kv.reserve(rows, max(length, longest), most_bytes=room_bytes)

    def _held_rows(self) -> list[Row]:
        """Those with places in the block, in their order."""
        return [*self.rows, *([] if self.reading is None else [self.reading])]

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
        return [*self._held_rows(), *self.entering]


def _unread(row: Row) -> int:
    return len(row.prompt_ids) - (0 if row.prefix is None else row.prefix[1])
