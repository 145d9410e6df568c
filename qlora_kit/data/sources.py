"""What the entries of ``data.train`` and its like stand for: files, patterns and Hub data sets in, sources out."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.config import HubDataset, RunConfig, Source
from qlora_kit.data.hub import HubSource, ResolvedHubSource, read_hub_rows, resolve
from qlora_kit.data.ledger import Problem
from qlora_kit.data.reading import Item, display_name, find_files, no_match, read_rows
from qlora_kit.errors import DataError


@dataclass(frozen=True)
class DataSource:
    """One file, or one data set of the Hub.

    Attributes:
        name: As the user would name it.
        origin: The file, or the data set at one commit.
    """

    name: str
    origin: Path | ResolvedHubSource

    @property
    def record(self) -> str:
        """Its name for good: a file's own, without its folder; a data set's with the commit in place of a branch."""
        if isinstance(self.origin, Path):
            return self.origin.name
        return replace(self.origin.source, revision=self.origin.commit).name

    def read(self) -> Iterator[Item]:
        """Its rows, faults and notes; every call starts anew."""
        return read_rows(self.origin) if isinstance(self.origin, Path) else read_hub_rows(self.origin)

    def sha256(self) -> str:
        """Hash of the file's bytes, or of what identifies the data set (its id, commit, subset, split and rows).

        Raises:
            OSError: The file cannot be read.
        """
        if isinstance(self.origin, ResolvedHubSource):
            return self.origin.sha256
        with self.origin.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Sources:
    """What the entries of a config name; the Hub is asked once for each, so that all who ask get one commit.

    Args:
        config: Says from which folder paths are looked for.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._asked: dict[HubSource, ResolvedHubSource | Problem] = {}

    def of(self, entry: Source) -> list[DataSource] | Problem:
        """The sources that one entry names; a pattern that matches nothing, or an unknown data set, is a problem."""
        if isinstance(entry, HubDataset):
            hub = HubSource(
                id=entry.hub,
                split=entry.split,
                revision=entry.revision,
                subset=entry.subset,
                rows=entry.rows,
                streaming=entry.streaming,
            )
            if hub not in self._asked:
                self._asked[hub] = _resolved(hub)
            found = self._asked[hub]
            return found if isinstance(found, Problem) else [DataSource(hub.name, found)]
        path = locate_file(self._config, entry)
        files = find_files(path)
        return [DataSource(display_name(file), file) for file in files] if files else no_match(path)


def _resolved(hub: HubSource) -> ResolvedHubSource | Problem:
    try:
        return resolve(hub)
    except DataError as error:
        fault = error.faults[0]
        return Problem(hub.name, None, fault.what.removeprefix(f"{hub.name}: "), fault.expected, fault.fix, stops=True)


def locate_file(config: RunConfig, named: str) -> Path:
    """Where a file or pattern of the config is: relative to the current folder, else to the YAML's."""
    path = config.resolve(named)
    if glob.has_magic(named) and not path.exists():
        # The folder before the first wildcard is what can be looked for beside the YAML.
        parts = Path(named).parts
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        path = config.resolve(str(Path(*parts[:fixed]))).joinpath(*parts[fixed:])
    return path
