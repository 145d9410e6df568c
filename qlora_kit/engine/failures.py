"""What ends a request without an answer."""

from __future__ import annotations

from qlora_kit.engine.row import Row
from qlora_kit.errors import GuardError


def out_of_memory() -> type[Exception]:
    """What PyTorch raises; known without PyTorch being imported before."""
    import torch

    return torch.OutOfMemoryError


def no_memory(row: Row, error: Exception) -> GuardError:
    """Its keys and values, or what a pass needs, found no room."""
    return GuardError(
        f"memory ran out at {row.length} tokens of a request: {error}",
        expected="room for the keys and values of every row under way",
        fix="send fewer requests at once (max_batch), or shorter ones",
    )


def not_finite(row: Row) -> GuardError:
    """No token can be chosen."""
    return GuardError(
        f"{'the base' if row.adapter is None else row.adapter}: the logits are not finite numbers",
        expected="finite logits",
        fix="check the adapter's weights with `qlora-kit adapters show`, or lower its scale",
    )
