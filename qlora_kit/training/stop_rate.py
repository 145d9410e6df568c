"""Whether the trained adapter ends its answers: validation prompts in, the share that stops by itself out.

Prompts are cut from the tokenised rows, so they are exactly what training saw before the last answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_kit.data.encoding import IGNORED_LABEL
from qlora_kit.generation import Sampling, generate

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel


def stop_rate(
    model: PeftModel,
    rows: Dataset,
    *,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    interrupt: Callable[[], None] | None = None,
) -> float | None:
    """The share of greedy answers that end with a stop token within ``max_new_tokens``; None without a prompt.

    Args:
        model: With the adapter to measure active; it is left in eval mode.
        rows: Columns ``input_ids`` and ``labels``.
        stop_token_ids: The tokens that end an answer.
        pad_token_id: For prompts of different lengths in one batch.
        max_new_tokens: The limit of an answer.
        interrupt: Called after each token; what it raises ends the measuring.
    """
    prompts = [prompt for row in rows if (prompt := last_prompt(row["input_ids"], row["labels"]))]
    if not prompts:
        return None
    model.eval()
    completions = generate(
        model,
        prompts,
        sampling=Sampling(max_new_tokens=max_new_tokens),
        stop_token_ids=stop_token_ids,
        pad_token_id=pad_token_id,
        batch_size=8,
        interrupt=interrupt,
    )
    return sum(completion.finish_reason == "stop" for completion in completions) / len(completions)


def last_prompt(input_ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The tokens before the row's last stretch of supervised ones; empty where a row is supervised from its start."""
    position = len(labels)
    while position > 0 and labels[position - 1] == IGNORED_LABEL:
        position -= 1
    while position > 0 and labels[position - 1] != IGNORED_LABEL:
        position -= 1
    return list(input_ids[:position])
