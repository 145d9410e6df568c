"""Tokenises the checked examples of a split: over-long rows, rows that cannot be encoded, and token counts are told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from qlora_kit.config import RunConfig
from qlora_kit.data.encoding import IGNORED_LABEL, Encoded, LossOn, Unencodable, encode_batch, self_check
from qlora_kit.data.ledger import Ledger, Problem, data_error, split_source
from qlora_kit.formats import Example

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Overlength = Literal["stop", "drop", "truncate"]
OnError = Literal["stop", "drop"]

BATCH_ROWS = 1000
SELF_CHECKED_ROWS = 32


def encode_split(
    config: RunConfig, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, ledger: Ledger, split: str
) -> Dataset:
    """``encode_examples`` with the settings of a config; the exceptions are its own."""
    return encode_examples(
        examples,
        tokenizer,
        max_length=config.train.max_length,
        loss_on=config.data.loss_on,
        overlength=config.data.overlength,
        on_error=config.data.on_error,
        ledger=ledger,
        split=split,
    )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn,
    overlength: Overlength,
    ledger: Ledger,
    split: str = "train",
    on_error: OnError = "stop",
) -> Dataset:
    """Encodes a split into the columns ``input_ids`` and ``labels``, which TRL's ``SFTTrainer`` takes as they are.

    Args:
        examples: Checked rows.
        tokenizer: The base model's tokenizer.
        max_length: Longest row allowed, in tokens.
        loss_on: Supervise all assistant turns, or the last one only.
        overlength: What to do with a longer row: stop with all of them listed, drop it, or truncate it. Truncating
            keeps as many whole turns as fit; where not even the first answer fits, the answer itself is cut and its
            stop token lost, and the ledger says so. A row whose prompt alone fills ``max_length`` is dropped.
        ledger: Told of each row dropped or truncated, and of the token counts.
        split: The split's name in the ledger.
        on_error: What to do with rows that cannot be encoded: stop with all of them listed, or drop them.

    Raises:
        DataError: Rows are too long and ``overlength`` is stop, a row cannot be encoded, or no row is left.
        BaseModelError: The tokenizer has no usable chat template, or what it encodes does not decode to the answer.
    """
    from datasets import Dataset

    self_check(examples[:SELF_CHECKED_ROWS], tokenizer, loss_on=loss_on)
    kept: list[Encoded] = []
    problems: list[Problem] = []
    for example, encoded in _encode_in_batches(examples, tokenizer, loss_on):
        file, line = split_source(example.source)
        if isinstance(encoded, Unencodable):
            problem = Problem(file, line, encoded.reason, encoded.expected, encoded.fix)
            if on_error == "drop":
                ledger.problems.append(problem)
                ledger.record(split, example.source, "dropped", encoded.reason)
            else:
                problems.append(problem)
            continue
        if len(encoded.input_ids) > max_length:
            if overlength == "stop":
                problems.append(_overlong(file, line, len(encoded.input_ids), max_length))
                continue
            shorter, reason = _shorten(encoded, max_length) if overlength == "truncate" else (None, "")
            reason = f"{len(encoded.input_ids)} tokens, max_length is {max_length}{reason}"
            ledger.record(split, example.source, "dropped" if shorter is None else "truncated", reason)
            if shorter is None:
                continue
            encoded = shorter
        kept.append(encoded)
    if problems:
        ledger.problems.extend(problems)
        raise data_error(problems)
    if not kept:
        file, _ = split_source(examples[0].source)
        left = f"no {split} row is left after tokenising {len(examples)}"
        expected = f"at least one row of at most {max_length} tokens"
        problem = Problem(file, None, left, expected, "raise train.max_length or shorten the rows", stops=True)
        ledger.problems.append(problem)
        raise data_error([problem])
    ledger.supervised_tokens[split] += sum(encoded.supervised_tokens for encoded in kept)
    ledger.total_tokens[split] += sum(len(encoded.input_ids) for encoded in kept)
    return Dataset.from_dict(
        {"input_ids": [encoded.input_ids for encoded in kept], "labels": [encoded.labels for encoded in kept]}
    )


def _encode_in_batches(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn
) -> Iterator[tuple[Example, Encoded | Unencodable]]:
    for start in range(0, len(examples), BATCH_ROWS):
        batch = examples[start : start + BATCH_ROWS]
        conversations = [example.messages for example in batch]
        yield from zip(batch, encode_batch(conversations, tokenizer, loss_on=loss_on), strict=True)


def _overlong(file: str, line: int | None, tokens: int, max_length: int) -> Problem:
    fix = "raise train.max_length, shorten the row, or set data.overlength to drop or truncate"
    return Problem(file, line, f"{tokens} tokens long", f"at most train.max_length = {max_length} tokens", fix)


def _shorten(encoded: Encoded, max_length: int) -> tuple[Encoded | None, str]:
    """The row cut to ``max_length``, after a whole turn if one fits, and what was lost; None if no answer is left."""
    labels = encoded.labels[:max_length]
    cut_inside = encoded.labels[max_length] != IGNORED_LABEL and labels[-1] != IGNORED_LABEL
    end = _last_supervised_end(labels, before_open_run=cut_inside)
    if end > 0:
        kept = Encoded(encoded.input_ids[:end], labels[:end])
        lost = encoded.supervised_tokens - kept.supervised_tokens
        return kept, f": later turns with {lost} supervised tokens were cut off, whole turns are left"
    if all(label == IGNORED_LABEL for label in labels):
        return None, ": the prompt alone fills it, no answer token would be left"
    kept = Encoded(encoded.input_ids[:max_length], labels)
    lost = encoded.supervised_tokens - kept.supervised_tokens
    return kept, f": the answer was cut, {lost} of its supervised tokens and its stop token are lost"


def _last_supervised_end(labels: list[int], *, before_open_run: bool) -> int:
    """One past the last supervised token of a complete turn, 0 if there is none."""
    end = len(labels)
    while before_open_run and end > 0 and labels[end - 1] != IGNORED_LABEL:
        end -= 1
    while end > 0 and labels[end - 1] == IGNORED_LABEL:
        end -= 1
    return end
