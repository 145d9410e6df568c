"""One adapter as its folder describes it: the card that a list shows, and the contract, read without the weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_kit.adapters.contract import AdapterContract
from qlora_kit.adapters.contract_file import CONTRACT_FILE
from qlora_kit.adapters.gate import CONFIG_FILE, WEIGHTS_FILE, require_regular_file
from qlora_kit.adapters.lora_settings import read_lora_settings
from qlora_kit.errors import AdapterError
from qlora_kit.safetensors_header import shown

RUN_CONFIG_FILE = "config.yaml"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class AdapterCard:
    """One adapter as a list shows it.

    Attributes:
        name: Its folder's name.
        task: Its task, None without contract.
        base_model: The base it was trained on, as far as its files say.
        r: Its rank.
        bytes: Size of its files.
        created: ISO 8601; without contract, when its weights were written.
        path: Its folder.
        metrics: What it scored, empty without contract.
        origin: ``trained`` or ``adopted``, as its contract says; None without contract.
    """

    name: str
    task: str | None
    base_model: str | None
    r: int
    bytes: int
    created: str
    path: Path
    metrics: Mapping[str, Any]
    origin: str | None


@dataclass(frozen=True)
class AdapterDetails:
    """One adapter in full: its card, and its contract unless it is a plain PEFT adapter."""

    card: AdapterCard
    contract: AdapterContract | None


def read_details(path: Path) -> AdapterDetails:
    """The card and the contract of the adapter in the folder ``path``.

    Raises:
        AdapterError: Files are missing, links, or malformed.
    """
    try:
        return _read_details(path)
    except OSError as error:
        what = f"{path}: cannot be read: {error.strerror}"
        fix = "make the folder readable, or delete it"
        raise AdapterError(what, expected="a readable adapter folder", fix=fix) from error


def _read_details(path: Path) -> AdapterDetails:
    weights, config, contract_file = path / WEIGHTS_FILE, path / CONFIG_FILE, path / CONTRACT_FILE
    for file in (weights, config):
        require_regular_file(file)
    settings = read_lora_settings(config)
    own = own_files(path)
    contract = None
    if CONTRACT_FILE in own:
        require_regular_file(contract_file)
        contract = AdapterContract.load(contract_file)
    written = datetime.fromtimestamp(weights.stat().st_mtime, tz=UTC)
    card = AdapterCard(
        name=path.name,
        task=None if contract is None else contract.task,
        base_model=settings.base_model_name_or_path if contract is None else contract.base.id,
        r=settings.r,
        bytes=sum(os.stat(os.path.join(path, name)).st_size for name in own),
        created=written.isoformat(timespec="seconds") if contract is None else contract.created,
        path=path,
        metrics={} if contract is None else contract.metrics,
        origin=None if contract is None else contract.origin,
    )
    return AdapterDetails(card, contract)


def own_files(folder: Path) -> tuple[str, ...]:
    """Names of the files that belong to the adapter in ``folder`` and travel with it."""
    optional = (CONTRACT_FILE, RUN_CONFIG_FILE, CARD_FILE)
    there = [name for name in optional if os.path.lexists(os.path.join(folder, name))]
    return (WEIGHTS_FILE, CONFIG_FILE, *there)


def no_base_given(folder: Path, named: str | None) -> AdapterError:
    """The refusal of an adapter without contract where no base was given; ``named`` is what its configuration says."""
    hint = "" if named is None else f" (its configuration names {shown(named)})"
    return AdapterError(
        f"{folder}: the adapter has no contract, and no base was given",
        expected="--base: the model that the adapter was trained on",
        fix=f"give --base{hint}; with it, `qlora-kit adapters adopt` writes a contract, and later commands need none",
    )
