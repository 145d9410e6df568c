"""Teacher-forced likelihood: conversations in, negative log-likelihoods of their answers out, and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_kit.data.encoding import IGNORED_LABEL, Encoded
from qlora_kit.errors import GuardError
from qlora_kit.metrics import bootstrap_ci95

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LOGITS_BYTES = 512 * 1024**2
FLOAT_ROWS = 1024  # logits copied to fp32 at a time
MIN_ROWS = 10
"""With fewer rows no difference of losses counts as one."""


@dataclass(frozen=True)
class Loss:
    """The loss of a model on rows, row by row.

    Attributes:
        nlls: Negative log-likelihood of each row's answer and its stop token, in nats.  # (N,)
        tokens: How many tokens that are.  # (N,)
    """

    nlls: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """In nats a token, over all tokens of all rows."""
        return sum(self.nlls) / sum(self.tokens)


@dataclass(frozen=True)
class LossDifference:
    """The difference of two models' losses on the same rows.

    Attributes:
        value: In nats a token.
        ci95: Its 95 % interval, by resampling rows.
        rows: How many.
    """

    value: float
    ci95: tuple[float, float]
    rows: int

    @property
    def is_decided(self) -> bool:
        """Whether the rows show it: they are not too few, and the interval leaves 0 out."""
        return self.rows >= MIN_ROWS and (self.ci95[0] > 0 or self.ci95[1] < 0)

    @property
    def is_lower(self) -> bool:
        """Whether the rows show that the first model's loss is the lower one."""
        return self.is_decided and self.value < 0


def loss_difference(loss: Loss, other: Loss) -> LossDifference:
    """``loss`` minus ``other``, of the same rows."""
    tokens = np.asarray(loss.tokens, dtype=float)
    rows = np.column_stack([np.subtract(loss.nlls, other.nlls), tokens])  # (N, 2)
    return LossDifference(_mean_of(rows), bootstrap_ci95(rows, statistic=_mean_of), len(rows))


def _mean_of(rows: NDArray[Any]) -> float:
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def answer_nlls(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    batch_size: int,
    pad_token_id: int,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Each row's negative log-likelihood of its supervised tokens, summed, in nats; the model is told the true tokens.

    Logits are computed for the answers' positions only and for so few rows at once that they fit ``LOGITS_BYTES``
    (one row is always computed whole).

    Raises:
        GuardError: A value is not finite.
    """
    import torch

    sums: dict[int, float] = {}
    vocab_size = model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in _likelihood_batches(rows, batch_size=batch_size, max_logits=LOGITS_BYTES // (4 * vocab_size)):
                sums.update(zip(batch, _batch_nlls(model, [rows[row] for row in batch], pad_token_id), strict=True))
                if progress is not None:
                    progress(len(sums))
    finally:
        model.train(was_training)
    if not all(math.isfinite(value) for value in sums.values()):
        raise GuardError(
            "the likelihood of a reference answer is not a finite number",
            expected="finite logits",
            fix="check the adapter's weights with `qlora-kit adapters show`, or load the base without 4 bits",
        )
    return [sums[row] for row in range(len(rows))]


def _span(row: Encoded) -> tuple[int, int]:
    """The positions whose logits predict the row's supervised tokens: the first, and one past the last."""
    first = next(index for index, label in enumerate(row.labels) if label != IGNORED_LABEL)
    return first - 1, len(row.labels) - 1


def _likelihood_batches(rows: Sequence[Encoded], *, batch_size: int, max_logits: int) -> Iterator[list[int]]:
    """Row indices in batches, the longest rows first: a lack of memory shows at once."""
    batch: list[int] = []
    start = end = 0
    for row in sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids)):
        first, last = _span(rows[row])
        wider = (min(start, first), max(end, last)) if batch else (first, last)
        if batch and (len(batch) == batch_size or (len(batch) + 1) * (wider[1] - wider[0]) > max_logits):
            yield batch
            batch, wider = [], (first, last)
        batch.append(row)
        start, end = wider
    if batch:
        yield batch


def _batch_nlls(model: PreTrainedModel, rows: Sequence[Encoded], pad_token_id: int) -> list[float]:
    import torch

    ids, mask, labels = _padded(rows, pad_token_id, model.device)  # (B, T) each
    spans = [_span(row) for row in rows]
    kept = torch.arange(min(first for first, _ in spans), max(last for _, last in spans), device=model.device)  # (K,)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits  # (B, K, V)
    targets = labels[:, kept + 1]  # (B, K)
    row_of, column_of = (targets != IGNORED_LABEL).nonzero(as_tuple=True)  # (S,) each
    sums = [0.0] * len(rows)
    for part in torch.arange(len(row_of), device=model.device).split(FLOAT_ROWS):
        places = row_of[part], column_of[part]
        nlls = torch.nn.functional.cross_entropy(logits[places].float(), targets[places], reduction="none")
        for row, nll in zip(places[0].tolist(), nlls.tolist(), strict=True):
            sums[row] += nll
    return sums


def _padded(
    rows: Sequence[Encoded], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, padded on the right: (B, T) each."""
    import torch

    longest = max(len(row.input_ids) for row in rows)
    gaps = [longest - len(row.input_ids) for row in rows]
    pairs = list(zip(rows, gaps, strict=True))
    return (
        torch.tensor([row.input_ids + [pad_token_id] * gap for row, gap in pairs], device=device),
        torch.tensor([[1] * len(row.input_ids) + [0] * gap for row, gap in pairs], device=device),
        torch.tensor([row.labels + [IGNORED_LABEL] * gap for row, gap in pairs], device=device),
    )
