"""Turn one raw data record into a conversation, by the format that its file is in (``format_detection``).

Five formats: OpenAI ``messages``, ``sharegpt``, ``alpaca``, ``prompt_completion`` and ``task`` (the task's own
columns through its templates). A record comes in as a plain dict; checked ``Message`` tuples go out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.suggest import advice
from qlora_kit.tasks import Task, render_template


@dataclass(frozen=True)
class Message:
    """One turn: ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One conversation of the data.

    Attributes:
        messages: All turns; the last is the assistant's.
        extra: What scoring needs beside the conversation (``tests`` of a code row).
        source: Where it stands, ``file:line``.
    """

    messages: tuple[Message, ...]
    extra: dict[str, Any]
    source: str


class DataFault(ValueError):
    """One record, or the columns of all, cannot be used; the three parts, without the file (the caller knows it)."""

    def __init__(self, what: str, *, expected: str, fix: str) -> None:
        self.what, self.expected, self.fix = what, expected, fix
        super().__init__(f"{what}\n  expected: {expected}\n  do: {fix}")


@dataclass(frozen=True)
class Format:
    """One way to write a conversation as a record.

    Attributes:
        name: What ``data.format`` calls it.
        columns: Columns that each record must have; empty for ``task``, where the task's fields say it.
        optional: Columns that are used where they are present.
        convert: Record and task -> turns, before the checks that all formats share.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], Task], list[Message]]

    def required(self, task: Task) -> tuple[str, ...]:
        """The columns that a record of ``task`` must have in this format."""
        return self.columns or task.fields


ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function": "tool",
    "tool": "tool",
    "observation": "tool",
}


def _kind(value: object) -> str:
    """A value's JSON kind, in words, for messages."""
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataFault(f"{where} is {_kind(value)}", expected="text", fix="write the text, or remove the row")
    return value


def _column_text(record: Mapping[str, Any], column: str) -> str:
    """A column's value as text; a number is written out, since CSV and JSON differ there."""
    value = record.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _text(value, f"the column {column!r}")


def _content(value: object, where: str) -> str:
    """A turn's content: text, or OpenAI's list of parts of type text."""
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for number, part in enumerate(value, start=1):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise DataFault(
                f"part {number} of {where} is of type {kind!r}",
                expected='parts of the form {"type": "text", "text": "..."}',
                fix="remove the row: only text can be trained",
            )
        texts.append(_text(part.get("text"), f"the text of part {number} of {where}"))
    return "".join(texts)


def _turns(value: object, column: str, *, role_key: str, content_key: str) -> list[Message]:
    """The turns of a list column, each with a known role."""
    expected = f'a list of {{"{role_key}": ..., "{content_key}": ...}}'
    if not isinstance(value, list) or not value:
        what = f"the column {column!r} is " + ("an empty list" if value == [] else _kind(value))
        raise DataFault(what, expected=expected, fix="write the conversation, or remove the row")
    known = {role: role for role in ROLES} if role_key == "role" else SHAREGPT_ROLES
    return [
        _turn(turn, f"turn {number} of {column!r}", (role_key, content_key), known)
        for number, turn in enumerate(value, 1)
    ]


def _turn(turn: object, where: str, keys: tuple[str, str], known: Mapping[str, str]) -> Message:
    if not isinstance(turn, dict):
        raise DataFault(f"{where} is {_kind(turn)}", expected="an object", fix="correct the turn, or remove the row")
    for key in keys:
        if key not in turn:
            raise DataFault(
                f"{where} has no {key!r} (it has {', '.join(map(repr, turn)) or 'nothing'})",
                expected=f"the keys {keys[0]!r} and {keys[1]!r}",
                fix="rename the keys; 'messages' uses role and content, 'conversations' uses from and value",
            )
    if turn.get("tool_calls"):
        raise DataFault(
            f"{where} has tool_calls", expected="turns of text only", fix="write the call as text, or remove the row"
        )
    role = turn[keys[0]]
    if not isinstance(role, str) or role not in known:
        raise DataFault(
            f"{where} has the unknown role {role!r}",
            expected=f"one of {', '.join(known)}",
            fix=advice(str(role), known),
        )
    return Message(known[role], _content(turn[keys[1]], f"the {keys[1]} of {where}"))


def _from_messages(record: Mapping[str, Any], task: Task) -> list[Message]:
    return _turns(record.get("messages"), "messages", role_key="role", content_key="content")


def _from_sharegpt(record: Mapping[str, Any], task: Task) -> list[Message]:
    turns = _turns(record.get("conversations"), "conversations", role_key="from", content_key="value")
    system = record.get("system")
    if system in (None, ""):
        return turns
    if turns[0].role == "system":
        raise DataFault(
            "the row has a 'system' column and a system turn", expected="one of the two", fix="remove one of them"
        )
    return [Message("system", _text(system, "the column 'system'")), *turns]


