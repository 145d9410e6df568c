"""The rows of a batch: where they stand (``file:line``), found by their token ids, and the batch split by rows.

Rows are found by their token ids when something has gone wrong, so that training itself carries nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_kit.data.token_file import SOURCE_COLUMN

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_NAMED = 16
_BLOCK_ROWS = 10_000


def sources_of_batches(rows: Dataset, batches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the rows of ``batches`` stand, in their order; beyond ``ROWS_NAMED``, how many more there are.

    Args:
        rows: The training rows before packing: columns ``input_ids`` and ``source``.
        batches: What the collator made of some of them.
    """
    wanted = [ids for batch in batches for ids in _sequences(batch)]
    keys = {ids.tobytes() for ids in wanted}
    lengths = np.unique([len(ids) for ids in wanted])
    found: dict[bytes, str] = {}
    for block in rows.select_columns(["input_ids", SOURCE_COLUMN]).with_format("arrow").iter(_BLOCK_ROWS):
        columns = block.column("input_ids").combine_chunks()
        sizes = columns.value_lengths().to_numpy()
        for index in np.flatnonzero(np.isin(sizes, lengths)):
            key = np.asarray(columns[int(index)].values, dtype=np.int64).tobytes()
            if key in keys:
                found.setdefault(key, block.column(SOURCE_COLUMN)[int(index)].as_py())
        if len(found) == len(keys):
            break
    names = [found[ids.tobytes()] for ids in wanted if ids.tobytes() in found]
    more = len(names) - ROWS_NAMED
    return names if more <= 0 else [*names[:ROWS_NAMED], f"and {more} more"]


def longest_rows(rows: Dataset, count: int) -> list[int]:
    """The numbers of the ``count`` rows with the most tokens."""
    blocks = rows.select_columns(["input_ids"]).with_format("arrow").iter(_BLOCK_ROWS)
    lengths = np.concatenate([block.column(0).combine_chunks().value_lengths().to_numpy() for block in blocks])
    return [int(index) for index in np.argsort(lengths, kind="stable")[-count:]]


def row_pieces(batch: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
    """The batch in about ``pieces`` batches of fewer rows; packed rows stay together.

    Args:
        batch: Tensors whose first dimension is the row, where rows are padded.
        pieces: More than there are rows give one row each.
    """
    rows = batch["input_ids"].shape[0]
    if pieces == 1 or rows == 1 or "attention_mask" not in batch:
        return [dict(batch)]
    size = max(1, rows // pieces)
    return [
        {name: value[start : start + size] if _has_rows(value, rows) else value for name, value in batch.items()}
        for start in range(0, rows, size)
    ]


def halved(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The second half of a batch's rows or, of a single row, of its tokens: the first may be a prompt alone."""
    rows, length = batch["input_ids"].shape
    if rows > 1:
        return row_pieces(batch, 2)[-1]
    return {
        name: value[:, length // 2 :]
        if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == length
        else value
        for name, value in batch.items()
    }


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows


def _sequences(batch: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The token ids of each row of a batch, without padding."""
    ids = batch["input_ids"].cpu()  # (B, T), or (1, all tokens) where rows are packed
    if "attention_mask" in batch:
        for row, mask in zip(ids, batch["attention_mask"].cpu(), strict=True):
            yield row[mask.bool()].numpy().astype(np.int64)
        return
    starts = torch.nonzero(batch["position_ids"].cpu().flatten() == 0).flatten()[1:]
    for row in torch.tensor_split(ids.flatten(), starts):
        yield row.numpy().astype(np.int64)
