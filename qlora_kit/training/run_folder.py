"""The run folder: may a run write there, which checkpoint does it go on from, how does a finished adapter appear."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_kit.adapters import CONTRACT_FILE
from qlora_kit.adapters.store import LOCK_FILE
from qlora_kit.atomic import checked_target, recover_leftovers, require_free_space
from qlora_kit.errors import OutputError
from qlora_kit.launched import is_main_process
from qlora_kit.report import PLOT_FILES, RECORD_FILE, REPORT_FILE
from qlora_kit.training.checkpoints import CHECKPOINT, checkpoints
from qlora_kit.training.settings import CONFIG_FILE, START_FILE

logger = logging.getLogger(__name__)

LEFTOVER = re.compile(r"^\.(final\..*\.partial|(checkpoint-[0-9]{1,9}|run\.json)\.[0-9a-f]{12}\.(partial|old))$")
RUN_FILES = frozenset(
    "adapter_model.safetensors adapter_config.json ledger.jsonl README.md runs "
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja additional_chat_templates".split()
) | {CONTRACT_FILE, CONFIG_FILE, START_FILE, RECORD_FILE, REPORT_FILE, *PLOT_FILES}
"""What a run leaves beside its checkpoints: its own files, a tokenizer's, and ``runs`` of ``train.report_to``."""
FREE_SPACE_FACTOR = 1.2


def open_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may write into ``folder``.

    Nothing is removed yet: ``clear_run_folder`` does that once all other checks have passed, and ``clean_run_folder``
    where a run is resumed.

    Raises:
        OutputError: The folder is occupied and neither option was given, there is nothing to resume, or what would be
            replaced is not a run folder.
    """
    if resume and overwrite:
        raise OutputError(
            "--resume and --overwrite exclude each other",
            expected="one of the two",
            fix="--resume goes on from the newest checkpoint, --overwrite begins anew",
        )
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", expected="a folder, or a free name", fix="choose another output_dir")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OutputError(
            f"{folder}: nothing can be written into {existing}",
            expected="a place that this user may write to",
            fix="set another output_dir, or mend the permissions",
        )
    if resume:
        if not (folder / START_FILE).is_file():
            raise OutputError(
                f"{folder}: no run to resume",
                expected=f"a run folder, with the {START_FILE} that a run writes first, and a complete checkpoint",
                fix="start without --resume",
            )
        return
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise OutputError(
            f"{folder} is occupied",
            expected="a free or empty folder for a new run",
            fix="--resume goes on from its newest checkpoint, --overwrite replaces it, output_dir=... goes elsewhere",
        )
    checked_target(folder)
    if overwrite:
        _require_run_folder(folder)


def _require_run_folder(folder: Path) -> None:
    """Let ``--overwrite`` delete what a run wrote, and nothing else: output_dir may be mistyped."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    if names and (Path(os.path.realpath(folder)).parent / LOCK_FILE).exists():
        raise OutputError(
            f"{folder}: is an adapter of the store {folder.parent}, which others may be using",
            expected="a run folder outside of a store",
            fix="set another output_dir, then publish with `qlora-kit adapters add RUN --replace`",
        )
    if START_FILE not in names and not all(map(LEFTOVER.match, names)):  # it may have been killed at its very start
        raise OutputError(
            f"{folder}: no training run wrote this folder, so that it is not replaced",
            expected=f"a run folder, with the {START_FILE} that a run writes first",
            fix="set another output_dir, or remove the folder yourself",
        )
    foreign = sorted(name for name in names if not _is_of_a_run(name))
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise OutputError(
            f"{folder}: holds what no training run writes: {', '.join(map(repr, foreign[:5]))}{more}",
            expected="a run folder with nothing else in it",
            fix="move that elsewhere, or set another output_dir",
        )


def _is_of_a_run(name: str) -> bool:
    return name in RUN_FILES or CHECKPOINT.match(name) is not None or LEFTOVER.match(name) is not None


def clear_run_folder(folder: Path) -> None:
    """Make ``folder`` an empty folder.

    Raises:
        OutputError: It cannot be emptied or made.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made ({error.strerror})",
            expected="a place that this user may write to",
            fix="set another output_dir, or mend the permissions",
        ) from error


def require_space_for_run(folder: Path, *, adapter_bytes: int, kept_checkpoints: int) -> None:
    """Refuse a disk that cannot hold the run: each checkpoint keeps the adapter and two optimizer moments in fp32.

    Raises:
        OutputError: Too little space.
    """
    sets = kept_checkpoints + 2  # the best one stays, and one more is written before the oldest goes
    require_free_space(folder, int(FREE_SPACE_FACTOR * adapter_bytes * (3 * sets + 1)))


@contextmanager
def run_folder_lock(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine from training in ``folder``, if it exists, inside the block.

    Raises:
        OutputError: One is training there.
    """
    if not folder.is_dir() or not is_main_process():  # of several processes of one run, the first holds it
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OutputError(
            f"{folder}: another process is training in it",
            expected="a run folder that nothing writes to",
            fix="wait for it or stop it, or set another output_dir",
        ) from error
    finally:
        os.close(descriptor)


def clean_run_folder(folder: Path) -> None:
    """Before a run is resumed: remove what a killed save left half written, and say so."""
    left = sorted(path.name for path in folder.iterdir() if LEFTOVER.match(path.name))
    recover_leftovers(folder)
    for name in left:
        if name.startswith(".final."):
            shutil.rmtree(folder / name, ignore_errors=True)
    if left:
        logger.warning("%s: removed what a killed run left half written: %s", folder, ", ".join(left))


def leave_nothing_unfinished(folder: Path) -> None:
    """After a failure: remove the folder unless it holds a checkpoint or a finished adapter."""
    if folder.is_dir() and not checkpoints(folder) and not (folder / CONTRACT_FILE).exists():
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder, then move its files into ``folder``, the contract last.

    A run folder looks finished only once the contract is there.
    """
    staging = Path(tempfile.mkdtemp(prefix=".final.", suffix=".partial", dir=folder))
    try:
        write(staging)
        (folder / CONTRACT_FILE).unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == CONTRACT_FILE):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
