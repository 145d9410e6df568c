"""What a user names on the Hugging Face Hub: a data set, split and revision, checked before the Hub is asked."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from qlora_kit.data.ledger import Problem

DATASET_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]*")
SUBSET = re.compile(r"[^\x00-\x1f<>:/\\|?*]+")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the Hub.

    Attributes:
        id: ``org/name``, or ``name`` alone for the Hub's oldest data sets.
        split: A split's name; without streaming also what `datasets` takes (``train[:10%]``, ``train+validation``).
        revision: A branch, tag or commit; the main branch where it is None.
        subset: The subset (configuration) of a data set that has several.
        rows: Take this many rows from the start; all where it is None.
        streaming: Read the rows as they arrive, and keep none of them on disk.
    """

    id: str
    split: str = "train"
    revision: str | None = None
    subset: str | None = None
    rows: int | None = None
    streaming: bool = False

    @property
    def name(self) -> str:
        """``hub:org/name@revision[subset]/split``: what stands for the file's name in places and messages."""
        revision = "" if self.revision is None else f"@{self.revision}"
        subset = "" if self.subset is None else f"[{self.subset}]"
        return f"hub:{self.id}{revision}{subset}/{self.split}"


@dataclass(frozen=True)
class ResolvedHubSource:
    """A ``HubSource`` and the commit that its revision stands for.

    Attributes:
        source: What the user named.
        commit: The commit's full SHA-1.
    """

    source: HubSource
    commit: str

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    @property
    def sha256(self) -> str:
        """Hash of what decides the rows: id, commit, subset, split and row limit (streaming does not)."""
        chosen = [self.source.id, self.commit, self.source.subset, self.source.split, self.source.rows]
        return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()


class HubFault(Exception):
    """What is wrong with a source, in three parts."""

    def __init__(self, reason: str, *, expected: str, fix: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.expected = expected
        self.fix = fix

    def problem(self, source: HubSource) -> Problem:
        return Problem(source.name, None, self.reason, self.expected, self.fix, stops=True)


def check_source(source: HubSource) -> None:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    well_formed = DATASET_ID.fullmatch(source.id) and ".." not in source.id and "--" not in source.id
    # `datasets` takes the names of its file readers, and buckets/, for something other than data set repositories.
    reserved = source.id in _PACKAGED_DATASETS_MODULES or source.id.startswith("buckets/") or source.id.endswith(".py")
    if not well_formed or reserved:
        raise HubFault(
            f"{source.id!r} is no data set's id",
            expected="org/name, as in the address of the data set's page",
            fix="correct the id; a local file or folder is named as a path",
        )
    if source.revision is not None and (not REVISION.fullmatch(source.revision) or ".." in source.revision):
        raise HubFault(
            f"{source.revision!r} is no revision", expected="a branch, a tag or a commit", fix="correct the revision"
        )
    if source.subset is not None and (not SUBSET.fullmatch(source.subset) or not source.subset.strip(".")):
        raise HubFault(f"{source.subset!r} is no subset", expected="a subset's name", fix="correct the subset")
    if source.rows is not None and source.rows < 1:
        raise HubFault(f"rows is {source.rows}", expected="a positive number", fix="leave rows out to take them all")
    if source.streaming and "[" in source.split:
        plain = source.split.partition("[")[0]
        raise HubFault(
            f"a stream has no slices such as {source.split!r}",
            expected="a whole split",
            fix=f"set rows to take the first ones of split {plain!r}, or streaming: false",
        )
