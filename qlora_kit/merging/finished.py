"""Recognises a finished output of the same inputs, so that a merge that is run again returns at once; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.adapters import CONTRACT_FILE, AdapterFiles, base_fingerprint
from qlora_kit.adapters.card import CARD_FILE, RUN_CONFIG_FILE
from qlora_kit.adapters.fingerprint import file_sha256
from qlora_kit.adapters.gate import CONFIG_FILE
from qlora_kit.adapters.trained_base import MAX_REPORT_BYTES, REPORT_FILE
from qlora_kit.errors import BaseModelError, Fault, OutputError
from qlora_kit.merging.results import MergeResult
from qlora_kit.strict_json import read_json_object

REPORT_VERSION = 2
_WEIGHTS_ENDING = ".safetensors"
_FIX = "give --overwrite to make it again, or another folder"


def describe_inputs(
    adapter: AdapterFiles | None, base: Path, *, kind: str, onto: str, max_shard_bytes: int
) -> dict[str, Any]:
    """What a merge was made of: hashes of the adapter's files, the base's fingerprint, and what was asked for."""
    hashes = {}
    if adapter is not None:
        own = [adapter.weights, *(adapter.folder / name for name in (CONFIG_FILE, CONTRACT_FILE, RUN_CONFIG_FILE))]
        hashes = {path.name: file_sha256(path) for path in own if path.is_file()}
    return {
        "kind": kind,
        "adapter_sha256": hashes,
        "base_fingerprint": base_fingerprint(base),
        "onto": onto,
        "max_shard_bytes": max_shard_bytes,
    }


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size of every file in ``folder``, and hashes of all but the weights, which ``base_fingerprint`` samples.

    Report and card are left out: the first holds this, the second is the user's to edit.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.name in (REPORT_FILE, CARD_FILE) or not path.is_file():
            continue
        found[path.name] = {"bytes": path.stat().st_size}
        if path.suffix != _WEIGHTS_ENDING:
            found[path.name]["sha256"] = file_sha256(path)
    return found


def has_report(folder: Path) -> bool:
    """Whether a merge may be finished in ``folder``."""
    return (folder / REPORT_FILE).is_file()


def finished_result(folder: Path, inputs: Mapping[str, Any], *, verify: bool) -> MergeResult | None:
    """The result that ``folder`` holds if it was made of ``inputs`` and is as it was written; None for other inputs.

    Args:
        folder: The output.
        inputs: ``describe_inputs`` of what is asked for now.
        verify: Whether a verified result is asked for; an unverified one is then another.

    Raises:
        OutputError: It was made of these inputs, but its files were changed since.
    """
    try:
        report = read_json_object(folder / REPORT_FILE, max_bytes=MAX_REPORT_BYTES, error=BaseModelError, fix=_FIX)
    except BaseModelError:
        return None
    if report.get("format_version") != REPORT_VERSION or report.get("inputs") != dict(inputs):
        return None
    if verify and report.get("verification") is None:
        return None
    try:
        result = MergeResult.from_report(report, folder)
        files, fingerprint = report["files"], report["output_fingerprint"]
    except (KeyError, TypeError, AttributeError):
        return None
    faults = _changes(folder, files, fingerprint)
    if faults:
        raise OutputError.of(faults)
    return result


def _changes(folder: Path, files: Any, fingerprint: Any) -> list[Fault]:
    found = describe_files(folder)
    written = files if isinstance(files, dict) else {}
    changed = sorted(name for name, content in written.items() if found.get(name) != content)
    expected = f"the files that {REPORT_FILE} lists"
    faults = [
        Fault(f"{folder / name}: {'was changed' if name in found else 'is gone'} since the merge", expected, _FIX)
        for name in changed
    ]
    if faults:
        return faults
    try:
        same = base_fingerprint(folder) == fingerprint
    except BaseModelError as error:
        return [Fault(error.faults[0].what, expected, _FIX)]
    return [] if same else [Fault(f"{folder}: the weights were changed since the merge", expected, _FIX)]
