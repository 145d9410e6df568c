"""Turns checked examples into token ids and labels: supervised are exactly the answers and their stop tokens.

Of a plain text everything is supervised, its closing EOS token too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from qlora_kit.conversation import Example, Message
from qlora_kit.data.chat import read_turn_format, render_prompts
from qlora_kit.data.cutting import Cut, TurnFormat, assistant_turns, cut_texts, tokenize_cuts
from qlora_kit.data.rendering import render_texts, require_tool_support
from qlora_kit.data.tool_rendering import missing_from_turn, uses_tools, without_space
from qlora_kit.errors import BaseModelError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.segments import SegmentRenderer

LossOn = Literal["all_assistant", "last"]

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Encoded:
    """One tokenised example, up to its last supervised token (what follows has no part in the loss).

    Attributes:
        input_ids: Token ids.  # (T,)
        labels: The same ids where supervised, else -100.  # (T,)
        source: Where the row stands (``file:line``).
    """

    input_ids: list[int]
    labels: list[int]
    source: str = ""

    @property
    def supervised_tokens(self) -> int:
        """How many tokens the loss sees."""
        return len(self.labels) - self.labels.count(IGNORED_LABEL)


@dataclass(frozen=True)
class Unencodable:
    """Why one example cannot be encoded."""

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


def encode_rows(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: LossOn,
    renderer: SegmentRenderer | None = None,
) -> list[Encoded | Unencodable]:
    """Token ids and labels of conversations and plain texts, in their order, in a few calls of the tokenizer.

    Args:
        examples: Checked rows.
        tokenizer: The base's.
        loss_on: Supervise all assistant turns, or the last one only.
        renderer: Renders in place of the template, where that is proven to be the same.

    Raises:
        BaseModelError: The tokenizer has no usable chat template, one that does not know the tools that a conversation
            uses, or no EOS token to end a plain text with.
    """
    talks = [example for example in examples if example.text is None]
    encoded_talks = iter(
        encode_batch(
            [example.messages for example in talks],
            tokenizer,
            loss_on=loss_on,
            tools=[example.tools for example in talks],
            renderer=renderer,
        )
        if talks
        else ()
    )
    encoded_texts = iter(encode_texts([example.text for example in examples if example.text is not None], tokenizer))
    return [next(encoded_talks) if example.text is None else next(encoded_texts) for example in examples]


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Token ids and labels of plain texts: the tokenizer's own BOS, if it adds one, the text, and one EOS token.

    All tokens are supervised but the first, which nothing predicts.

    Raises:
        BaseModelError: The tokenizer has no EOS token.
    """
    if not texts:
        return []
    eos = tokenizer.eos_token_id
    if eos is None:
        raise BaseModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token",
            expected="one, which ends each plain text",
            fix="use another base model",
        )
    rows = []
    for ids in tokenizer(list(texts), return_attention_mask=False)["input_ids"]:
        whole = ids if ids[-1:] == [eos] else [*ids, eos]
        rows.append(Encoded(whole, [IGNORED_LABEL, *whole[1:]]))
    return rows


def encode_batch(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    loss_on: LossOn,
    tools: Sequence[Sequence[str]] | None = None,
    renderer: SegmentRenderer | None = None,
) -> list[Encoded | Unencodable]:
    """As ``encode_conversation`` for many conversations in a few calls of the template and the tokenizer.

    Args:
        conversations: Messages of each conversation.
        tokenizer: The base's.
        loss_on: Supervise all assistant turns, or the last one only.
        tools: The tools of each conversation (``Example.tools``); None for none.
        renderer: As of ``encode_rows``.

    Raises:
        BaseModelError: The tokenizer has no usable chat template, or one that does not know tools where rows use them.
    """
    turn_format = read_turn_format(tokenizer) if renderer is None else renderer.turn_format
    schemas: Sequence[Sequence[str]] = [()] * len(conversations) if tools is None else tools
    if any(uses_tools(messages, own) for messages, own in zip(conversations, schemas, strict=True)):
        require_tool_support(tokenizer)
    try:
        if renderer is None:
            texts = render_texts(conversations, tokenizer, for_generation=False, tools=schemas)
            cuts = cut_texts(texts, conversations, tokenizer, turn_format, tools=schemas)
        else:
            cuts = renderer.cut(conversations, schemas)
    except DataError as error:
        if len(conversations) > 1:  # find the row that the template refuses
            return [
                encode_batch([messages], tokenizer, loss_on=loss_on, tools=[own])[0]
                for messages, own in zip(conversations, schemas, strict=True)
            ]
        fault = error.faults[0]
        return [Unencodable(fault.what, fault.expected, fault.fix)]
    cuts = [_up_to_last_answer(cut) for cut in cuts]
    ids = tokenize_cuts(cuts, tokenizer, turn_format)
    return [
        _mask(cut, pieces, _supervised_turns(messages, loss_on), turn_format)
        for messages, cut, pieces in zip(conversations, cuts, ids, strict=True)
    ]


