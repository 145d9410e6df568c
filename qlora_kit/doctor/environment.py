"""Checks of the machine around the kit: memory, disk, the Hub's cache and settings, the embedded base; no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.doctor.checks import ENVIRONMENT, Check

LITTLE_MEMORY_BYTES = 4 * 2**30
LITTLE_DISK_BYTES = 2 * 2**30
_GIB = 2**30
_REINSTALL = "pip install --force-reinstall --no-deps qlora-kit, or `git checkout qlora_kit/bases` in a clone"


@dataclass(frozen=True)
class Folder:
    """A folder that the kit writes to: its nearest existing parent counts where it is not there yet."""

    path: Path
    free_bytes: int
    writable: bool


def look_at(path: Path) -> Folder:
    """Free space, and whether files can be made there."""
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return Folder(path, shutil.disk_usage(existing).free, writable)


def check_system(name: str) -> Check:
    """Whether the operating system has what the kit uses (``name`` as ``platform.system()`` gives it)."""
    if name == "Windows":
        detail = "Windows: the kit locks files and limits processes as POSIX has it"
        return Check("system", False, detail, "use WSL 2 (Ubuntu), which has the GPU too", ENVIRONMENT)
    return Check("system", True, name)


def check_memory(available_bytes: int | None, group_bytes: int | None) -> Check:
    """Whether there is memory for more than a small base."""
    if available_bytes is None:
        return Check("memory", None, "not measured on this system")
    limited = group_bytes is not None and group_bytes < available_bytes
    free_bytes = group_bytes if limited and group_bytes is not None else available_bytes
    detail = f"{free_bytes / _GIB:.1f} GiB free"
    if limited:
        detail += f", as this control group (container) grants; the machine has {available_bytes / _GIB:.1f} GiB"
    if free_bytes >= LITTLE_MEMORY_BYTES:
        return Check("memory", True, detail)
    return Check("memory", False, detail, "end other programs, or raise the container's limit; `tiny` still fits")


def check_folder(name: str, folder: Folder, *, fix: str) -> Check:
    """Whether a folder can be written to and its disk has room."""
    detail = f"{folder.path}: {folder.free_bytes / _GIB:.1f} GiB free"
    if not folder.writable:
        return Check(name, False, f"{folder.path}: cannot be written to", fix)
    if folder.free_bytes < LITTLE_DISK_BYTES:
        return Check(name, False, detail, f"free some space, or {fix}")
    return Check(name, True, detail)


def check_hub(*, offline: bool, token: bool) -> Check:
    """How the Hub is reached: nothing is sent."""
    access = "offline: only bases that are in the cache" if offline else "reached when a base is not in the cache"
    return Check("Hub", True, f"{access}; token {'present' if token else 'absent'}")


def check_base(folder: Path, shipped: Sequence[Path]) -> Check:
    """Whether the embedded base is whole: its headers, and its fingerprint against the contracts of its adapters.

    Args:
        folder: The base's folder.
        shipped: Folders of adapters that the kit ships for it; those that are not there are passed over.
    """
    from qlora_kit.adapters import CONTRACT_FILE, AdapterContract, base_fingerprint
    from qlora_kit.architecture import read_architecture, weight_differences
    from qlora_kit.base_files import TINY, BaseRef, read_model_config
    from qlora_kit.errors import BaseModelError, QloraKitError
    from qlora_kit.safetensors_header import locate_tensors

    try:
        architecture = read_architecture(read_model_config(BaseRef(TINY, folder)), where=str(folder / "config.json"))
        differences = weight_differences(architecture, locate_tensors(folder, error=BaseModelError))
        fingerprint = base_fingerprint(folder)
        contracts = [AdapterContract.load(path) for path in shipped if (path / CONTRACT_FILE).is_file()]
    except QloraKitError as error:
        return Check("embedded base", False, error.faults[0].what, _REINSTALL, ENVIRONMENT)
    if differences:
        return Check("embedded base", False, f"{folder}: {differences[0]}", _REINSTALL, ENVIRONMENT)
    known = {contract.base.fingerprint for contract in contracts if contract.base.id == TINY}
    if known - {fingerprint}:
        detail = f"{folder}: its weights are not those that the shipped adapters were trained on"
        return Check("embedded base", False, detail, _REINSTALL, ENVIRONMENT)
    evidence = "the weights that its adapters were trained on" if known else "the headers agree with config.json"
    return Check("embedded base", True, f"tiny, {architecture.parameters():,} parameters: {evidence}")
