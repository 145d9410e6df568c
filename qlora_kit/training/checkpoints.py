"""Checkpoints that prove themselves: each gets a manifest of hashes, and is resumed from only if it still fits it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qlora_kit.atomic import atomic_directory, discard_directory
from qlora_kit.errors import OutputError
from qlora_kit.strict_json import read_json_object

MANIFEST_FILE = "manifest.json"
FORMAT = 1
CHECKPOINT = re.compile(r"^checkpoint-([0-9]{1,9})$")
WEIGHTS_FILE = "adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
MAX_MANIFEST_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_SPACE_FACTOR = 1.1


@dataclass(frozen=True)
class SavedFile:
    """One file of a checkpoint, as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: The optimizer step after which it was saved.
        best_step: The step whose checkpoint holds the best adapter so far; None without one.
        settings_sha256: Of the settings that the run began with (``settings.Start``).
        files: Every other file of the folder, by its path inside it.
    """

    step: int
    best_step: int | None
    settings_sha256: str
    files: dict[str, SavedFile]


@dataclass(frozen=True)
class Refusal:
    """A checkpoint that must not be used, and why."""

    checkpoint: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.checkpoint.name}: {self.reason}"


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on from.

    Attributes:
        checkpoint: The newest that verifies.
        refused: Newer ones that do not.
    """

    checkpoint: Path
    refused: tuple[Refusal, ...]


class _Refused(Exception):
    """Carries the reason out of the steps of ``refusal``."""


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, sound or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def write_manifest(checkpoint: Path, *, step: int, best_step: int | None, settings_sha256: str) -> None:
    """Hash every file in ``checkpoint`` and write its manifest."""
    files = {name: SavedFile(path.stat().st_size, _sha256(path)) for name, path in _files(checkpoint)}
    content = {"format": FORMAT, **asdict(Manifest(step, best_step, settings_sha256, files))}
    text = json.dumps({**content, "sha256": _own_sha256(content)}, indent=1)
    (checkpoint / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        OutputError: It is missing, damaged, or not a manifest.
    """
    fix = "resume from an earlier checkpoint, or start again"
    path = checkpoint / MANIFEST_FILE
    values = read_json_object(path, max_bytes=MAX_MANIFEST_BYTES, error=OutputError, fix=fix)
    if values.pop("sha256", None) != _own_sha256(values):
        raise OutputError(f"{path} is damaged: its hash of itself is wrong", expected="it as it was saved", fix=fix)
    if values.get("format") != FORMAT:
        raise OutputError(f"{path}: format {values.get('format')!r}", expected=f"format {FORMAT}", fix=fix)
    try:
        files = {name: SavedFile(**entry) for name, entry in values["files"].items()}
        return Manifest(values["step"], values["best_step"], values["settings_sha256"], files)
    except (AttributeError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: is no manifest ({error})", expected="what the kit writes", fix=fix) from error


def refusal(checkpoint: Path, *, settings_sha256: str, with_best: bool) -> Refusal | None:
    """Why a checkpoint must not be used; None where it is sound.

    Nothing is unpickled before all files are known to be those that were written.

    Args:
        checkpoint: Its folder.
        settings_sha256: Of the settings that the run began with.
        with_best: Also refuse it if the checkpoint of its best adapter so far is not sound.
    """
    try:
        manifest = _verified(checkpoint, settings_sha256)
        best = manifest.best_step
        if with_best and best is not None and best != manifest.step:
            other = checkpoint.with_name(f"checkpoint-{best}")
            try:
                _verified(other, settings_sha256)
            except _Refused as reason:
                raise _Refused(f"the best adapter so far is that of {other.name}: {reason}") from reason
    except _Refused as reason:
        return Refusal(checkpoint, str(reason))
    return None


def newest_sound(folder: Path, *, settings_sha256: str, with_best: bool) -> Resumption:
    """The newest checkpoint that verifies, with the newer ones that do not.

    Raises:
        OutputError: There is none; every refused one is named with its reason.
    """
    refused: list[Refusal] = []
    for checkpoint in reversed(checkpoints(folder)):
        found = refusal(checkpoint, settings_sha256=settings_sha256, with_best=with_best)
        if found is None:
            return Resumption(checkpoint, tuple(refused))
        refused.append(found)
    if not refused:
        raise OutputError(
            f"{folder}: no complete checkpoint to resume from",
            expected=f"a folder checkpoint-N with its {MANIFEST_FILE}",
            fix="start without --resume",
        )
    raise OutputError(
        f"{folder}: no checkpoint can be resumed from: {'; '.join(map(str, refused))}",
        expected=f"a checkpoint whose files are those of its {MANIFEST_FILE}",
        fix="put back the missing or damaged files from a copy, or start again with --overwrite",
    )


@contextmanager
def saving(target: Path, *, last_bytes: int) -> Iterator[Path]:
    """A temporary folder that becomes the checkpoint ``target`` when the block ends, and vanishes when it raises.

    Args:
        target: The checkpoint; one of this name is replaced.
        last_bytes: The size of the one before it: about what this one takes; 0 where there is none.

    Raises:
        OutputError: Too little space is free, or the disk is full or cannot be written to.
    """
    fix = "free some space, then go on with --resume: the checkpoints that were saved before are kept"
    needed_bytes, free_bytes = int(_SPACE_FACTOR * last_bytes), shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"{target}: cannot be saved, {free_bytes / 2**20:,.1f} MiB are free on its disk",
            expected=f"{needed_bytes / 2**20:,.1f} MiB for one more checkpoint",
            fix=fix,
        )
    try:
        with atomic_directory(target, overwrite=True) as temporary:
            yield temporary
    except OutputError as error:
        first = error.faults[0]
        raise OutputError(first.what, expected=first.expected, fix=fix) from error


def retire(folder: Path, *, limit: int, newest: Path, refused: tuple[Refusal, ...]) -> None:
    """Remove the checkpoints that are no longer needed, and the refused ones.

    Kept are the ``limit`` newest, and for each of them the one that holds its best adapter: a run that falls back to an
    older checkpoint needs the best of that time.

    Args:
        folder: The run folder.
        limit: How many to keep.
        newest: Just saved; always kept.
        refused: Not to be counted.
    """
    bad = {found.checkpoint for found in refused} - {newest}
    best_of: dict[Path, int | None] = {}
    for path in checkpoints(folder):
        if path not in bad:
            with suppress(OutputError):  # one without a readable manifest is of no use
                best_of[path] = read_manifest(path).best_step
    kept = {newest, *list(best_of)[-limit:]}
    kept |= {folder / f"checkpoint-{step}" for path in kept if (step := best_of[path]) is not None}
    for path in checkpoints(folder):
        if path not in kept:
            discard_directory(path)


def size_bytes(checkpoint: Path) -> int:
    """The bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for _, path in _files(checkpoint))


