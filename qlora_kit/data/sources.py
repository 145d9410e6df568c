"""What the entries of ``data.train`` and its like stand for: files, patterns and Hub data sets in, sources out."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.config import HubDataset, RunConfig, Source
from qlora_kit.data.hub import HubSource, read_hub_rows, resolve
from qlora_kit.data.ledger import Problem
from qlora_kit.data.reading import Item, display_name, find_files, no_match, read_rows


@dataclass(frozen=True)
class DataSource:
    """One file, or one data set of the Hub.

    Attributes:
        name: As the user would name it.
        origin: The file, or the data set.
    """

    name: str
    origin: Path | HubSource

    def read(self) -> Iterator[Item]:
        """Its rows, faults and notes; every call starts anew."""
        return read_rows(self.origin) if isinstance(self.origin, Path) else read_hub_rows(self.origin)

    def sha256(self) -> str:
        """Hash of the file's bytes, or of what identifies the data set (its id, commit, subset, split and rows).

        Raises:
            DataError: The data set cannot be found.
            OSError: The file cannot be read.
        """
        if isinstance(self.origin, HubSource):
            return resolve(self.origin).sha256
        with self.origin.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_sources(config: RunConfig, entry: Source) -> list[DataSource] | Problem:
    """The sources that one entry of the config names; a pattern that matches nothing is a problem."""
    if isinstance(entry, HubDataset):
        hub = HubSource(
            id=entry.hub,
            split=entry.split,
            revision=entry.revision,
            subset=entry.subset,
            rows=entry.rows,
            streaming=entry.streaming,
        )
        return [DataSource(hub.name, hub)]
    path = locate_file(config, entry)
    files = find_files(path)
    return [DataSource(display_name(file), file) for file in files] if files else no_match(path)


def locate_file(config: RunConfig, named: str) -> Path:
    """Where a file or pattern of the config is: relative to the current folder, else to the YAML's."""
    path = config.resolve(named)
    if glob.has_magic(named) and not path.exists():
        # The folder before the first wildcard is what can be looked for beside the YAML.
        parts = Path(named).parts
        fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        path = config.resolve(str(Path(*parts[:fixed]))).joinpath(*parts[fixed:])
    return path
