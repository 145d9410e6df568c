"""What a person types in a chat: a line in, a command with its arguments or a text for the model out."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from qlora_kit.errors import ConfigError
from qlora_kit.suggest import nearest


@dataclass(frozen=True)
class CommandKind:
    """One command of the chat.

    Attributes:
        arguments: How its arguments are written in the help.
        meaning: What it does.
        least: Fewest arguments.
        most: Most arguments; None for any number.
        whole: Whether everything after the name is one argument, spaces and all.
    """

    arguments: str
    meaning: str
    least: int = 0
    most: int | None = 0
    whole: bool = False


COMMANDS = {
    "adapter": CommandKind("NAME", "answer with an adapter; also NAME:0.5, or A:0.7+B:0.3", least=1, most=1),
    "base": CommandKind("", "answer with the base alone"),
    "adapters": CommandKind("", "the adapters of the store"),
    "compare": CommandKind("A B", "answer the last question with each; `base` is the base", least=2, most=None),
    "system": CommandKind("[TEXT]", "set the system prompt; without text, the adapter's own", most=1, whole=True),
    "clear": CommandKind("", "forget the conversation"),
    "undo": CommandKind("", "forget the last question and its answer"),
    "save": CommandKind("FILE", "add the conversation to a JSONL file, as a row of data", least=1, most=1),
    "help": CommandKind("", "this list"),
    "quit": CommandKind("", "end; so does Ctrl-D"),
}
_SYNONYMS = {"exit": "quit", "bye": "quit", "q": "quit", "?": "help", "h": "help", "reset": "clear"}


@dataclass(frozen=True)
class Command:
    """One command as it was typed: a key of ``COMMANDS`` and its arguments."""

    name: str
    arguments: tuple[str, ...] = ()


def parse_line(line: str) -> Command | str:
    """A command, or the text for the model; ``//`` at the beginning stands for a text that begins with ``/``.

    Raises:
        ConfigError: An unknown command, or one with too few or too many arguments.
    """
    text = line.strip()
    if text.startswith("//"):
        return text[1:]
    if not text.startswith("/"):
        return text
    word, _, rest = text[1:].partition(" ")
    name = _SYNONYMS.get(word.lower(), word.lower())
    kind = COMMANDS.get(name)
    if kind is None:
        match = nearest(word, COMMANDS)
        raise ConfigError(
            f"/{word} is no command",
            expected=", ".join(f"/{known}" for known in COMMANDS),
            fix="/help explains them; a text that begins with / is typed with //"
            if match is None
            else f"did you mean /{match}?",
        )
    return Command(name, _arguments(name, kind, rest.strip()))


def help_lines() -> list[tuple[str, str]]:
    """Each command with its arguments, and what it does."""
    return [(f"/{name} {kind.arguments}".rstrip(), kind.meaning) for name, kind in COMMANDS.items()]


def _arguments(name: str, kind: CommandKind, rest: str) -> tuple[str, ...]:
    if kind.whole:
        return (rest,) if rest else ()
    try:
        arguments = tuple(shlex.split(rest))
    except ValueError as error:  # a quotation mark that is not closed
        raise ConfigError(
            f"/{name} {rest}: {error}", expected=f"/{name} {kind.arguments}".rstrip(), fix="close the quotation mark"
        ) from None
    if len(arguments) < kind.least or (kind.most is not None and len(arguments) > kind.most):
        raise ConfigError(
            f"/{name} got {len(arguments)} arguments",
            expected=f"/{name} {kind.arguments}".rstrip(),
            fix=f"it is to {kind.meaning}" if name != "help" else "leave them out",
        )
    return arguments
