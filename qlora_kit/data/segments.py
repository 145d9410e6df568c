"""Renders conversations without the template engine where that provably gives the same text.

Most chat templates put literal text between the contents of the turns. The template's code is read first: where it does
more with a content than to join and print it, every conversation is left to the template. For each order of roles, the
literals are then read off one rendered conversation and tried on contents that templates are known to treat specially
(white space at the edges, thoughts, tags, braces). Beside that, the first conversation of each order and every
``SPOT_CHECK_ROWS``th one is rendered both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.conversation import Message
from qlora_kit.data.cutting import Cut, Piece, TurnFormat, cut_texts
from qlora_kit.data.rendering import render_texts
from qlora_kit.data.template_reading import only_joins_contents
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPOT_CHECK_ROWS = 256
_TRIALS = (
    " leading",
    "trailing ",
    "\n\nlines\n between\n\n",
    "\t x \t",
    "x",
    "0",
    "None",
    "</think>answer",
    "<think>a</think>b",
    "<think>\n\n</think>\n\nc",
    "<tool_call>\n{}\n</tool_call>",
    "<tool_response>r</tool_response>",
    "[INST] i [/INST]",
    "<<SYS>>s<</SYS>>",
    "{{ braces }} {% block %} {# note #}",
    '{"json": ["a", 1]}',
    "'single' \"double\" `back` \\ slash",
    "<br>&amp;<b>bold</b>",
    "é 漢字 🙂 \u00a0 end",
    "system user assistant",
    "/no_think x /no_think",
    "/think",
    "### Instruction:\n### Response:",
    "word " * 400 + "end",
)


class ContentChangesTemplate(Exception):
    """A conversation that the template renders otherwise than its literals say: fast rendering cannot be used."""


class SegmentRenderer:
    """Cuts conversations as ``data.chat`` does, by literals wherever they were proven to give the same.

    Args:
        tokenizer: A tokenizer with a chat template.
        turn_format: Of this tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turn_format: TurnFormat) -> None:
        self._tokenizer = tokenizer
        self.turn_format = turn_format
        # Roles -> for each piece its turn, and its literals with the indices of the messages between them.
        self._segments: dict[tuple[str, ...], tuple[tuple[int | None, tuple[str | int, ...]], ...] | None] = {}
        self._rows = 0
        self._joins = isinstance(tokenizer.chat_template, str) and only_joins_contents(tokenizer.chat_template)

    def cut(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Sequence[str]]) -> list[Cut]:
        """The conversations in pieces, in their order.

        Args:
            conversations: Messages of each conversation.
            tools: The tools of each (``Example.tools``); where there are any, the template renders it.

        Raises:
            ContentChangesTemplate: A spot check failed; cut all conversations of the run by ``data.chat`` instead.
            DataError: The template itself refuses a conversation.
        """
        cuts: list[Cut | None] = []
        for messages, own in zip(conversations, tools, strict=True):
            plain = self._joins and not own and all(_is_plain(message) for message in messages)
            known = tuple(message.role for message in messages) in self._segments
            cut = self._assembled(messages) if plain else None
            self._rows += 1
            checked = not known or self._rows % SPOT_CHECK_ROWS == 0
            if cut is not None and checked and cut != self._rendered([messages], [()])[0]:
                raise ContentChangesTemplate
            cuts.append(cut)
        slow = [index for index, cut in enumerate(cuts) if cut is None]
        rendered = iter(self._rendered([conversations[index] for index in slow], [tools[index] for index in slow]))
        return [next(rendered) if cut is None else cut for cut in cuts]

    def _rendered(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Sequence[str]]) -> list[Cut]:
        texts = render_texts(conversations, self._tokenizer, for_generation=False, tools=tools)
        return cut_texts(texts, conversations, self._tokenizer, self.turn_format, tools=tools)

    def _assembled(self, messages: Sequence[Message]) -> Cut | None:
        roles = tuple(message.role for message in messages)
        if roles not in self._segments:
            self._segments[roles] = self._proven(roles)
        segments = self._segments[roles]
        if segments is None:
            return None
        contents = [message.content for message in messages]
        pieces = [
            Piece("".join([part if isinstance(part, str) else contents[part] for part in parts]), turn)
            for turn, parts in segments
        ]
        return Cut(tuple(pieces), {})

    def _proven(self, roles: tuple[str, ...]) -> tuple[tuple[int | None, tuple[str | int, ...]], ...] | None:
        """The literals of conversations with these roles; None where the template does more than to join them."""
        try:
            segments = self._read_off(roles)
            if segments is None:
                return None
            self._segments[roles] = segments
            trials = [
                [Message(role, _TRIALS[(start + index) % len(_TRIALS)]) for index, role in enumerate(roles)]
                for start in range(len(_TRIALS))
            ]
            agree = [self._assembled(trial) for trial in trials] == self._rendered(trials, [()] * len(trials))
        except DataError:  # the template refuses these roles, or a trial: the template is asked for each row
            return None
        return segments if agree else None

    def _read_off(self, roles: tuple[str, ...]) -> tuple[tuple[int | None, tuple[str | int, ...]], ...] | None:
        marks = {f"Qz{index}Xw{index}Qz": index for index in range(len(roles))}
        cut = self._rendered([[Message(role, mark) for role, mark in zip(roles, marks, strict=True)]], [()])[0]
        if cut.missed:
            return None
        return tuple((piece.turn, _parts(piece.text, marks)) for piece in cut.pieces)


def _is_plain(message: Message) -> bool:
    """Whether a turn has nothing but its text; the keys of tools are rendered by the template alone."""
    return not message.tool_calls and message.name is None and message.tool_call_id is None


def _parts(text: str, marks: dict[str, int]) -> tuple[str | int, ...]:
    """``text`` cut at the marks: literals, and the number of each mark."""
    parts: list[str | int] = []
    while text:
        found = [(text.index(mark), mark) for mark in marks if mark in text]
        if not found:
            parts.append(text)
            break
        position, mark = min(found)
        parts += [text[:position]] if position else []
        parts.append(marks[mark])
        text = text[position + len(mark) :]
    return tuple(parts)
