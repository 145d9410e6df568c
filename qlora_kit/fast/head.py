"""Head and loss in one: of supervised rows only, a few at a time, with the gradient made while the logits exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from trl.trainer.utils import FusedCausalLMOutput

from qlora_kit.fast.unpadding import IGNORED, Rows, rows_of, unpadded

TILE_LOGITS = 2**26
"""Logits in memory at once: 256 MiB in fp32, as many as TRL's tiles of 4,096 x 32,768 hold in 16 bits."""


class FastHead(torch.nn.Module):
    """In the place of a frozen head and with its weight; inside ``scoring`` it gives log-probabilities, not logits.

    Attributes:
        unpads: Whether a ``ScoredModel`` with this head takes the padding out of its batches.
    """

    def __init__(self, head: torch.nn.Linear, *, unpads: bool = False) -> None:
        super().__init__()
        self.unpads = unpads
        self.weight, self.bias = head.weight, head.bias
        self.in_features, self.out_features = head.in_features, head.out_features
        self._rows: Rows | None = None
        self._scores: tuple[torch.Tensor, torch.Tensor] | None = None
        self.training = head.training

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of hidden states (..., H); inside ``scoring``, log-probabilities of the rows: (B, T - 1)."""
        if self._rows is None:
            return torch.nn.functional.linear(hidden_states, self.weight, self.bias)
        with torch.autocast(hidden_states.device.type, enabled=False):  # every dtype is chosen by hand
            inner = hidden_states.to(self.weight.dtype)  # wider behind a norm or an embedding that is trained
            log_probs, entropy, is_top1 = _LogProbs.apply(inner, self.weight, self.bias, self._rows)
        self._scores = (entropy, is_top1)
        return log_probs

    @contextmanager
    def scoring(self, rows: Rows) -> Iterator[None]:
        """Inside the block the model's logits are the log-probabilities of the rows' targets: (B, T - 1)."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Entropy, and whether the label was the most likely token, of the last pass inside ``scoring``: (B, T - 1)."""
        if self._scores is None:
            raise RuntimeError("the model did not call its head")
        scores, self._scores = self._scores, None
        return scores


class ScoredModel:
    """A model as TRL's loss calls it: ``fused_lm_head=True`` gives log-probabilities, by ``head``."""

    def __init__(self, model: torch.nn.Module, head: FastHead) -> None:
        self._model, self._head = model, head

    def __call__(self, *, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """What TRL's own fused head returns; without ``fused_lm_head``, what the model returns."""
        if not fused_lm_head:
            return self._model(**inputs)
        labels = inputs.pop("labels")
        rows = unpadded(self._model, inputs, labels) if self._head.unpads else None
        if rows is None:
            rows = rows_of(labels)
        with self._head.scoring(rows):
            log_probs = self._model(**inputs).logits
        entropy, is_top1 = self._head.scores()
        mask = rows.targets != IGNORED
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)


class _LogProbs(torch.autograd.Function):
    """log p(label | hidden), the distribution's entropy, and whether the label comes first; 0 where there is no label.

    The gradient of log p for the hidden state is W[label] - Σ p·W. It needs the logits again, so it is made with the
    value and kept, which takes what the hidden states would take. A tile holds whole rows of logits: with tiles of the
    vocabulary, the sum of their products would be rounded to 16 bits once for each tile.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = (rows.targets != IGNORED).flatten().nonzero().flatten()  # of (B, T - 1)
        targets = rows.targets.flatten().index_select(0, places)
        places_of_hidden = rows.places_of_hidden(places)
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places_of_hidden)
        log_probs = hidden.new_empty(len(places), dtype=_wide_dtype(hidden))
        entropy, is_top1 = torch.empty_like(log_probs), places.new_empty(len(places), dtype=torch.bool)
        gradient = torch.empty_like(chosen) if ctx.needs_input_grad[0] else None
        step = max(1, TILE_LOGITS // weight.shape[0])
        for start in range(0, len(places), step):
            tile = slice(start, start + step)
            log_probs[tile], entropy[tile], is_top1[tile], part = _score_tile(
                chosen[tile], targets[tile], weight, bias, with_gradient=gradient is not None
            )
            if gradient is not None and part is not None:
                gradient[tile] = part
        ctx.save_for_backward(gradient, places, places_of_hidden)
        ctx.hidden_shape = hidden.shape
        dense = [_spread(values, places, rows.targets.shape) for values in (log_probs, entropy, is_top1)]
        ctx.mark_non_differentiable(*dense[1:])
        return dense[0], dense[1], dense[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *unused: Any) -> tuple[torch.Tensor | None, ...]:
        gradient, places, places_of_hidden = ctx.saved_tensors
        factors = grad.flatten().index_select(0, places).unsqueeze(-1)
        whole = gradient.new_zeros(ctx.hidden_shape)
        whole.view(-1, whole.shape[-1]).index_copy_(0, places_of_hidden, (gradient * factors).to(gradient.dtype))
        return whole, None, None, None


def _score_tile(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Log-probability of the target, entropy, whether the target comes first, and the gradient (n, H) of the first."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    is_top1 = logits.argmax(dim=-1) == targets
    log_p = torch.log_softmax(logits, dim=-1, dtype=_wide_dtype(logits))
    del logits
    chosen = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    p = log_p.exp()
    entropy = log_p.mul_(p).sum(dim=-1).neg_()
    if not with_gradient:
        return chosen, entropy, is_top1, None
    del log_p
    minus_gradient = p.scatter_add_(1, targets.unsqueeze(1), p.new_full((len(targets), 1), -1.0)).to(weight.dtype)
    return chosen, entropy, is_top1, (minus_gradient @ weight).neg_()


def _wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() < torch.float32.itemsize else x.dtype


def _spread(values: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``values`` at ``places`` of zeros in ``shape``."""
    return values.new_zeros(shape.numel()).index_copy_(0, places, values).view(shape)
