"""Reads a split of a data set of the Hub: rows of one known commit come out, and every fault with its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.data.hub.columns import Columns, read_columns
from qlora_kit.data.hub.opening import missing_library, open_source, short_message
from qlora_kit.data.hub.source import HubFault, HubSource, ResolvedHubSource
from qlora_kit.data.ledger import Problem, data_error
from qlora_kit.data.reading import Item, Note, Row
from qlora_kit.suggest import advice


def resolve(source: HubSource) -> ResolvedHubSource:
    """Looks up the commit of ``source``: on the Hub, or in the local cache where the Hub cannot be asked.

    Raises:
        DataError: The id, revision or subset is wrong, or neither the Hub nor the cache has the data set.
    """
    try:
        return ResolvedHubSource(source, open_source(source, source.revision).commit)
    except HubFault as fault:
        raise data_error([fault.problem(source)]) from fault


def read_hub_rows(source: HubSource | ResolvedHubSource) -> Iterator[Item]:
    """Yields the rows of a split in order, numbered from 1.

    Values are plain: class labels are names, and chat turns are lists of objects, each change told by a ``Note``.
    Without streaming, `datasets` downloads all files of the subset first and keeps them in its cache.

    Args:
        source: A resolved source is read at its commit, any other at what its revision stands for now.
    """
    if isinstance(source, HubSource):
        named, revision = source, source.revision
    else:
        named, revision = source.source, source.commit
    try:
        opened = open_source(named, revision)
        dataset = _split_of(named, opened.builder)
        columns = _plain_columns(dataset)
    except HubFault as fault:
        yield fault.problem(named)
        return
    if opened.cached:
        yield Note(f"{named.name}: read without the Hub, from the local cache, at commit {opened.commit}")
    yield from (Note(f"{named.name}: {note}") for note in columns.notes)
    yield from _read(named, dataset, columns)


def _read(source: HubSource, dataset: Any, columns: Columns) -> Iterator[Item]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx

    rows = iter(dataset)
    number = 0
    while True:
        try:
            values = next(rows, None)
        except (OSError, httpx.HTTPError) as error:
            yield _broken_off(source, number, error)
            return
        except (DatasetsError, ValueError) as error:  # Arrow's, JSON's and Unicode's errors are all ValueErrors
            where = f"behind row {number}" if number else "from the start"
            reason = f"cannot be read {where}: {short_message(error)}"
            fix = "choose another revision, or tell the data set's author"
            yield Problem(source.name, number + 1, reason, "data files of one shape", fix, stops=True)
            return
        if values is None:
            break
        number += 1
        try:
            row = columns.convert(values)
        except ValueError:
            expected = "for each turn one value of each key"
            yield Problem(source.name, number, "the lists of its turns differ in length", expected, "remove the row")
        else:
            yield Row(source.name, number, row)
    if number == 0:
        yield _no_row().problem(source)


def _no_row() -> HubFault:
    return HubFault("the split holds no row", expected="at least one row", fix="choose another split")


def _broken_off(source: HubSource, number: int, error: Exception) -> Problem:
    reason = f"the rows broke off after row {number}: {short_message(error)}"
    fix = "run it again, or download the data set first (streaming: false)"
    return Problem(source.name, number + 1, reason, "rows up to the end of the split", fix, stops=True)


def _split_of(source: HubSource, builder: Any) -> Any:
    """The `datasets.Dataset` or `IterableDataset` of the split, cut to ``rows``; downloaded where not streaming."""
    from datasets.exceptions import DatasetsError

    _check_split(source, builder)
    try:
        if source.streaming:
            stream = builder.as_streaming_dataset(split=source.split)
            return stream if source.rows is None else stream.take(source.rows)
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=source.split)
    except ValueError as error:
        splits = ", ".join(builder.info.splits or builder.config.data_files or ())
        raise HubFault(short_message(error), expected=f"one of the splits {splits}", fix="correct the split") from error
    except StopIteration:  # how `datasets` ends when a JSON file is empty
        raise _no_row() from None
    except ImportError as error:
        raise missing_library(error) from error
    except (DatasetsError, OSError) as error:
        raise _unreadable(error.__cause__ or error) from error
    return dataset if source.rows is None else dataset.select(range(min(source.rows, len(dataset))))


def _unreadable(error: BaseException) -> HubFault:
    reason = f"its files cannot be read: {short_message(error)}"
    if isinstance(error, OSError):
        expected = "a steady connection, and room in the cache (HF_HOME)"
        return HubFault(reason, expected=expected, fix="try again, or set streaming: true")
    fix = "choose another revision, or download the files and name them as data files"
    return HubFault(reason, expected="data files of one shape", fix=fix)


def _check_split(source: HubSource, builder: Any) -> None:
    known = [str(split) for split in builder.config.data_files or builder.info.splits or ()]
    named = [part.partition("[")[0].strip() for part in source.split.split("+")]
    unknown = next((name for name in named if name not in (*known, "all")), None)
    if known and unknown is not None:
        raise HubFault(
            f"there is no split {unknown!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"correct the split: {advice(unknown, known)}",
        )


def _plain_columns(dataset: Any) -> Columns:
    columns = read_columns(dataset.features)
    if columns.refused:
        listed = ", ".join(f"{name} ({kind})" for name, kind in columns.refused.items())
        raise HubFault(
            f"columns that hold no text: {listed}",
            expected="text, numbers, class labels and lists of them",
            fix="choose a text-only subset or data set",
        )
    return columns
