"""The adapters an engine knows: read through the gate, kept in host memory, and replaced while their users finish."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.adapters import AdapterContract, AdapterFiles, AdapterSnapshot, AdapterStore, read_adapter
from qlora_kit.errors import AdapterError
from qlora_kit.lora_bank import LoraFactors, can_be_banked, read_factors

HOST_BYTES = 4 * 1024**3
"""Adapters that requests brought in by themselves, beyond this the least recently used are let go."""


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One version of an adapter in memory.

    Attributes:
        name: As requests name it.
        version: Another for each load.
        folder: Where it was read.
        contract: None for one trained elsewhere.
        bytes: Memory that it takes, on the host or, through PEFT, on the device.
        factors: Its pairs; None for one that goes through PEFT.
        peft_slot: PEFT's name for it; None for one in the bank.
    """

    name: str
    version: int
    folder: Path
    contract: AdapterContract | None
    bytes: int
    factors: LoraFactors | None
    peft_slot: str | None


class LoadedAdapters:
    """Names to their newest versions. Whoever takes the scheduler's lock too takes ``changing`` first."""

    def __init__(
        self,
        store: AdapterStore,
        require_fit: Callable[[AdapterFiles, AdapterContract | None], None],
        *,
        attach: Callable[[AdapterSnapshot], str],
        drop: Callable[[LoadedAdapter], None],
    ) -> None:
        """Begin with none.

        Args:
            store: Where names are looked up.
            require_fit: Raises for an adapter that the base cannot take.
            attach: Puts an adapter on the base through PEFT.
            drop: Called with each version that no new request gets any more.
        """
        self._store = store
        self._require_fit = require_fit
        self._attach = attach
        self._drop = drop
        self._host_bytes = HOST_BYTES
        self._newest: dict[str, LoadedAdapter] = {}
        self._by_request: set[str] = set()  # names that nobody loaded by hand
        self._last_used: dict[str, int] = {}  # when they were, written by any thread; some may be gone
        self._versions = 0
        self._uses = 0
        self.changing = threading.RLock()  # held while files are read, taken before the scheduler's; names need none

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, in the order in which they came."""
        return tuple(self._newest)

    def get(self, name: str) -> LoadedAdapter:
        """The newest version of a loaded adapter.

        Raises:
            AdapterError: It is not loaded.
        """
        adapter = self._newest.get(name)
        if adapter is None:
            raise AdapterError(
                f"the adapter {name!r} is not loaded",
                expected=f"one of {', '.join(self._newest) or '(none is loaded)'}",
                fix=f"call load({name!r}) first",
            )
        return adapter

    def load(self, name_or_folder: str) -> LoadedAdapter:
        """Load from the store or a folder; one that is loaded from there already stays as it is.

        Raises:
            AdapterError: No such adapter, unsound files, another base, or the name is taken by another folder.
        """
        with self.changing:
            folder = self._store.get(name_or_folder)
            held = self._newest.get(folder.name)
            if held is None:
                return self._read(folder.name, name_or_folder)
            if held.folder != folder.resolve():
                raise AdapterError(
                    f"{folder}: an adapter named {folder.name!r} is loaded already, from {held.folder}",
                    expected="one name for each loaded adapter",
                    fix="rename one of the two folders",
                )
            self._by_request.discard(folder.name)
            return held

    def wanted(self, name: str) -> LoadedAdapter:
        """The newest version of what a request names; one of the store is loaded if need be, a folder never.

        Raises:
            AdapterError: Neither loaded nor in the store, or it cannot be loaded.
        """
        adapter = self._newest.get(name)
        if adapter is None:
            with self.changing:
                adapter = self._newest.get(name) or self._brought_in(name)
        if name in self._by_request:
            self._uses += 1
            self._last_used[name] = self._uses
        return adapter

    def reload(self, name: str) -> LoadedAdapter:
        """Read a loaded adapter's files again; what is under way goes on with the version that it began with.

        Raises:
            AdapterError: It is not loaded, or its files cannot be used: then the loaded version stays.
        """
        with self.changing:
            old = self.get(name)
            new = self._read(name, old.folder)
            self._drop(old)
            return new

    def unload(self, name: str) -> None:
        """Forget a loaded adapter; what is under way with it goes on.

        Raises:
            AdapterError: It is not loaded.
        """
        with self.changing:
            self._drop(self.get(name))
            del self._newest[name]
            self._by_request.discard(name)
            self._last_used.pop(name, None)

    def _read(self, name: str, place: str | Path) -> LoadedAdapter:
        snapshot = read_adapter(lambda: self._store.get(place), self._require_fit)
        factors = read_factors(snapshot) if can_be_banked(snapshot.files) else None
        self._versions += 1
        adapter = LoadedAdapter(
            name=name,
            version=self._versions,
            folder=snapshot.files.folder.resolve(),
            contract=snapshot.contract,
            bytes=sum(map(len, snapshot.tensors.values())) if factors is None else factors.bytes,
            factors=factors,
            peft_slot=self._attach(snapshot) if factors is None else None,
        )
        self._newest[name] = adapter
        return adapter

    def _brought_in(self, name: str) -> LoadedAdapter:
        folder = self._store.get(name)
        if folder.name != name or folder.parent != self._store.root:  # a path, which only the program itself may load
            return self.get(name)
        adapter = self._read(name, name)
        held = sorted(self._by_request, key=lambda other: self._last_used.get(other, 0))
        total_bytes = adapter.bytes + sum(self._newest[other].bytes for other in held)
        for other in held:
            if total_bytes > self._host_bytes:
                total_bytes -= self._newest[other].bytes
                self.unload(other)
        self._by_request.add(name)
        return adapter


def longest_answer(adapters: Sequence[LoadedAdapter]) -> int | None:
    """The largest answer limit that the adapters' contracts record, in tokens."""
    contracts = [adapter.contract for adapter in adapters if adapter.contract is not None]
    limits = [contract.generation.get("max_new_tokens") for contract in contracts]
    return max((limit for limit in limits if limit is not None), default=None)
