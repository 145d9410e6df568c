"""Fixed conversations to compare models on: a model in, its logits out; two models' logits in, their distance out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qlora_kit.data.chat import render_prompts
from qlora_kit.formats import Message
from qlora_kit.merging.results import LogitDifference

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOME_NUMBERS = 1 << 20
"""Logits that are turned into fp64 at a time."""
PROBES = (
    "The film was slow at first, but the ending is wonderful.",
    "I would not say that the service was bad; it was simply late.",
    "The little grey cats are sleeping in the old house.",
    "Anna keeps the red key in the kitchen.\n\nWhere is the red key?",
    "One morning, a fox found a letter under the bridge.",
    "Return the sum of the even numbers in a list.",
    "Count from 1 to 12: 1, 2, 3, 4, 5, 6,",
    "Où est la gare ? Elle est près du marché.",
)


def probe_prompts(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> list[list[int]]:
    """Token ids of each probe, rendered as a request is: with ``system_prompt`` before it unless that is empty."""
    opening = (Message("system", system_prompt),) if system_prompt else ()
    return render_prompts([(*opening, Message("user", text)) for text in PROBES], tokenizer)


def probe_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The model's logits for each prompt: fp32 on the CPU, (T, vocabulary)."""
    import torch

    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([list(ids)], device=model.device)).logits for ids in prompts]
    return [logits[0].float().cpu() for logits in outputs]


def compare_logits(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> LogitDifference:
    """How far ``other`` is from ``reference``, over all positions; not finite counts as infinite."""
    import torch

    largest = total = agreeing = divergence = 0.0
    positions = entries = 0
    for expected, found in _some_positions(reference, other):  # (T, V)
        difference = (found - expected).abs().nan_to_num(nan=torch.inf)
        largest = max(largest, float(difference.max()))
        total += float(difference.sum(dtype=torch.float64))
        agreeing += float((expected.argmax(-1) == found.argmax(-1)).sum())
        log_p, log_q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        positions += expected.shape[0]
        entries += expected.numel()
    return LogitDifference(
        max_abs=largest,
        mean_abs=total / entries,
        top1_agreement=agreeing / positions,
        kl=max(0.0, divergence / positions),
        positions=positions,
    )


def _some_positions(
    reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As many positions at a time as leave their numbers in fp64 small."""
    for expected, found in zip(reference, other, strict=True):
        step = max(1, SOME_NUMBERS // expected.shape[-1])
        yield from zip(expected.split(step), found.split(step), strict=True)
