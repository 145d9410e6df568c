"""Cuts rendered conversations at the edges of assistant turns, and tokenises each piece by itself.

So no token straddles an edge: the ids of a prompt do not depend on the answer that follows, and an answer's ids are
those that generation has to produce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.conversation import Message
from qlora_kit.data.rendering import render_texts
from qlora_kit.data.tool_rendering import missing_from_turn
from qlora_kit.errors import BaseModelError
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers of the SentencePiece kind have no token that a line break is only a part of, so text may be cut behind one.
LINE_BREAK = "\n"


@dataclass(frozen=True)
class TurnFormat:
    """How a tokenizer's template ends an assistant turn, and how its text may be cut into pieces.

    Attributes:
        stop: The text of the token that ends an assistant turn (``<|im_end|>``).
        stop_id: Its id.
        anchor: Text to tokenise what follows a turn behind (and then to drop), for tokenizers that mark the start of a
            text; empty where pieces need none.
        answer_anchor: The same for answers, which follow plain text.
    """

    stop: str
    stop_id: int
    anchor: str = ""
    answer_anchor: str = ""

    def anchor_of(self, index: int, piece: Piece) -> str:
        """What to tokenise the piece at ``index`` of a conversation behind."""
        if index == 0:
            return ""
        return self.anchor if piece.turn is None else self.answer_anchor


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation; ``turn`` is the index of the message whose answer and stop token it is."""

    text: str
    turn: int | None = None


@dataclass(frozen=True)
class Cut:
    """A rendered conversation in pieces.

    Attributes:
        pieces: Together they are the whole text.
        missed: Assistant turns that are not pieces of their own, by message index, with the reason.
    """

    pieces: tuple[Piece, ...]
    missed: dict[int, str]


def cut_texts(
    texts: Sequence[str],
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    turn_format: TurnFormat,
    *,
    tools: Sequence[Sequence[str]] | None = None,
) -> list[Cut]:
    """Cuts rendered conversations before each answer and behind its stop token.

    An answer is the assistant's text, or the tool calls as the template writes them. It starts where the prompt before
    it ends, as the template renders that prompt for generation. A turn whose prompt is not how the whole text starts
    (some templates rewrite earlier turns) stays uncut and is listed as missed.
    """
    turns = [(row, turn) for row, messages in enumerate(conversations) for turn in assistant_turns(messages) if turn]
    prompts = render_texts(
        [conversations[row][:turn] for row, turn in turns],
        tokenizer,
        for_generation=True,
        tools=None if tools is None else [tools[row] for row, _ in turns],
    )
    prompt_of = dict(zip(turns, prompts, strict=True))
    return [
        _cut_text(
            text, messages, {turn: prompt_of[row, turn] for turn in assistant_turns(messages) if turn}, turn_format
        )
        for row, (text, messages) in enumerate(zip(texts, conversations, strict=True))
    ]


def assistant_turns(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant messages."""
    return [index for index, message in enumerate(messages) if message.role == "assistant"]


def _cut_text(text: str, messages: Sequence[Message], prompts: dict[int, str], turn_format: TurnFormat) -> Cut:
    pieces: list[Piece] = []
    missed = {0: "the conversation starts with the answer"} if messages[0].role == "assistant" else {}
    position = 0
    for turn, prompt in prompts.items():
        if not text.startswith(prompt):
            missed[turn] = "the chat template renders the turns before this answer differently once it follows"
            continue
        end = _answer_end(text, len(prompt), messages[turn], turn_format.stop)
        if isinstance(end, str):
            missed[turn] = end
            continue
        pieces += [Piece(text[position : len(prompt)]), Piece(text[len(prompt) : end], turn)]
        position = end
    pieces.append(Piece(text[position:]))
    return Cut(tuple(piece for piece in pieces if piece.text), missed)


def _answer_end(text: str, start: int, message: Message, stop: str) -> int | str:
    """Where the stop token behind the answer ends, or why it is not found."""
    if message.tool_calls:
        return _calls_end(text, start, message, stop)
    for part in (message.content.strip(), stop):  # templates may add or strip white space around the answer
        start = start + len(text[start:]) - len(text[start:].lstrip())
        if not text.startswith(part, start):
            return "the chat template changes the answer's text"
        start += len(part)
    return start


def _calls_end(text: str, start: int, message: Message, stop: str) -> int | str:
    """As ``_answer_end`` for a turn of tool calls, which each template writes in a way of its own."""
    end = text.find(stop, start)
    if end < 0:
        return "the chat template ends the tool calls with another token than an answer"
    missing = missing_from_turn(text[start:end], message)
    return end + len(stop) if missing is None else f"the chat template leaves out {missing}"


def tokenize_cuts(
    cuts: Sequence[Cut], tokenizer: PreTrainedTokenizerBase, turn_format: TurnFormat
) -> list[list[list[int]]]:
    """Token ids of each piece of each cut, every piece tokenised by itself and nothing added.

    Raises:
        BaseModelError: The tokenizer merges an answer with the line break that it is tokenised behind.
    """
    pieces = [
        (turn_format.anchor_of(index, piece), piece.text) for cut in cuts for index, piece in enumerate(cut.pieces)
    ]
    if not pieces:
        return [[] for _ in cuts]
    anchors = sorted({anchor for anchor, _ in pieces} - {""})
    texts = [*anchors, *(anchor + text for anchor, text in pieces)]
    ids = iter(_ids_of(texts, tokenizer))
    anchor_ids = {"": [], **{anchor: next(ids) for anchor in anchors}}
    own_ids = iter([_behind(anchor_ids[anchor], next(ids), text) for anchor, text in pieces])
    return [[next(own_ids) for _ in cut.pieces] for cut in cuts]


def _behind(anchor_ids: list[int], ids: list[int], text: str) -> list[int]:
    if not anchor_ids:
        return ids
    if ids[: len(anchor_ids)] != anchor_ids:
        raise BaseModelError(
            f"the tokenizer merges the start of {shown(text)} with what stands before it",
            expected="answers that start on a token boundary",
            fix="use another base model",
        )
    return ids[len(anchor_ids) :]


def _ids_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, nothing added; asked of the Rust tokenizer itself where there is one: half the time."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
