"""Turns checked examples into token ids and labels: supervised are exactly the answers and their stop tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_kit.config import RunConfig
from qlora_kit.data.chat import (
    Cut,
    TurnFormat,
    assistant_turns,
    cut_texts,
    read_turn_format,
    render_prompts,
    render_texts,
    tokenize_cuts,
)
from qlora_kit.data.ledger import Ledger, Problem, data_error, split_source
from qlora_kit.errors import BaseModelError, DataError
from qlora_kit.formats import Example, Message

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["all_assistant", "last"]
Overlength = Literal["stop", "drop", "truncate"]
OnError = Literal["stop", "drop"]

IGNORED_LABEL = -100
BATCH_ROWS = 1000
SELF_CHECKED_ROWS = 32


@dataclass(frozen=True)
class Encoded:
    """One tokenised conversation, up to its last supervised token (what follows has no part in the loss).

    Attributes:
        input_ids: Token ids.  # (T,)
        labels: The same ids where supervised, else -100.  # (T,)
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss sees."""
        return len(self.labels) - self.labels.count(IGNORED_LABEL)


@dataclass(frozen=True)
class Unencodable:
    """Why one conversation cannot be encoded."""

    reason: str
    expected: str
    fix: str


def encode_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, loss_on: LossOn) -> Encoded:
    """Token ids and labels of one conversation.

    ``input_ids`` starts with ``render_prompt(messages[:turn])`` for each supervised turn, and the labels that follow
    are the tokens generation has to produce there: the answer and the token that ends the turn.

    Raises:
        DataError: The template does not let this conversation's answers be told from its prompts.
        BaseModelError: The tokenizer has no usable chat template.
    """
    encoded = encode_batch([messages], tokenizer, loss_on=loss_on)[0]
    if isinstance(encoded, Unencodable):
        raise DataError(encoded.reason, expected=encoded.expected, fix=encoded.fix)
    return encoded


def encode_batch(
    conversations: Sequence[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, *, loss_on: LossOn
) -> list[Encoded | Unencodable]:
    """As ``encode_conversation`` for many conversations in a few calls of the template and the tokenizer."""
    turn_format = read_turn_format(tokenizer)
    try:
        texts = render_texts(conversations, tokenizer, for_generation=False)
        cuts = cut_texts(texts, conversations, tokenizer, turn_format)
    except DataError as error:
        if len(conversations) > 1:  # find the row that the template refuses
            return [encode_batch([messages], tokenizer, loss_on=loss_on)[0] for messages in conversations]
        fault = error.faults[0]
        return [Unencodable(fault.what, fault.expected, fault.fix)]
    ids = tokenize_cuts(cuts, tokenizer, turn_format)
    return [
        _mask(cut, pieces, _supervised_turns(messages, loss_on), turn_format)
        for messages, cut, pieces in zip(conversations, cuts, ids, strict=True)
    ]


def _supervised_turns(messages: Sequence[Message], loss_on: LossOn) -> list[int]:
    turns = assistant_turns(messages)
    return turns if loss_on == "all_assistant" else turns[-1:]


def _mask(cut: Cut, pieces: list[list[int]], turns: list[int], turn_format: TurnFormat) -> Encoded | Unencodable:
    if not turns:
        return Unencodable("no assistant turn", "an answer to learn", "add the assistant's turn or remove the row")
    for turn in turns:
        if turn in cut.missed:
            fix = "use data.loss_on=last, or a base model whose template keeps earlier turns as they are"
            return Unencodable(f"turn {turn + 1}: {cut.missed[turn]}", "each prompt to be how its whole starts", fix)
    input_ids: list[int] = []
    labels: list[int] = []
    for piece, ids in zip(cut.pieces, pieces, strict=True):
        supervised = piece.turn in turns
        if supervised and (ids[-1] != turn_format.stop_id or ids.count(turn_format.stop_id) > 1):
            expected = "the stop token once, at the end of the answer"
            return Unencodable(
                f"the stop token {turn_format.stop} stands inside an answer", expected, "remove it there"
            )
        input_ids += ids
        labels += ids if supervised else [IGNORED_LABEL] * len(ids)
        if piece.turn == turns[-1]:
            break
    return Encoded(input_ids, labels)


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


def self_check(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, loss_on: LossOn) -> None:
    """Proves on ``examples`` that the mask is right, by decoding it and by rendering the prompts anew.

    Raises:
        BaseModelError: The supervised tokens do not decode to the answers and their stop tokens, or what comes before
            the last answer is not the prompt that generation would see.
    """
    turn_format = read_turn_format(tokenizer)
    conversations = [example.messages for example in examples]
    encodings = encode_batch(conversations, tokenizer, loss_on=loss_on)
    checked = [(e, m) for e, m in zip(encodings, conversations, strict=True) if isinstance(e, Encoded)]
    prompts = render_prompts([messages[: assistant_turns(messages)[-1]] for _, messages in checked], tokenizer)
    for (encoded, messages), prompt in zip(checked, prompts, strict=True):
        answers = [messages[turn].content for turn in _supervised_turns(messages, loss_on)]
        wanted = "".join(answer + turn_format.stop for answer in answers)
        supervised = [label for label in encoded.labels if label != IGNORED_LABEL]
        found = tokenizer.decode(supervised, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # Some templates strip the answer and some tokenizers normalise it: both are the text that generation produces.
        if _without_space(found) != _without_space(wanted):
            raise _broken_mask(f"decodes to {found!r}", repr(wanted))
        last = encoded.input_ids[: len(prompt)] == prompt and encoded.labels[len(prompt)] != IGNORED_LABEL
        if not last or IGNORED_LABEL in encoded.labels[len(prompt) :]:
            raise _broken_mask("does not follow the prompt that generation sees", "the prompt's own tokens")


def _without_space(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _broken_mask(what: str, expected: str) -> BaseModelError:
    fix = "report it with the base model's name; another base model's tokenizer may do"
    return BaseModelError(f"what this tokenizer would supervise {what}", expected=expected, fix=fix)
