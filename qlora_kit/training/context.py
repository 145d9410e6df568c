"""Tells of training rows that are longer than the base's context: it was never trained on such positions."""

from __future__ import annotations

import logging

from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.data.ledger import Ledger

logger = logging.getLogger(__name__)


def tell_beyond_context(ref: BaseRef, ledger: Ledger) -> None:
    """Warn of rows with more tokens than ``max_position_embeddings`` of the base; rotary positions go on behind it.

    Args:
        ref: The base.
        ledger: Of the data, as tokenised.
    """
    context = read_model_config(ref).get("max_position_embeddings")
    if not isinstance(context, int):
        return
    beyond = sum(rows for split in ledger.lengths.values() for length, rows in split.items() if length > context)
    if beyond:
        longest = max(length for split in ledger.lengths.values() for length in split)
        logger.warning(
            "%d rows have more tokens than the base's %d positions (the longest %d): it never learned such positions; "
            "lower train.max_length to %d, or choose a base with a longer context",
            beyond,
            context,
            longest,
            context,
        )