def _verified(checkpoint: Path, settings_sha256: str) -> Manifest:
    """The manifest of a checkpoint that fits it.

    Raises:
        _Refused: With the file and what is wrong with it.
    """
    if not checkpoint.is_dir():
        raise _Refused("is missing")
    try:
        manifest = read_manifest(checkpoint)
        if manifest.step != step_of(checkpoint):
            raise _Refused(f"{MANIFEST_FILE} is that of step {manifest.step}")
        if manifest.settings_sha256 != settings_sha256:
            raise _Refused("is a checkpoint of a run with other settings")
        _compare(checkpoint, manifest)
        _require_finite(checkpoint)
    except OutputError as error:
        raise _Refused(error.faults[0].what.removeprefix(f"{checkpoint}/")) from error
    except OSError as error:
        raise _Refused(f"cannot be read: {error.strerror}") from error
    return manifest


def _compare(checkpoint: Path, manifest: Manifest) -> None:
    found = dict(_files(checkpoint))
    for name in sorted(manifest.files.keys() - found.keys()):
        raise _Refused(f"{name} is missing")
    for name in sorted(found.keys() - manifest.files.keys()):
        raise _Refused(f"{name} is not in its {MANIFEST_FILE}")
    for name, saved in sorted(manifest.files.items()):
        path = found[name]
        if path.is_symlink() or not path.is_file():
            raise _Refused(f"{name} is not a regular file")
        if path.stat().st_size != saved.bytes:
            raise _Refused(f"{name} holds {path.stat().st_size} bytes, {saved.bytes} were saved")
    for name, saved in sorted(manifest.files.items()):
        if _sha256(found[name]) != saved.sha256:
            raise _Refused(f"{name} is damaged: its hash is not the one that was saved")


def _require_finite(checkpoint: Path) -> None:
    """The hashes say that the files are those that were written; this, that they are worth going on from."""
    try:
        for name, tensor in _tensors(checkpoint):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise _Refused(f"{name} holds values that are not finite")
    except SafetensorError as error:
        raise _Refused(f"{WEIGHTS_FILE} is not a safetensors file: {error}") from error
    except (UnpicklingError, RuntimeError, KeyError) as error:
        raise _Refused(f"{OPTIMIZER_FILE} does not hold the tensors of an optimizer alone") from error


def _tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(checkpoint / WEIGHTS_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            yield f"{WEIGHTS_FILE}: {name}", file.get_tensor(name)
    if (checkpoint / OPTIMIZER_FILE).is_file():
        state = torch.load(checkpoint / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        for name, tensor in optimizer_tensors(state):
            yield f"{OPTIMIZER_FILE}: {name}", tensor


def optimizer_tensors(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in the ``state_dict`` of an optimizer, with a name."""
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                yield f"{name} of parameter {number}", value


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """All files but the manifest, by their path inside the folder."""
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if name != MANIFEST_FILE and (path.is_symlink() or not path.is_dir()):
            yield name, path


def _own_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
