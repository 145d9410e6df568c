"""Opens a data set of the Hub: a source in, the `datasets` builder of its own data files and their commit out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.data.hub.source import HubFault, HubSource, check_source
from qlora_kit.suggest import advice

# How `datasets` lists what there is when no subset, or an unknown one, was named.
SUBSETS_LISTED = re.compile(r"[Aa]vailable(?: configs(?: in the cache)?)?: \[(.*)\]")
LONGEST_MESSAGE = 300


@dataclass(frozen=True)
class Opened:
    """A `datasets` builder, the commit that it reads, and whether it reads it from the local cache."""

    builder: Any
    commit: str
    cached: bool


def open_source(source: HubSource, revision: str | None) -> Opened:
    """Finds a data set: on the Hub, or in the local cache where the Hub is not to be asked or does not answer.

    Raises:
        HubFault: What is wrong with the source, or where it is missing.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.utils import httpx

    check_source(source)
    if is_offline_mode():
        return _open_offline(source, revision)
    try:
        return _open_builder(source, revision)
    except (ConnectionError, httpx.RequestError) as error:
        opened = _open_snapshot(source, _find_snapshot(source, revision))
        if opened is None:
            raise _out_of_reach(source, revision, f"cannot be reached ({short_message(error)})") from error
        return opened


def _open_offline(source: HubSource, revision: str | None) -> Opened:
    """The files that were downloaded before, else the rows that `datasets` cached before."""
    snapshot = _find_snapshot(source, revision)
    opened = _open_snapshot(source, snapshot)
    if opened is not None:
        return opened
    commit = revision if snapshot is None or revision is None else snapshot.name
    try:
        return _open_builder(source, commit)
    except ConnectionError as error:
        raise _out_of_reach(source, revision, "was not asked (HF_HUB_OFFLINE)") from error


def _find_snapshot(source: HubSource, revision: str | None) -> Path | None:
    """The folder of the files that were downloaded before; it has the commit's name."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.id, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _open_snapshot(source: HubSource, folder: Path | None) -> Opened | None:
    """The data set in a folder of downloaded files; None without one, or where it lacks files that are needed."""
    if folder is None:
        return None
    path = folder.resolve()
    try:
        builder = _load_builder(source, str(path), None)
    except FileNotFoundError:
        return None
    _check_data_files(builder, f"{path}/")
    return Opened(builder, path.name, cached=True)


def _open_builder(source: HubSource, revision: str | None) -> Opened:
    """What `datasets` finds: data files on the Hub or, where it falls back silently, rows that it cached before.

    Raises:
        ConnectionError: The Hub does not answer, and `datasets` has no such rows.
    """
    from datasets.packaged_modules.cache.cache import Cache

    # With this prefix `datasets` does not look for a local folder of the same name.
    builder = _load_builder(source, f"hf://datasets/{source.id}", revision)
    commit = str(builder.hash)
    cached = isinstance(builder, Cache)
    if cached and revision is not None and revision != commit:
        raise HubFault(
            f"the Hub cannot be asked for it, and the cache holds commit {commit}",
            expected=f"revision {revision}",
            fix=f"run it where there is a network, or set revision to {commit}",
        )
    if not cached:
        _check_data_files(builder, f"hf://datasets/{source.id}@{commit}/")
    return Opened(builder, commit, cached)


def _load_builder(source: HubSource, path: str, revision: str | None) -> Any:
    """`datasets.load_dataset_builder`, its errors told apart.

    Raises:
        ConnectionError: The Hub does not answer.
        FileNotFoundError: A folder lacks data files that its card names.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset_builder(path, name=source.subset, revision=revision)
    except DatasetNotFoundError as error:
        raise _not_found(source, str(error)) from error
    except FileNotFoundError as error:
        if Path(path).is_dir():
            raise
        raise HubFault(
            f"no data files that can be read: {short_message(error).rpartition(' either: ')[2]}",
            expected="a repository of JSONL, JSON, CSV or Parquet files",
            fix="choose another data set, or download its files and name them as data files",
        ) from error
    except ValueError as error:
        raise _wrong_subset(source, error) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise HubFault(
            "the data set is made by a script of its own, which is never run",
            expected="a repository of data files",
            fix="set revision to refs/convert/parquet if its page offers Parquet files, or choose another data set",
        ) from error
    except ImportError as error:
        raise missing_library(error) from error
    except ConnectionError:
        raise
    except OSError as error:
        raise HubFault(
            f"cannot be had from the Hub: {short_message(error)}",
            expected="an answer of the Hub",
            fix="try again later, or name files that you have",
        ) from error


def missing_library(error: ImportError) -> HubFault:
    """The fault of data files of a kind that `datasets` reads by a library that is not installed."""
    return HubFault(
        f"its data files need another library: {short_message(error)}",
        expected="JSONL, JSON, CSV or Parquet files of the repository",
        fix="install that library, or choose another data set",
    )


def _wrong_subset(source: HubSource, error: ValueError) -> HubFault:
    subsets = SUBSETS_LISTED.search(str(error))
    if subsets is None:
        return HubFault(short_message(error), expected="a data set that can be read", fix="choose another data set")
    names = re.findall(r"'([^']+)'", subsets[1])
    if source.subset is None:
        what = "the data set has several subsets"
        return HubFault(what, expected=f"one of {', '.join(names)}", fix="set subset to one of them")
    return HubFault(
        f"there is no subset {source.subset!r}",
        expected=f"one of {', '.join(names)}",
        fix=f"correct the subset: {advice(source.subset, names)}",
    )


def _out_of_reach(source: HubSource, revision: str | None, why: str) -> HubFault:
    wanted = "" if revision is None else f" --revision {revision}"
    return HubFault(
        f"the Hub {why}, and the data set is not in the cache",
        expected="a network connection, or a data set that was downloaded before",
        fix=f"run `hf download {source.id} --repo-type dataset{wanted}` where there is a network",
    )


def _not_found(source: HubSource, message: str) -> HubFault:
    if "gated dataset" in message:
        return HubFault(
            f"{source.id} is gated",
            expected="a token of an account that has been given access",
            fix=f"ask for access at https://huggingface.co/datasets/{source.id}, then `hf auth login` or set HF_TOKEN",
        )
    if message.startswith("Revision"):
        expected = "a branch, tag or commit of the data set"
        return HubFault(f"{source.id} has no revision {source.revision!r}", expected=expected, fix="correct it")
    return HubFault(
        f"the Hub has no data set {source.id}, or none that you may read",
        expected="a public id, or a token that may read it",
        fix="check the spelling; for a private data set `hf auth login` or set HF_TOKEN",
    )


def _check_data_files(builder: Any, root: str) -> None:
    """A data set's card may name files anywhere, on this machine or on another host: only its own are read."""
    for files in (builder.config.data_files or {}).values():
        for file in files:
            path = str(file).removeprefix(root)
            if path == str(file) or ".." in path.split("/"):
                raise HubFault(
                    f"its card names a file outside the repository: {str(file)[:LONGEST_MESSAGE]}",
                    expected="data files of the repository itself",
                    fix="choose another data set",
                )


def short_message(error: BaseException) -> str:
    """An error's message on one line, at most ``LONGEST_MESSAGE`` characters; its type where it has none."""
    return " ".join(str(error).split())[:LONGEST_MESSAGE] or type(error).__name__