def _from_alpaca(record: Mapping[str, Any], task: Task) -> list[Message]:
    values = {"instruction": _column_text(record, "instruction")}
    prompt = "{instruction}"
    if record.get("input") not in (None, ""):
        values["input"] = _column_text(record, "input")
        prompt = task.alpaca_prompt
    return [Message("user", render_template(prompt, values)), Message("assistant", _column_text(record, "output"))]


def _from_prompt_completion(record: Mapping[str, Any], task: Task) -> list[Message]:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return [
            message
            for column in ("prompt", "completion")
            for message in _turns(record[column], column, role_key="role", content_key="content")
        ]
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataFault(
            f"'prompt' is {_kind(prompt)} and 'completion' is {_kind(completion)}",
            expected="text in both, or a list of messages in both",
            fix="write both in the same way",
        )
    return [Message("user", _column_text(record, "prompt")), Message("assistant", _column_text(record, "completion"))]


def _from_task_columns(record: Mapping[str, Any], task: Task) -> list[Message]:
    values = {column: _column_text(record, column) for column in task.fields}
    return [
        Message("user", render_template(task.prompt, values)),
        Message("assistant", render_template(task.completion, values)),
    ]


FORMATS: dict[str, Format] = {
    "messages": Format("messages", ("messages",), (), _from_messages),
    "sharegpt": Format("sharegpt", ("conversations",), ("system",), _from_sharegpt),
    "alpaca": Format("alpaca", ("instruction", "output"), ("input",), _from_alpaca),
    "prompt_completion": Format("prompt_completion", ("prompt", "completion"), (), _from_prompt_completion),
    "task": Format("task", (), (), _from_task_columns),
}


def to_messages(record: Mapping[str, Any], *, format: str, task: Task) -> tuple[Message, ...]:
    """A record's conversation, checked: system turn (the row's own, else the task's), then user and assistant in turn.

    Raises:
        DataFault: A column is missing or of the wrong type, a role is unknown or out of order, a turn is empty, or
            the answer is not one of the task's labels.
    """
    entry = FORMATS[format]
    for column in entry.required(task):
        if column not in record:
            raise DataFault(
                f"the column {column!r} is missing (the row has {', '.join(map(repr, record)) or 'none'})",
                expected=f"the columns {', '.join(entry.required(task))} of the format {format}",
                fix="add the column, or remove the row",
            )
    messages = entry.convert(record, task)
    _check_order(messages)
    _check_contents(messages, task)
    if messages[0].role != "system" and task.system_prompt:
        messages.insert(0, Message("system", task.system_prompt))
    return tuple(messages)


# Which roles may stand before each role; None is the start of the conversation.
_BEFORE: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_order(messages: list[Message]) -> None:
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        if before not in _BEFORE[message.role]:
            place = "at the start" if before is None else f"after {before}"
            raise DataFault(
                f"turn {number}: {message.role} stands {place}",
                expected="an optional system turn, then user and assistant in turn",
                fix="correct the order of the turns, or remove the row",
            )
        before = message.role
    if before != "assistant":
        raise DataFault(
            f"the last turn is {before}",
            expected="an assistant turn at the end",
            fix="add the answer, or remove the row",
        )


def _check_contents(messages: list[Message], task: Task) -> None:
    for number, message in enumerate(messages, start=1):
        if not message.content.strip():
            raise DataFault(
                f"turn {number} ({message.role}) is empty", expected="text", fix="write the text, or remove the row"
            )
    answer = messages[-1].content
    if task.labels and answer not in task.labels:
        raise DataFault(
            f"the answer {answer!r} is not a label of the task {task.name}",
            expected=f"one of {', '.join(task.labels)}",
            fix=f"{advice(answer, task.labels)} (for other labels, set data.completion)",
        )


def extra_fields(record: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """What scoring needs beside the conversation, where the record has it: lists of lines, such as ``tests``.

    Text is taken as a JSON list where it starts with a bracket, else as one entry a line.

    Raises:
        DataFault: A value is neither text nor a list of texts, or is empty.
    """
    return {name: _lines(record[name], name) for name in task.extra if record.get(name) is not None}


def _lines(value: object, column: str) -> list[str]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.splitlines()
        except json.JSONDecodeError as error:
            raise DataFault(
                f"the column {column!r} is not a JSON list: {error}", expected="a list of texts", fix="correct the list"
            ) from error
    lines = [line for line in value if isinstance(line, str) and line.strip()] if isinstance(value, list) else []
    if not isinstance(value, list) or not lines or len(lines) != len(value):
        raise DataFault(
            f"the column {column!r} is not a list of non-empty texts",
            expected='a list such as ["assert f(1) == 2"]',
            fix="correct the list, or remove the row",
        )
    return lines


def to_example(record: Mapping[str, Any], *, format: str, task: Task, source: str) -> Example:
    """``to_messages`` and ``extra_fields`` of one record, with its ``file:line``.

    Raises:
        DataFault: As of the two.
    """
    return Example(to_messages(record, format=format, task=task), extra_fields(record, task), source)
