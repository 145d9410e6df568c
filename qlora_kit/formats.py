"""Turn one raw data record into an example, by the format that its file is in (``format_detection``).

Six formats: OpenAI ``messages``, ``sharegpt``, ``alpaca``, ``prompt_completion``, ``task`` (the task's own columns
through its templates) and plain ``text``. A record comes in as a plain dict; a checked ``Example`` goes out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from qlora_kit.conversation import (
    DataFault,
    Example,
    Message,
    check_contents,
    check_known_calls,
    check_order,
    kind_of,
)
from qlora_kit.suggest import advice, nearest
from qlora_kit.tasks import Task, render_template, template_fields
from qlora_kit.tool_calls import read_list, read_tools, tool_names
from qlora_kit.turns import MESSAGES, SHAREGPT, read_text, read_turns

PLAIN_TEXT = "text"
TASK_COLUMNS = "task"
_TOOLS = "tools"
_TEXT_METRICS = ("perplexity",)


@dataclass(frozen=True)
class Format:
    """One way to write an example as a record.

    Attributes:
        name: What ``data.format`` calls it.
        columns: Columns that each record must have; empty for ``task``, where the task's fields say it.
        optional: Columns that are used where they are present.
        convert: Record and task -> turns, before the checks that all formats share; no turns for a plain text.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], Task], list[Message]]

    def required(self, task: Task) -> tuple[str, ...]:
        """The columns that a record of ``task`` must have in this format."""
        return self.columns or task.fields


def _column_text(record: Mapping[str, Any], column: str) -> str:
    """A column's value as text; a number is written out, since CSV and JSON differ there."""
    value = record.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        if not math.isfinite(value):
            fix = "write the value, or remove the row"
            raise DataFault(f"the column {column!r} is {value}", expected="text or a finite number", fix=fix)
        return str(value)
    return read_text(value, f"the column {column!r}")


def _filled_text(record: Mapping[str, Any], column: str) -> str:
    text = _column_text(record, column)
    if not text.strip():
        raise _empty([column])
    return text


