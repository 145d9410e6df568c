"""What training changed, to be read: the base's and the trained adapter's answers to the same validation prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_kit.generation import Completion, Sampling, generate
from qlora_kit.report import Answer, Sample
from qlora_kit.training.stop_rate import last_prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 4


def sample_answers(
    model: PeftModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    number: int,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    interrupt: Callable[[], None] | None = None,
) -> tuple[Sample, ...]:
    """Greedy answers before and after training, beside the expected ones; no weight and no random state changes.

    Args:
        model: With the trained adapter active.
        rows: Columns ``input_ids`` and ``labels``; the samples are spread evenly over them.
        tokenizer: The base's.
        number: How many samples; rows without a prompt give none.
        stop_token_ids: The tokens that end an answer.
        max_new_tokens: The limit of an answer.
        interrupt: Called after each token; what it raises ends the answering.
    """
    number = min(number, len(rows))
    chosen = [rows[index * len(rows) // number] for index in range(number)]
    ids = [list(row["input_ids"]) for row in chosen]
    prompts = [last_prompt(row["input_ids"], row["labels"]) for row in chosen]
    pairs = [(prompt, row[len(prompt) :]) for prompt, row in zip(prompts, ids, strict=True) if prompt]
    if not pairs:
        return ()

    def text(token_ids: Sequence[int]) -> str:
        decoded = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)

    def answers() -> list[Answer]:
        completions: list[Completion] = generate(
            model,
            [prompt for prompt, _ in pairs],
            sampling=Sampling(max_new_tokens=max_new_tokens),
            stop_token_ids=stop_token_ids,
            pad_token_id=tokenizer.pad_token_id,
            batch_size=BATCH_SIZE,
            interrupt=interrupt,
        )
        return [Answer(text=text(done.token_ids), finish_reason=done.finish_reason) for done in completions]

    after = answers()
    with model.disable_adapter():
        before = answers()
    return tuple(
        Sample(prompt=text(prompt), expected=text(_without_stop(answer, stop_token_ids)), base=base, adapter=adapter)
        for (prompt, answer), base, adapter in zip(pairs, before, after, strict=True)
    )


def _without_stop(answer: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    return answer[:-1] if answer and answer[-1] in stop_token_ids else answer
