"""The one place where conversations become text and token ids: prompts for training, generation and serving alike.

Text is cut at the edges of assistant turns and each piece is tokenised by itself, so no token straddles an edge: the
ids of a prompt do not depend on the answer that follows, and an answer's ids are those that generation has to produce.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from qlora_kit.conversation import Message
from qlora_kit.data.tool_rendering import (
    PROBE_RESULT,
    PROBE_TOOL,
    TOOL_PROBE,
    missing_from_turn,
    plain_message,
)
from qlora_kit.errors import BaseModelError, DataError
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Passed to every template, which ignores what it does not know. A prompt then never depends on the day it is rendered
# (Llama 3.x), and a reasoning model's prompt ends with the empty thought that its plain answers are trained behind.
TEMPLATE_ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}

# Tokenizers of the SentencePiece kind have no token that a line break is only a part of, so text may be cut behind one.
LINE_BREAK = "\n"
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


def render_texts(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    for_generation: bool,
    tools: Sequence[Sequence[str]] | None = None,
) -> list[str]:
    """Renders conversations by the tokenizer's chat template.

    Args:
        conversations: Messages of each conversation.
        tokenizer: A tokenizer with a chat template.
        for_generation: Whether the text ends with the opening of an assistant turn.
        tools: The tools of each conversation (``Example.tools``); None for none.

    Raises:
        BaseModelError: The tokenizer has no chat template.
        DataError: The template itself refuses a conversation (some take no system message).
    """
    if not conversations:
        return []
    if tokenizer.chat_template is None:
        raise BaseModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template",
            expected="a base model whose tokenizer carries one (an instruction-tuned model)",
            fix="use the -Instruct variant of the base model",
        )
    groups: dict[tuple[str, ...], list[int]] = {}  # one call of the template for all that share their tools
    for index in range(len(conversations)):
        groups.setdefault(() if tools is None else tuple(tools[index]), []).append(index)
    texts = [""] * len(conversations)
    for schemas, indices in groups.items():
        plain = [[plain_message(message) for message in conversations[index]] for index in indices]
        for index, text in zip(indices, _apply_template(plain, schemas, tokenizer, for_generation), strict=True):
            texts[index] = text
    return texts


def _apply_template(
    plain: list[list[dict[str, Any]]],
    schemas: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    for_generation: bool,
) -> list[str]:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            plain,
            tools=[json.loads(schema) for schema in schemas] or None,
            tokenize=False,
            add_generation_prompt=for_generation,
            **TEMPLATE_ARGUMENTS,
        )
    except (jinja2.TemplateError, TypeError) as error:  # a template that adds text to what is no text raises TypeError
        raise DataError(
            f"the chat template refuses a conversation: {error}",
            expected="a conversation that the base model's template can render",
            fix="leave out what it refuses (a system message, a role, several tool calls in a turn), or remove the row",
        ) from error


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


def require_tool_support(tokenizer: PreTrainedTokenizerBase) -> None:
    """Proves on a probe conversation that the chat template renders tools, calls and results.

    Raises:
        BaseModelError: It leaves one of them out, as templates do that do not know tools.
    """
    try:
        prompt, whole = (
            render_texts([TOOL_PROBE[:turns]], tokenizer, for_generation=turns == 1, tools=[[PROBE_TOOL]])[0]
            for turns in (1, len(TOOL_PROBE))
        )
    except DataError as error:
        missing = error.faults[0].what
    else:
        in_text = {
            "the tools": "probe_tool" in prompt and "probe_argument" in prompt,
            "the tool calls": missing_from_turn(whole[len(prompt) :], TOOL_PROBE[1]) is None,
            "the tools' results": PROBE_RESULT in whole,
        }
        missing = ", ".join(name for name, found in in_text.items() if not found)
        if not missing:
            return
        missing = f"it leaves out {missing}"
    raise BaseModelError(
        f"the chat template of {tokenizer.name_or_path or 'the base model'!r} does not know tools: {missing}",
        expected="a template that renders the column 'tools', tool_calls and tool turns",
        fix="use a base model that was trained for tool calling (Qwen2.5-Instruct is one), or remove these rows",
    )


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
