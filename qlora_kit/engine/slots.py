"""Which adapter, scaled adapter or sum lies in which slot of the bank: least recently used goes first, none in use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qlora_kit.lora_bank import LoraBank, LoraFactors

Key = tuple[tuple[str, int, float], ...]
"""Name, version and weight of each part."""


@dataclass
class _Slot:
    number: int
    users: int
    used: int


class SlotTable:
    """The bank's slots; one thread at a time."""

    def __init__(self, bank: LoraBank) -> None:
        self._bank = bank
        self._slots: dict[Key, _Slot] = {}
        self._gone: set[Key] = set()
        self._clock = 0

    @property
    def used(self) -> int:
        """How many slots hold something."""
        return len(self._slots)

    def acquire(self, key: Key, factors: Callable[[], LoraFactors]) -> int | None:
        """The slot that holds ``key``, filled if need be; None while all others are in use. ``release`` it."""
        self._clock += 1
        slot = self._slots.get(key)
        if slot is None:
            number = self._free_number()
            if number is None:
                return None
            self._bank.write(number, factors())
            slot = self._slots[key] = _Slot(number, 0, 0)
        slot.users += 1
        slot.used = self._clock
        return slot.number

    def release(self, key: Key) -> None:
        """A row that acquired ``key`` is done."""
        self._slots[key].users -= 1
        self._drop_if_gone(key)

    def forget(self, name: str, version: int) -> None:
        """Let go of every slot with this version of an adapter as soon as no row uses it."""
        for key in list(self._slots):
            if any(part[:2] == (name, version) for part in key):
                self._gone.add(key)
                self._drop_if_gone(key)

    def _drop_if_gone(self, key: Key) -> None:
        if key in self._gone and self._slots[key].users == 0:
            self._gone.discard(key)
            del self._slots[key]

    def _free_number(self) -> int | None:
        taken = {slot.number for slot in self._slots.values()}
        for number in range(1, self._bank.slots + 1):
            if number not in taken:
                return number
        idle = [(slot.used, key) for key, slot in self._slots.items() if slot.users == 0]
        if not idle:
            return None
        _, oldest = min(idle)
        return self._slots.pop(oldest).number
