"""Rows of the embedding and the head that an adapter brings trained: where they belong in a merge."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qlora_kit.adapters import AdapterFiles
from qlora_kit.architecture import HEAD
from qlora_kit.checkpoint import TensorSpec
from qlora_kit.errors import AdapterError


@dataclass(frozen=True)
class TrainedRows:
    """Rows of one tensor of the output: their numbers, and the adapter's module that holds them."""

    ids: tuple[int, ...]
    module: str


def locate_trained_rows(
    files: AdapterFiles, specs: Mapping[str, TensorSpec], tied: Collection[str]
) -> dict[str, TrainedRows]:
    """Which tensors of the output have rows that the adapter brings; a tied head's own copy gets the embedding's.

    Args:
        files: The adapter.
        specs: The tensors of the output.
        tied: Modules whose weight is shared with another one.

    Raises:
        AdapterError: The rows are the head's, and the head is the embedding.
    """
    rows = {f"{module}.weight": TrainedRows(ids, module) for module, ids in files.token_rows.items()}
    if HEAD not in tied:
        return rows
    if HEAD in files.token_rows:
        raise AdapterError(
            f"{files.weights}: brings rows of {HEAD}, which shares its weight with the embedding of this base",
            expected="rows of the embedding",
            fix="keep it as an adapter, or train one with rows of embed_tokens",
        )
    copy = f"{HEAD}.weight"
    return rows if copy not in specs or not rows else {**rows, copy: next(iter(rows.values()))}