def _supervised_turns(messages: Sequence[Message], loss_on: LossOn) -> list[int]:
    turns = assistant_turns(messages)
    return turns if loss_on == "all_assistant" else turns[-1:]


def _up_to_last_answer(cut: Cut) -> Cut:
    """Without what follows the last answer, which has no part in the loss."""
    pieces = cut.pieces
    while pieces and pieces[-1].turn is None:
        pieces = pieces[:-1]
    return Cut(pieces, cut.missed)


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

    The template writes tool calls in a way of its own: there the names and values of the calls must decode.

    Raises:
        BaseModelError: The supervised tokens do not decode to the answers and their stop tokens, or what comes before
            the last answer is not the prompt that generation would see.
    """
    stop = read_turn_format(tokenizer).stop  # for plain texts too: the contract that training writes needs it
    encodings = encode_rows(examples, tokenizer, loss_on=loss_on)
    checked = [(row, example) for row, example in zip(encodings, examples, strict=True) if isinstance(row, Encoded)]
    talks = [(row, example) for row, example in checked if example.text is None]
    for row, example in checked:
        if example.text is not None:
            bos = tokenizer.bos_token if row.input_ids[0] == tokenizer.bos_token_id else ""
            _check_decoded(row.input_ids, bos + example.text, tokenizer.eos_token, tokenizer)
    prompts = render_prompts(
        [example.messages[: assistant_turns(example.messages)[-1]] for _, example in talks],
        tokenizer,
        tools=[example.tools for _, example in talks],
    )
    for (encoded, example), prompt in zip(talks, prompts, strict=True):
        turns = [example.messages[turn] for turn in _supervised_turns(example.messages, loss_on)]
        answers = _supervised_runs(encoded)
        if len(answers) != len(turns):
            raise _broken_mask(f"is {len(answers)} stretches of tokens", f"one for each of the {len(turns)} answers")
        for ids, message in zip(answers, turns, strict=True):
            if message.tool_calls:
                _check_call(ids, message, stop, tokenizer)
            else:
                _check_decoded(ids, message.content, stop, tokenizer)
        last = encoded.input_ids[: len(prompt)] == prompt and encoded.labels[len(prompt)] != IGNORED_LABEL
        if not last or IGNORED_LABEL in encoded.labels[len(prompt) :]:
            raise _broken_mask("does not follow the prompt that generation sees", "the prompt's own tokens")


def _supervised_runs(encoded: Encoded) -> list[list[int]]:
    """The stretches of supervised tokens, one for each answer."""
    return [
        list(run) for supervised, run in groupby(encoded.labels, key=lambda label: label != IGNORED_LABEL) if supervised
    ]


def _check_decoded(ids: list[int], text: str, stop: str, tokenizer: PreTrainedTokenizerBase) -> None:
    found = _decode(ids, tokenizer)
    if without_space(found) != without_space(text + stop):
        raise _broken_mask(f"decodes to {found!r}", repr(text + stop))


def _check_call(ids: list[int], message: Message, stop: str, tokenizer: PreTrainedTokenizerBase) -> None:
    found = _decode(ids, tokenizer)
    missing = missing_from_turn(found, message)
    if missing is not None or not found.endswith(stop):
        raise _broken_mask(f"decodes to {found!r}", f"the tool calls and {stop}" if missing is None else missing)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _broken_mask(what: str, expected: str) -> BaseModelError:
    fix = "report it with the base model's name; another base model's tokenizer may do"
    return BaseModelError(f"what this tokenizer would supervise {what}", expected=expected, fix=fix)
