"""How much memory keys and values may take: rows join while their longest answers fit, the others wait their turn."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from qlora_kit.engine.lane import Lane
from qlora_kit.engine.prefix_cache import PrefixCache
from qlora_kit.engine.row import Row
from qlora_kit.errors import ConfigError
from qlora_kit.generation.kv_rows import columns_for
from qlora_kit.host_memory import free_memory_bytes
from qlora_kit.units import in_units

if TYPE_CHECKING:
    import torch

DEVICE_SHARE = 0.7
"""Of what a GPU has free behind the base; the rest is for adapters' slots and what passes need meanwhile."""
HOST_SHARE = 0.5
_UNKNOWN_BYTES = 4 * 1024**3


def automatic_kv_bytes(device: torch.device) -> int:
    """A share of the memory that is free now, on ``device`` or, where that is the CPU, on the host."""
    if device.type == "cuda":
        import torch

        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(DEVICE_SHARE * free_bytes)
    known_bytes = free_memory_bytes()
    return _UNKNOWN_BYTES if known_bytes is None else int(HOST_SHARE * known_bytes)


class KvBudget:
    """The bytes that the lanes' blocks and the stored prefixes may take together.

    What the rows of a lane may come to, each with its longest answer, is granted to it when they join: blocks of all
    lanes can grow so far at any time. Beyond that they hold room to spare only where it is free.
    """

    def __init__(self, most_bytes: int, token_bytes: int, prefixes: PrefixCache) -> None:
        """Begin with nothing granted.

        Args:
            most_bytes: The budget.
            token_bytes: Keys and values of one token in all layers.
            prefixes: What is stored of answered prompts; it gives way.

        Raises:
            ConfigError: Not even the shortest request fits.
        """
        least_bytes = columns_for(1) * token_bytes
        if most_bytes < least_bytes:
            raise ConfigError(
                f"kv_bytes is {most_bytes}",
                expected=f"at least {least_bytes}, the keys and values of {columns_for(1)} tokens on this base",
                fix="choose another kv_bytes",
            )
        self.most_bytes = most_bytes
        self._token_bytes = token_bytes
        self._prefixes = prefixes

    def require_possible(self, row: Row) -> None:
        """Refuse a row that would wait for ever.

        Raises:
            ConfigError: It does not fit, even alone.
        """
        needed_bytes = columns_for(row.final_length) * self._token_bytes
        if needed_bytes > self.most_bytes:
            prompt = len(row.prompt_ids)
            raise ConfigError(
                f"a prompt of {prompt} tokens and an answer of up to {row.final_length - prompt} take "
                f"{in_units(needed_bytes)} of keys and values",
                expected=f"at most {in_units(self.most_bytes)}, the memory for all requests together (kv_bytes)",
                fix="lower max_new_tokens, shorten the conversation, or give the engine more kv_bytes",
            )

    def admits(self, row: Row, lane: Lane, lanes: Collection[Lane]) -> bool:
        """Whether ``row`` may join ``lane`` now; stored prefixes go for it, and what ``lanes`` hold to spare.

        Args:
            row: The next one.
            lane: Where it would go; perhaps none of ``lanes`` yet.
            lanes: All others that hold rows or memory, and this one.
        """
        needed_bytes = lane.bytes_with(row)
        others = [other for other in lanes if other is not lane]
        if needed_bytes + sum(other.granted_bytes for other in others) > self.most_bytes:
            return False
        used_bytes = max(needed_bytes, lane.kv.bytes) + _used_bytes(others)
        self._prefixes.shrink(self.most_bytes - used_bytes)
        if used_bytes > self.most_bytes:
            for each in (lane, *others):
                each.shrink()
        return True

    def room(self, lane: Lane, lanes: Collection[Lane]) -> int:
        """The bytes that the block of ``lane`` may take now, with room to spare; never less than it was granted."""
        return self.most_bytes - self._prefixes.bytes - _used_bytes([other for other in lanes if other is not lane])

    def keep_prefixes(self, lanes: Collection[Lane]) -> None:
        """Let stored prefixes go that leave too little for ``lanes``."""
        self._prefixes.shrink(self.most_bytes - _used_bytes(lanes))


def _used_bytes(lanes: Collection[Lane]) -> int:
    """What the lanes hold, or may come to."""
    return sum(max(lane.kv.bytes, lane.granted_bytes) for lane in lanes)
