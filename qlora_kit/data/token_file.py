"""Tokenised rows on disk: batches of token ids and labels in, an Arrow file out that training maps into memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from qlora_kit.data.encoding import Encoded

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

LIST_COLUMNS = ("input_ids", "labels")
SOURCE_COLUMN = "source"


class TokenWriter:
    """Writes ``input_ids`` and ``labels`` (lists of int32) and ``source`` (text) row by row; memory holds one batch.

    Args:
        path: The file to make.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.rows = 0
        lists = [(name, pyarrow.list_(pyarrow.int32())) for name in LIST_COLUMNS]
        self._schema = pyarrow.schema([*lists, (SOURCE_COLUMN, pyarrow.string())])
        self._file = path.open("wb")
        self._writer = pyarrow.ipc.new_stream(self._file, self._schema)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()
        self._file.close()

    def write(self, rows: Sequence[Encoded]) -> None:
        """Append ``rows``."""
        import pyarrow

        if rows:
            lists = [_lists([row.input_ids for row in rows]), _lists([row.labels for row in rows])]
            columns = [*lists, pyarrow.array([row.source for row in rows], pyarrow.string())]
            self._writer.write_batch(pyarrow.record_batch(columns, schema=self._schema))
            self.rows += len(rows)


def open_tokens(path: Path) -> Dataset:
    """The rows of a token file, mapped into memory: they take no memory of the process's own."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _lists(rows: Sequence[Sequence[int]]) -> pyarrow.Array:
    import pyarrow

    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(ends[-1]))
    return pyarrow.ListArray.from_arrays(ends, flat)
