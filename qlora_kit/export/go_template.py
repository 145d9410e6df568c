"""A chat template as Ollama's Go template: what it renders for probe conversations in, the same turns as Go text out.

The pieces around each turn are found by rendering marked conversations, and the pieces put together again must equal
what the chat template renders for others; a template that is not made of such pieces is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_kit.conversation import Message
from qlora_kit.data.rendering import render_texts
from qlora_kit.errors import BaseModelError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ANSWER, _SECOND = "Qz0Sx", "Qz1Ux", "Qz2Ax", "Qz3Vx"
_BRACE_OR_QUOTES = re.compile(r'\{+|"{3,}')
_ODD_TEXT = "Line one,\nline {{ .two }} \"three\" 'four' <b> & é 中文 🙂"
_TURNS = ("Question?", "1", _ODD_TEXT, _ODD_TEXT, "C?")
_KEPT = "\n\r\t"


@dataclass(frozen=True)
class TurnTexts:
    """The texts that a chat template puts around turns.

    Attributes:
        opening: Before the first turn of a conversation without a system prompt.
        system: Before and after a system prompt; None where the template takes none.
        joined: Whether these two hold the opening of the first user turn already: some templates put the system prompt
            inside that turn.
        user: Before and after a user turn.
        assistant: Before and after an answer that a turn follows.
        generation: Behind a conversation that is to be answered.
        strips: Whether the template removes white space at the ends of a turn, which a Go template cannot.
    """

    opening: str
    system: tuple[str, str] | None
    joined: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    strips: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation that ends with a user turn: what the Go template renders."""
        rest = list(messages)
        text, first = self.opening, self.joined
        if rest[0].role == "system" and self.system is not None:
            text = rest.pop(0).content.join(self.system)
        for message in rest:
            before, after = self.user if message.role == "user" else self.assistant
            text += ("" if first else before) + message.content + after
            first = False
        return text + self.generation

    def with_own_system(self, prompt: str) -> TurnTexts:
        """The same, with ``prompt`` in every conversation that brings no system prompt of its own."""
        if self.system is None:
            raise ValueError("the template takes no system prompt")
        return replace(self, opening=prompt.join(self.system))


def read_turn_texts(tokenizer: PreTrainedTokenizerBase) -> TurnTexts:
    """Find the texts around turns, and prove them on other conversations.

    Raises:
        BaseModelError: The template renders turns in a way that these texts cannot say.
    """
    try:
        texts = _marked(tokenizer)
        wrong = [check for check in _checks(texts) if texts.render(check) != _prompt(check, tokenizer)]
    except (DataError, ValueError) as error:
        raise _not_sayable(str(error)) from error
    if wrong:
        raise _not_sayable(f"{len(wrong)} of {len(_checks(texts))} probe conversations are rendered otherwise")
    spaced = (Message("user", "\n Question? \n"),)
    return replace(texts, strips=texts.render(spaced) != _prompt(spaced, tokenizer))


