"""Keys and values of prompts already answered, for the next prompt that begins alike; least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.generation.kv_rows import StoredRow

PREFIX_BYTES = 256 * 1024**2
MIN_TOKENS = 16
"""A shorter prefix is computed again: copying would not be faster."""


class PrefixCache:
    """Stored rows by what their values depend on: the adapter's version, and every token before."""

    def __init__(self, max_bytes: int = PREFIX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[tuple[Hashable, tuple[int, ...]], StoredRow] = OrderedDict()
        self.bytes = 0

    def longest(self, adapter: Hashable, prompt_ids: tuple[int, ...]) -> tuple[StoredRow, int] | None:
        """The row that shares most tokens with a prompt from its beginning, and how many.

        The prompt's last token is never among them: its logits are wanted.
        """
        best: tuple[int, tuple[Hashable, tuple[int, ...]]] | None = None
        for key in self._rows:
            if key[0] == adapter:
                shared = _shared(key[1], prompt_ids[:-1])
                if shared >= MIN_TOKENS and (best is None or shared > best[0]):
                    best = (shared, key)
        if best is None:
            return None
        self._rows.move_to_end(best[1])
        return self._rows[best[1]], best[0]

    def wants(self, tokens: int) -> bool:
        """Whether a row of so many tokens is worth its copy."""
        return tokens >= MIN_TOKENS and self._max_bytes > 0

    def put(self, adapter: Hashable, token_ids: tuple[int, ...], row: StoredRow) -> None:
        """Keep ``row``, which holds exactly ``token_ids``; what is a beginning of it goes."""
        if row.bytes > self._max_bytes:
            return
        for key in [key for key in self._rows if key[0] == adapter and _shared(key[1], token_ids) == len(key[1])]:
            self._remove(key)
        self._rows[adapter, token_ids] = row
        self.bytes += row.bytes
        self.shrink(self._max_bytes)

    def shrink(self, most_bytes: int) -> None:
        """Let rows go, the least recently used first, until ``most_bytes`` are left."""
        while self._rows and self.bytes > most_bytes:
            self._remove(next(iter(self._rows)))

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self.bytes = 0

    def _remove(self, key: tuple[Hashable, tuple[int, ...]]) -> None:
        self.bytes -= self._rows.pop(key).bytes


def _shared(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many tokens are equal from the beginning."""
    end = min(len(left), len(right))
    if left[:end] == right[:end]:
        return end
    low, high = 0, end  # equal up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left[:middle] == right[:middle] else (low, middle)
    return low
