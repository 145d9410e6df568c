"""What a tokenizer's chat template means: prompts as token ids, where answers end, its own system prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from qlora_kit.conversation import Message
from qlora_kit.data.cutting import LINE_BREAK, TurnFormat, cut_texts, tokenize_cuts
from qlora_kit.data.rendering import render_texts
from qlora_kit.errors import BaseModelError, DataError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_ANSWER = "The answer"


STOP_PROBE = (Message("user", "Question?"), Message("assistant", PROBE_ANSWER))


PROBES: tuple[tuple[bool, tuple[Message, ...]], ...] = (
    (True, (Message("user", "Question?"),)),
    (True, (Message("system", "Rules."), Message("user", "Question?"))),
    (False, (Message("user", "Question?"), Message("assistant", PROBE_ANSWER))),
    (False, (Message("system", "Rules."), Message("user", " Q\n"), Message("assistant", f"\n{PROBE_ANSWER} "))),
    (True, (Message("user", "One?"), Message("assistant", "1"), Message("user", "Two?"))),
    (False, (Message("user", "A"), Message("assistant", "1"), Message("user", "B"), Message("assistant", "2"))),
)


def render_prompts(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Sequence[str]] | None = None,
) -> list[list[int]]:
    """Token ids of each conversation followed by the opening of an assistant turn, without a second BOS.

    Args:
        conversations: Messages of each conversation.
        tokenizer: A tokenizer with a chat template.
        tools: The tools of each conversation (``Example.tools``); None for none.
    """
    turn_format = read_turn_format(tokenizer)
    texts = render_texts(conversations, tokenizer, for_generation=True, tools=tools)
    cuts = cut_texts(texts, conversations, tokenizer, turn_format, tools=tools)
    return [list(chain.from_iterable(pieces)) for pieces in tokenize_cuts(cuts, tokenizer, turn_format)]


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of ``messages`` followed by the opening of an assistant turn: the prompt as it was trained.

    Raises:
        BaseModelError: The tokenizer has no usable chat template.
        DataError: The template refuses the conversation.
    """
    return render_prompts([messages], tokenizer)[0]


def prompt_length_fault(tokens: int, positions: int) -> Fault | None:
    """Why a base of so many ``positions`` cannot answer a prompt of ``tokens``; None if it can."""
    if tokens < positions:
        return None
    expected = f"less than the base's {positions} positions, with room for an answer"
    return Fault(f"the prompt is {tokens} tokens long", expected, "shorten the conversation")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end an assistant turn by the chat template, found on a probe conversation.

    Raises:
        BaseModelError: The template ends turns with nothing, or with plain text.
    """
    return (read_turn_format(tokenizer).stop_id,)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The strings that the tokenizer would turn into control tokens wherever they stand in a text."""
    return tuple(sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special))


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what the template renders for fixed probe conversations; equal for templates that behave alike there."""
    texts: list[str | None] = []
    for for_generation, messages in PROBES:
        try:
            texts += render_texts([messages], tokenizer, for_generation=for_generation)
        except DataError:
            texts.append(None)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def template_system_prompt(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The system prompt that the chat template itself adds to a conversation without one (Qwen2.5's does); else None.

    A conversation with this text as its system turn renders exactly as one without any.
    """
    mark, user = "Qz0Xw0Qz", Message("user", "Question?")
    try:
        plain, marked = (
            render_texts([turns], tokenizer, for_generation=True)[0]
            for turns in ([user], [Message("system", mark), user])
        )
        before, _, after = marked.partition(mark)
        if not after or not plain.startswith(before) or not plain.endswith(after):
            return None
        own = plain[len(before) : len(plain) - len(after)]
        same = (
            own.strip() and render_texts([[Message("system", own), user]], tokenizer, for_generation=True)[0] == plain
        )
    except DataError:  # the template refuses system turns
        return None
    return own if same else None


def read_turn_format(tokenizer: PreTrainedTokenizerBase) -> TurnFormat:
    """Finds the stop token, and how to cut text, by rendering and tokenising a probe conversation.

    Raises:
        BaseModelError: No control token ends an assistant turn, or text cannot be cut at the edges of turns.
    """
    text = render_texts([STOP_PROBE], tokenizer, for_generation=False)[0]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stop = stop_at_turn_end(text, [token.content for token in tokenizer.added_tokens_decoder.values()])
    if stop is None:
        raise BaseModelError(
            f"the chat template ends an assistant turn with {_after_answer(text)!r}",
            expected="a control token of the tokenizer, so that generation can stop there",
            fix="use the -Instruct variant of the base model, or one with another chat template",
        )
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    for anchors in (("", ""), (stop, stop), (stop, LINE_BREAK)):
        turn_format = TurnFormat(stop, stop_id, *anchors)
        cuts = cut_texts([text], [STOP_PROBE], tokenizer, turn_format)
        pieces = tokenize_cuts(cuts, tokenizer, turn_format)[0]
        if not cuts[0].missed and list(chain.from_iterable(pieces)) == ids:
            return turn_format
    raise BaseModelError(
        "the tokenizer merges the end of a prompt and the start of its answer into one token",
        expected="a chat template whose prompts end on a token boundary",
        fix="use another base model",
    )


def stop_at_turn_end(text: str, control_tokens: Iterable[str]) -> str | None:
    """The longest of ``control_tokens`` behind the answer of a rendered ``STOP_PROBE``; None where there is none."""
    ending = _after_answer(text)
    return max((token for token in control_tokens if ending.startswith(token)), key=len, default=None)


def _after_answer(text: str) -> str:
    return text[text.rindex(PROBE_ANSWER) + len(PROBE_ANSWER) :].lstrip()
