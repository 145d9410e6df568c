"""Turns checked examples into token ids and labels: supervised are exactly the answers and their stop tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
from qlora_kit.errors import BaseModelError, DataError
from qlora_kit.formats import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LossOn = Literal["all_assistant", "last"]

IGNORED_LABEL = -100


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
