"""What one example of the data is, a conversation or a plain text, and the checks that hold for all of them.

How a record becomes one is said in ``formats``.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from qlora_kit.errors import Fault
from qlora_kit.suggest import advice

MAX_ROW_BYTES = 1 << 20
_NOT_TEXT = re.compile("[\ud800-\udfff\0]")
_KINDS = {
    str: "text",
    bool: "true/false",
    int: "a number",
    float: "a number",
    Decimal: "a decimal number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    bytes: "raw bytes",
    datetime.date: "a date",
    datetime.datetime: "a date with time",
    datetime.time: "a time",
    datetime.timedelta: "a duration",
}


@dataclass(frozen=True)
class ToolCall:
    """One call of a function, written by the assistant.

    Attributes:
        name: The function's name.
        arguments: A JSON object as text, its keys in the order of the data.
        id: What the result refers to, where the data says it; some templates render it.
    """

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: Its text; may be empty beside tool calls and as a tool's result.
        tool_calls: The calls that an assistant turn makes.
        name: The function whose result a tool turn is, where the data says it.
        tool_call_id: The call whose result a tool turn is, where the data says it.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Example:
    """One example of the data: a conversation, or a plain text.

    Attributes:
        messages: All turns, the last of them the assistant's; empty for a plain text.
        extra: What scoring needs beside the conversation (``tests`` of a code row).
        source: Where it stands, ``file:line``.
        tools: The functions that the assistant may call, each as OpenAI's JSON schema in text.
        text: The plain text, which is learned as a whole; None for a conversation.
        system_added: Whether the first turn is the task's system prompt, put before the row's own turns.
    """

    messages: tuple[Message, ...]
    extra: dict[str, Any]
    source: str
    tools: tuple[str, ...] = ()
    text: str | None = None
    system_added: bool = False


class DataFault(ValueError):
    """One record, or the columns of all, cannot be used; the three parts, without the file (the caller knows it).

    ``line`` is where the columns of all go wrong, if one line shows it.
    """

    def __init__(self, what: str, *, expected: str, fix: str, line: int | None = None) -> None:
        self.what, self.expected, self.fix, self.line = what, expected, fix, line
        super().__init__(f"{what}\n  expected: {expected}\n  do: {fix}")


def kind_of(value: object) -> str:
    """A value's kind in words, for messages."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


# Which roles may stand before each role; None is the start of the conversation.
_BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def check_order(messages: Sequence[Message]) -> None:
    """Roles follow each other as in a conversation, and results of tools follow calls.

    A conversation without any tool call may still hold tool turns: there the calls are written in the text.

    Raises:
        DataFault: A turn stands where its role cannot, or the last turn is not the assistant's.
    """
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        if before not in _BEFORE[message.role]:
            place = "at the start" if before is None else f"after {before}"
            expected = "an optional system turn, then user and assistant in turn"
            if message.role == "tool":
                expected = "a tool turn behind the assistant turn that calls it"
            raise DataFault(
                f"turn {number}: {message.role} stands {place}",
                expected=expected,
                fix="correct the order of the turns, or remove the row",
            )
        before = message.role
    if before != "assistant":
        raise DataFault(
            f"the last turn is {before}",
            expected="an assistant turn at the end",
            fix="add the answer, or remove the row",
        )
    if any(message.tool_calls for message in messages):
        _check_results(messages)


def _check_results(messages: Sequence[Message]) -> None:
    calls: tuple[ToolCall, ...] = ()
    results = 0
    for number, message in enumerate(messages, start=1):
        if message.role != "tool":
            calls, results = message.tool_calls, 0
            continue
        results += 1
        if results > len(calls):
            made = f"{len(calls)} call{'s were' if len(calls) > 1 else ' was'} made" if calls else "no call was made"
            raise DataFault(
                f"turn {number} (tool) is result {results}, but {made}",
                expected="at most one result for each call of the assistant turn before it",
                fix="write the call into tool_calls of that turn, or remove the row",
            )
        ids = [call.id for call in calls if call.id is not None]
        if message.tool_call_id is not None and ids and message.tool_call_id not in ids:
            raise DataFault(
                f"turn {number} (tool) answers the call {message.tool_call_id!r}, which was not made",
                expected=f"a tool_call_id of the turn before it: {', '.join(ids)}",
                fix="correct the id, or remove the row",
            )


