"""Rows of a padded batch as one sequence without the padding, and where each row's tokens went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
"""The label of tokens that do not count, as in torch's cross entropy."""


@dataclass(frozen=True)
class Rows:
    """What is predicted in a batch, and from which hidden states.

    Attributes:
        targets: Label of the token after each: (B, T - 1); ``IGNORED`` where none counts.
        starts: Where each row begins in the flattened hidden states: (B,).
    """

    targets: torch.Tensor
    starts: torch.Tensor

    def places_of_hidden(self, places: torch.Tensor) -> torch.Tensor:
        """Of ``places`` (n,) in the flattened targets: where the hidden states that predict them are."""
        length = self.targets.shape[1]
        return self.starts.index_select(0, places.div(length, rounding_mode="floor")).add_(places % length)


def rows_of(labels: torch.Tensor) -> Rows:
    """The rows of a batch whose hidden states are (B, T, H), with its labels (B, T)."""
    rows, length = labels.shape
    return Rows(labels[:, 1:], torch.arange(0, rows * length, length, device=labels.device))


def unpadded(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> Rows | None:
    """Put embeddings without padding, in one row, and their positions in the place of a batch's ids and mask.

    The rows follow each other as packed conversations do. They are embedded before, so that what depends on a batch's
    shape (NEFTune's noise) stays as it was.

    Args:
        model: Whose embedding is called.
        inputs: Of the model; changed only if the rows are padded on the right and nothing else is said of them.
        labels: (B, T).

    Returns:
        Where the rows are now; None where the inputs stay as they were.
    """
    mask = inputs.get("attention_mask")
    if mask is None or "input_ids" not in inputs or "position_ids" in inputs or mask.shape != labels.shape:
        return None
    real = mask.bool()
    lengths = real.sum(dim=1)
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(real)
    on_the_right = torch.equal(real, positions < lengths.unsqueeze(1))
    if real.all() or not on_the_right or (labels[~real] != IGNORED).any():
        return None
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))[real].unsqueeze(0)  # (1, N, H)
    inputs["position_ids"] = positions[real].unsqueeze(0)
    del inputs["attention_mask"]
    return Rows(labels[:, 1:], lengths.cumsum(0) - lengths)
