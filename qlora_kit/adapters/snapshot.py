"""Reads one adapter whole into memory, through the gate: what was checked is what is loaded, whatever others write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.adapters.contract import AdapterContract
from qlora_kit.adapters.gate import MAX_FAULTS, AdapterFiles, open_adapter, read_blocks, value_fault
from qlora_kit.errors import AdapterError
from qlora_kit.regular_file import folder_identity

_ATTEMPTS = 5


@dataclass(frozen=True)
class AdapterSnapshot:
    """An adapter in memory, all of it from one and the same folder at one time.

    Attributes:
        files: What the gate found.
        contract: Its contract, None for a plain PEFT adapter.
        tensors: The little-endian bytes of each tensor in ``files.tensors``.
    """

    files: AdapterFiles
    contract: AdapterContract | None
    tensors: Mapping[str, bytearray]


def read_adapter(
    locate: Callable[[], Path], accept: Callable[[AdapterFiles, AdapterContract | None], None]
) -> AdapterSnapshot:
    """Read the adapter in the folder that ``locate`` gives; read again when another takes its place meanwhile.

    Args:
        locate: Finds the folder; asked again before each attempt.
        accept: Raises for an adapter that cannot be used. Called before the weights are read, so that their size is
            known to be that of the base's layers.

    Raises:
        AdapterError: It does not pass the gate, is not accepted, was deleted, or is replaced all the time.
    """
    for _ in range(_ATTEMPTS):
        folder = locate()
        before = folder_identity(folder)
        try:
            snapshot = _read_once(folder, accept)
        except AdapterError:
            if before is not None and folder_identity(folder) == before:
                raise
        else:
            if folder_identity(folder) == before:
                return snapshot
    raise AdapterError(
        f"{folder}: was replaced or deleted while it was read, {_ATTEMPTS} times",
        expected="an adapter at rest",
        fix="load it again once nothing writes to it",
    )


def _read_once(folder: Path, accept: Callable[[AdapterFiles, AdapterContract | None], None]) -> AdapterSnapshot:
    with open_adapter(folder) as (files, weights):
        contract = None if files.contract is None else AdapterContract.load(files.contract)
        accept(files, contract)
        tensors = {}
        faults = []
        for name, info in files.tensors.items():
            tensors[name] = bytearray(info.size_bytes)
            fault = value_fault(files, name, _kept(read_blocks(weights, files, name), tensors[name]))
            if fault is not None:
                faults.append(fault)
        if faults:
            raise AdapterError.of(faults, at_most=MAX_FAULTS)
        return AdapterSnapshot(files, contract, tensors)


def _kept(blocks: Iterable[bytes], tensor: bytearray) -> Iterator[bytes]:
    """The ``blocks``, each of them also written to its place in ``tensor``."""
    position = 0
    for block in blocks:
        tensor[position : position + len(block)] = block
        position += len(block)
        yield block