def check_known_calls(messages: Sequence[Message], names: Sequence[str]) -> None:
    """Each call is of a function that the row's tools declare; where it declares none, any name passes.

    Raises:
        DataFault: A call is of another function.
    """
    for number, message in enumerate(messages, start=1):
        for call in message.tool_calls:
            if names and call.name not in names:
                raise DataFault(
                    f"turn {number} (assistant) calls the unknown tool {call.name!r}",
                    expected=f"one of the row's tools: {', '.join(names)}",
                    fix=f"{advice(call.name, names)} (else add it to the column 'tools')",
                )


def check_contents(messages: Sequence[Message]) -> None:
    """No turn is blank but for a turn of tool calls and a tool's result.

    Raises:
        DataFault: One is.
    """
    for number, message in enumerate(messages, start=1):
        if not message.content.strip() and not message.tool_calls and message.role != "tool":
            raise DataFault(
                f"turn {number} ({message.role}) is empty", expected="text", fix="write the text, or remove the row"
            )


def check_texts(example: Example, control: re.Pattern[str] | None) -> None:
    """All texts of an example can be tokenised as what they are.

    Args:
        example: Any example.
        control: Matches the strings that the base's tokenizer would make control tokens of; None for none.

    Raises:
        DataFault: A text holds a control token, half a character or NUL, or all together are too long.
    """
    length = 0
    for where, text in texts_of(example):
        length += len(text)
        fault = text_fault(where, text, control)
        if fault is not None:
            raise DataFault(fault.what, expected=fault.expected, fix=f"{fault.fix}, or remove the row")
    if length > MAX_ROW_BYTES:
        limit = f"{MAX_ROW_BYTES // 1024} KiB"
        raise DataFault(
            f"the row is longer than {limit}", expected=f"rows of at most {limit}", fix="split or shorten the row"
        )


def control_pattern(control_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of these texts, the longest first; None for none."""
    tokens = sorted(control_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def text_fault(where: str, text: str, control: re.Pattern[str] | None) -> Fault | None:
    """Why a tokenizer would not take ``text`` as what it is: a control token, NUL or half a character; None if it does.

    Args:
        where: Names the text in the message.
        text: Of anyone.
        control: As of ``control_pattern``.
    """
    found = None if control is None else control.search(text)
    if found is not None:
        return Fault(
            f"{where} holds the control token {found.group()}",
            "plain text, which cannot end or open a turn",
            "remove the token from the text",
        )
    bad = _NOT_TEXT.search(text)
    if bad is None:
        return None
    if bad.group() == "\0":
        return Fault(
            f"{where} holds a NUL character at position {bad.start() + 1}",
            "text without it",
            "remove the character (\\u0000 in JSON)",
        )
    return Fault(
        f"{where} holds half a character (a lone surrogate)",
        "whole Unicode characters",
        "write both halves of the escape, such as \\ud83d\\ude00",
    )


def turn_faults(conversation: Sequence[Message], control: re.Pattern[str] | None) -> list[Fault]:
    """Turns whose text would end the turn and open another (``<|im_end|>``), or is no text; by number and role."""
    faults = [
        text_fault(f"turn {number} ({turn.role})", turn.content, control) for number, turn in enumerate(conversation, 1)
    ]
    return [fault for fault in faults if fault is not None]


def texts_of(example: Example) -> Iterator[tuple[str, str]]:
    """Each text that a tokenizer will see, with its place."""
    for number, message in enumerate(example.messages, start=0 if example.system_added else 1):
        where = f"turn {number} ({message.role})" if number else "the task's system prompt"
        yield where, message.content
        if message.name is not None:
            yield f"the name of {where}", message.name
        if message.tool_call_id is not None:
            yield f"the tool_call_id of {where}", message.tool_call_id
        for call in message.tool_calls:
            yield f"a tool call of {where}", f"{call.name} {call.arguments} {call.id or ''}"
    for tool in example.tools:
        yield "the column 'tools'", tool
    if example.text is not None:
        yield "the text", example.text