def _empty(columns: Sequence[str]) -> DataFault:
    plural = len(columns) > 1
    what = f"the column{'s' * plural} {', '.join(map(repr, columns))} {'are' if plural else 'is'} empty"
    return DataFault(what, expected="text", fix="write the text, or remove the row")


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _with_system_column(record: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    system = record.get("system")
    if _is_blank(system):
        return turns
    if turns[0].role == "system":
        raise DataFault(
            "the row has a 'system' column and a system turn", expected="one of the two", fix="remove one of them"
        )
    return [Message("system", _column_text(record, "system")), *turns]


def _from_messages(record: Mapping[str, Any], task: Task) -> list[Message]:
    return read_turns(record.get("messages"), "messages", MESSAGES)


def _from_sharegpt(record: Mapping[str, Any], task: Task) -> list[Message]:
    return _with_system_column(record, read_turns(record.get("conversations"), "conversations", SHAREGPT))


def _from_alpaca(record: Mapping[str, Any], task: Task) -> list[Message]:
    values = {"instruction": _filled_text(record, "instruction")}
    prompt = "{instruction}"
    if not _is_blank(record.get("input")):
        values["input"] = _column_text(record, "input")
        prompt = task.alpaca_prompt
    turns = [
        *_history(record.get("history")),
        Message("user", render_template(prompt, values)),
        Message("assistant", _filled_text(record, "output")),
    ]
    return _with_system_column(record, turns)


def _history(value: object) -> list[Message]:
    """LLaMA-Factory's earlier turns of an alpaca row: pairs of what the user and the assistant said."""
    if value is None or value == "":
        return []
    expected = "a list of [user text, assistant text] pairs"
    turns = []
    for number, pair in enumerate(read_list(value, "the column 'history'", expected=expected), start=1):
        where = f"pair {number} of 'history'"
        if not isinstance(pair, list) or len(pair) != 2:
            kind = f"a list of {len(pair)}" if isinstance(pair, list) else kind_of(pair)
            raise DataFault(f"{where} is {kind}", expected=expected, fix="correct the pair, or remove the row")
        turns += [
            Message(role, read_text(text, f"the {role} text of {where}"))
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns


def _from_prompt_completion(record: Mapping[str, Any], task: Task) -> list[Message]:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return [
            message for column in ("prompt", "completion") for message in read_turns(record[column], column, MESSAGES)
        ]
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataFault(
            f"'prompt' is {kind_of(prompt)} and 'completion' is {kind_of(completion)}",
            expected="text in both, or a list of messages in both",
            fix="write both in the same way",
        )
    return [Message("user", _filled_text(record, "prompt")), Message("assistant", _filled_text(record, "completion"))]


def _from_task_columns(record: Mapping[str, Any], task: Task) -> list[Message]:
    values = {column: _column_text(record, column) for column in task.fields}
    for template in (task.prompt, task.completion):
        names = template_fields(template)
        if all(not values[name].strip() for name in names):
            raise _empty(names)
    return [
        Message("user", render_template(task.prompt, values)),
        Message("assistant", render_template(task.completion, values)),
    ]


def _from_text(record: Mapping[str, Any], task: Task) -> list[Message]:
    return []


FORMATS: dict[str, Format] = {
    "messages": Format("messages", ("messages",), (_TOOLS,), _from_messages),
    "sharegpt": Format("sharegpt", ("conversations",), ("system", _TOOLS), _from_sharegpt),
    "alpaca": Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _from_alpaca),
    "prompt_completion": Format("prompt_completion", ("prompt", "completion"), (_TOOLS,), _from_prompt_completion),
    TASK_COLUMNS: Format(TASK_COLUMNS, (), (), _from_task_columns),
    PLAIN_TEXT: Format(PLAIN_TEXT, ("text",), (), _from_text),
}


def check_format(name: str, task: Task) -> None:
    """Refuse a format that a task cannot use: plain text has neither turns nor answers.

    Raises:
        DataFault: The task has a system prompt, labels, or a metric of answers, and the format is plain text.
    """
    if name != PLAIN_TEXT:
        return
    has = ["a system prompt"] if task.system_prompt else []
    if task.labels:
        has.append("labels")
    other_metrics = [metric for metric in task.metrics if metric not in _TEXT_METRICS]
    if other_metrics:
        has.append(f"the metric {', '.join(other_metrics)}")
    if has:
        raise DataFault(
            f"plain text does not fit the task {task.name}, which has {' and '.join(has)}",
            expected="a task whose one metric is perplexity, without system prompt and labels",
            fix="name a task of your own: task: my_text, data.format: text, eval.metrics: [perplexity]",
        )


def to_messages(record: Mapping[str, Any], *, format: str, task: Task) -> tuple[Message, ...]:
    """A record's conversation, checked: system turn (the row's own, else the task's), then user and assistant in turn.

    Raises:
        DataFault: A column is missing or of the wrong type, a role is unknown or out of order, a turn is empty, or
            the answer is not one of the task's labels.
    """
    return _with_task_prompt(_own_messages(record, format, task), task)


def _own_messages(record: Mapping[str, Any], format: str, task: Task) -> list[Message]:
    """The record's own turns, checked."""
    entry = FORMATS[format]
    _require_columns(record, entry, task)
    messages = entry.convert(record, task)
    check_order(messages)
    check_contents(messages)
    answer = messages[-1].content
    if task.labels and answer not in task.labels:
        raise DataFault(
            f"the answer {answer!r} is not a label of the task {task.name}",
            expected=f"one of {', '.join(task.labels)}",
            fix=f"{advice(answer, task.labels)} ({_other_labels(format)})",
        )
    return messages


def _other_labels(format: str) -> str:
    """How to use labels that the task does not know; only its own columns are put into words by a template."""
    if format == TASK_COLUMNS:
        return "for other labels, set data.completion"
    own = f"task: my_labels, data.format: {format}, eval.metrics: [accuracy]"
    return f"for other labels, name a task of your own: {own}"


def _with_task_prompt(messages: list[Message], task: Task) -> tuple[Message, ...]:
    if messages[0].role == "system" or not task.system_prompt:
        return tuple(messages)
    return (Message("system", task.system_prompt), *messages)


def to_example(record: Mapping[str, Any], *, format: str, task: Task, source: str) -> Example:
    """One record as a checked example: its conversation and tools, or its plain text, and what scoring needs.

    Args:
        record: The raw columns.
        format: A name in ``FORMATS``.
        task: Gives templates, labels, system prompt and the extra columns.
        source: The record's ``file:line``.

    Raises:
        DataFault: As of ``to_messages``; the tools are faulty, or a call is of none of them; or a text is empty.
    """
    extra = extra_fields(record, task)
    if format == PLAIN_TEXT:
        _require_columns(record, FORMATS[format], task)
        return Example((), extra, source, text=_filled_text(record, "text"))
    messages = _own_messages(record, format, task)
    tools = read_tools(record.get(_TOOLS)) if _TOOLS in FORMATS[format].optional else ()
    if tools:
        check_known_calls(messages, tool_names(tools))
    whole = _with_task_prompt(messages, task)
    return Example(whole, extra, source, tools, system_added=len(whole) > len(messages))


def _require_columns(record: Mapping[str, Any], entry: Format, task: Task) -> None:
    required = entry.required(task)
    missing = [column for column in required if column not in record]
    if missing:
        plural = len(missing) > 1
        near = nearest(missing[0], set(record).difference(required))
        raise DataFault(
            f"the column{'s' * plural} {', '.join(map(repr, missing))} {'are' if plural else 'is'} missing "
            f"(the row has {', '.join(map(repr, record)) or 'none'})",
            expected=f"the columns {', '.join(required)} of the format {entry.name}",
            fix="add the column, or remove the row"
            if near is None
            else f"rename {near!r} to {missing[0]!r}, or remove the row",
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
