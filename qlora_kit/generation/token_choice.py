"""Which token comes next: a row's logits in, a token id out, by transformers' own processors in its own order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.generation.sampling import Sampling

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was under the model, temperature and limits left out.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability.
        top: The likeliest tokens and theirs, in falling order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenChoice:
    """One row's way to its next token: its processors, its random numbers, what it said so far."""

    def __init__(self, sampling: Sampling, prompt_ids: tuple[int, ...], device: torch.device) -> None:
        """Set up for one row.

        Args:
            sampling: The row's settings.
            prompt_ids: Counted by the repetition penalty, as in transformers.
            device: Where the logits will be.
        """
        import torch
        from transformers.generation.logits_process import (
            LogitsProcessorList,
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._samples = sampling.temperature > 0
        self._processors = LogitsProcessorList()
        self._said: torch.Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty=sampling.repetition_penalty))
            self._said = torch.tensor([prompt_ids], device=device)  # (1, T)
        if self._samples:
            if sampling.temperature != 1.0:
                self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k > 0:
                self._processors.append(TopKLogitsWarper(top_k=sampling.top_k))
            if sampling.top_p < 1.0:
                self._processors.append(TopPLogitsWarper(top_p=sampling.top_p))
            if sampling.min_p > 0.0:
                self._processors.append(MinPLogitsWarper(min_p=sampling.min_p))
        self._generator: torch.Generator | None = None
        if self._samples and sampling.seed is not None:
            self._generator = torch.Generator(device).manual_seed(sampling.seed)

    @property
    def is_plain(self) -> bool:
        """Whether it is the likeliest token, which can be found for many rows at once (``greedy_tokens``)."""
        return not self._samples and self._said is None

    def next_token(self, logits: torch.Tensor) -> int:
        """The next token of a row.

        Args:
            logits: fp32.  # (V,)
        """
        import torch

        scores = logits[None]  # (1, V)
        said = torch.empty(1, 0, dtype=torch.long, device=logits.device) if self._said is None else self._said
        if self._processors:
            scores = self._processors(said, scores.clone())
        if self._samples:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)  # (1, 1)
        else:
            chosen = scores.argmax(-1, keepdim=True)
        if self._said is not None:
            self._said = torch.cat([self._said, chosen], dim=1)
        return int(chosen)


def greedy_tokens(logits: torch.Tensor) -> list[int]:
    """The likeliest token of each row of ``logits``.  # (B, V)"""
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


def token_logprob(logits: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """What ``Sampling.logprobs`` asks for, of one row.

    Args:
        logits: fp32.  # (V,)
        token_id: The chosen token.
        top: How many others are told.
    """
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), pairs)
