"""What `qlora-kit init` lays into a new folder: configs, each task's data, and a store with the shipped adapters.

In a clone they lie at its root. In a wheel they lie in the package's folder ``starter``, which ``setup.py`` fills with
``copy_starter`` while building; nothing is kept twice in the repository.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.atomic import atomic_directory
from qlora_kit.errors import OutputError
from qlora_kit.tasks import TASKS

PACKAGE = Path(__file__).resolve().parent
PACKAGED = PACKAGE / "starter"


@dataclass(frozen=True)
class Starter:
    """What was laid out.

    Attributes:
        folder: The new folder.
        configs: Its config files, relative to it.
        datasets: The tasks with data.
        adapters: The adapters in its store.
    """

    folder: Path
    configs: tuple[str, ...]
    datasets: tuple[str, ...]
    adapters: tuple[str, ...]


def lay_out(folder: Path) -> Starter:
    """Make ``folder`` with everything that the shipped configs need; complete, or not at all.

    Raises:
        OutputError: ``folder`` is occupied or cannot be written, or this installation carries no starter files.
    """
    source = PACKAGED if PACKAGED.is_dir() else PACKAGE.parent
    if not (source / "configs").is_dir():
        raise OutputError(
            f"{source}: the installed kit carries no configs to lay out",
            expected="an installation from the wheel, or an editable one from a clone",
            fix="install the kit again from its wheel, or run it from a clone",
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(
            f"{folder}: the folder is not empty",
            expected="a new or empty folder",
            fix="give another folder; init never writes over anything",
        )
    with atomic_directory(folder) as temporary:
        copy_starter(source, temporary)
        return Starter(
            folder,
            configs=tuple(sorted(str(path.relative_to(temporary)) for path in temporary.glob("configs/**/*.yaml"))),
            datasets=tuple(sorted(path.name for path in (temporary / "datasets").iterdir())),
            adapters=tuple(sorted(path.name for path in (temporary / "adapters").iterdir())),
        )


def copy_starter(source: Path, target: Path) -> None:
    """Copy what belongs to a starter from ``source``, a clone or another starter, into ``target``.

    Only the kit's own: all configs, and the data and adapters of the five tasks. A store without adapters stays empty.
    """
    hidden = shutil.ignore_patterns(".*")
    shutil.copytree(source / "configs", target / "configs", ignore=hidden, dirs_exist_ok=True)
    for kind in ("datasets", "adapters"):
        (target / kind).mkdir(parents=True, exist_ok=True)
        for task in TASKS:
            if (source / kind / task).is_dir():
                shutil.copytree(source / kind / task, target / kind / task, ignore=hidden, dirs_exist_ok=True)