def go_template(texts: TurnTexts) -> str:
    """The Go template for Ollama's ``TEMPLATE``.

    Ollama joins turns of one role that follow each other, and hands all system turns over as ``.System``. An answer at
    the end stays open, to be gone on from.
    """
    head = _literal(texts.opening)
    if texts.system is not None:
        before, after = map(_literal, texts.system)
        head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{head}{{{{ end }}}}"
    user, answer = tuple(map(_literal, texts.user)), tuple(map(_literal, texts.assistant))
    opening = user[0]
    if texts.joined:
        head += "{{ $first := true }}"
        opening = f"{{{{ if $first }}}}{{{{ $first = false }}}}{{{{ else }}}}{opening}{{{{ end }}}}"
    is_last = "eq (len (slice $.Messages $i)) 1"
    return (
        f'{head}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role "user" }}}}{opening}{{{{ .Content }}}}{user[1]}'
        f"{{{{ if {is_last} }}}}{_literal(texts.generation)}{{{{ end }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{answer[0]}{{{{ .Content }}}}'
        f"{{{{ if not ({is_last}) }}}}{answer[1]}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )


def is_kept(text: str) -> bool:
    """Whether Ollama's parser of Modelfiles keeps every character: it drops what cannot be printed, in silence."""
    return all(character.isprintable() or character in _KEPT for character in text)


def _marked(tokenizer: PreTrainedTokenizerBase) -> TurnTexts:
    user, answer, second = Message("user", _USER), Message("assistant", _ANSWER), Message("user", _SECOND)
    whole, asked, answered, long = (
        render_texts([turns], tokenizer, for_generation=generating)[0]
        for turns, generating in (
            ((user,), False),
            ((user,), True),
            ((user, answer), False),
            ((user, answer, second), False),
        )
    )
    head, user_close = _split(whole, _USER)
    generation = _without_start(asked, whole)
    answer_close = _split(answered, _ANSWER)[1]
    first, rest = _split(long, _USER)
    between, rest = _split(rest, _ANSWER)
    following, last_close = _split(rest, _SECOND)
    if first != head or last_close != user_close:
        raise ValueError("it renders a turn otherwise when others follow it")
    answer_open = _without_start(between, user_close)
    user_open = _without_start(following, answer_close)
    if not head.endswith(user_open):
        raise ValueError("it opens the first user turn otherwise than the next one")
    system, joined = _system_texts(tokenizer, user_open, user_close)
    opening = head if joined else head[: len(head) - len(user_open)]
    return TurnTexts(opening, system, joined, (user_open, user_close), (answer_open, answer_close), generation)


def _system_texts(
    tokenizer: PreTrainedTokenizerBase, user_open: str, user_close: str
) -> tuple[tuple[str, str] | None, bool]:
    """What stands around a system prompt, and whether it lies inside the first user turn."""
    turns = (Message("system", _SYSTEM), Message("user", _USER))
    try:
        text = render_texts([turns], tokenizer, for_generation=False)[0]
    except DataError:  # the template refuses system prompts
        return None, False
    if _SYSTEM not in text:
        raise ValueError("it leaves a system prompt out")
    before, rest = _split(text, _SYSTEM)
    after, close = _split(rest, _USER)
    if close != user_close:
        raise ValueError("it ends a user turn otherwise behind a system prompt")
    if after.endswith(user_open):
        return (before, after[: len(after) - len(user_open)]), False
    return (before, after), True


def _checks(texts: TurnTexts) -> list[tuple[Message, ...]]:
    """Conversations of one, two and three questions, each with a system prompt too where there can be one."""
    turns = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(_TURNS)]
    plain = [tuple(turns[: count + 1]) for count in (0, 2, 4)]
    if texts.system is None:
        return plain
    return [*plain, *((Message("system", f"Rules.\n{_ODD_TEXT}"), *check) for check in plain)]


def _prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    return render_texts([messages], tokenizer, for_generation=True)[0]


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError("it renders the text of a turn more than once, or not at all")
    before, _, after = text.partition(mark)
    return before, after


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError("it closes a turn otherwise when another one follows")
    return text.removeprefix(start)


def _not_sayable(reason: str) -> BaseModelError:
    return BaseModelError(
        f"the chat template cannot be written as one of Ollama's: {reason}",
        expected="a template that puts fixed texts around each turn (ChatML, Llama, Mistral and their like)",
        fix="export --to gguf and write a Modelfile by hand, or serve the model with a program that renders the chat "
        "template itself (`qlora-kit serve`, vLLM, llama.cpp's server)",
    )


def _literal(text: str) -> str:
    """``text`` as it must stand in a template inside a Modelfile: what either would read otherwise becomes a string."""
    text = _BRACE_OR_QUOTES.sub(lambda found: _go_string(found[0]), text)
    return "".join(character if is_kept(character) else _go_string(character) for character in text)


def _go_string(text: str) -> str:
    """An action that prints ``text``."""
    quoted = "".join(f"\\{c}" if c in '"\\' else c if is_kept(c) else f"\\U{ord(c):08x}" for c in text)
    return f'{{{{ "{quoted}" }}}}'
