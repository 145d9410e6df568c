"""Reads the turns of a list column: OpenAI's ``role`` and ``content``, or sharegpt's ``from`` and ``value``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.conversation import DataFault, Message, ToolCall, kind_of
from qlora_kit.suggest import advice
from qlora_kit.tool_calls import read_function_call, read_list, read_tool_calls

FUNCTION_CALL = "function_call"


@dataclass(frozen=True)
class TurnKeys:
    """How a turn is written: its two keys, and the role that each known word stands for."""

    role: str
    content: str
    roles: Mapping[str, str]


MESSAGES = TurnKeys("role", "content", {role: role for role in ("system", "user", "assistant", "tool")})
SHAREGPT = TurnKeys(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        FUNCTION_CALL: "assistant",
        "function": "tool",
        "tool": "tool",
        "observation": "tool",
    },
)
# Roles of other formats and of other chat templates, for the advice alone.
_OTHER_NAMES = {**SHAREGPT.roles, "developer": "system", "model": "assistant", "bot": "assistant", "ai": "assistant"}
# Keys that would change what is learned; what else a turn carries (an id, a time) has no part in training.
_REFUSED_KEYS = {
    "function_call": "write the call as tool_calls",
    "weight": "remove the key, or set data.loss_on=last to learn the last answer alone",
    "train": "remove the key, or set data.loss_on=last to learn the last answer alone",
    "reasoning_content": "remove the key, or write the reasoning into the text",
    "thinking": "remove the key, or write the reasoning into the text",
    "images": "remove the row: only text can be trained",
}
_HARMLESS: tuple[object, ...] = (None, True, 1, "", [])


def read_text(value: object, where: str) -> str:
    """``value`` if it is text.

    Raises:
        DataFault: It is not.
    """
    if not isinstance(value, str):
        raise DataFault(f"{where} is {kind_of(value)}", expected="text", fix="write the text, or remove the row")
    return value


def read_turns(value: object, column: str, keys: TurnKeys) -> list[Message]:
    """The turns of a list column (or of its JSON text), each with a known role; their order is not checked.

    Raises:
        DataFault: It is no list of turns, or a turn's role, text or calls are faulty.
    """
    expected = f'a list of {{"{keys.role}": ..., "{keys.content}": ...}}'
    turns = read_list(value, f"the column {column!r}", expected=expected)
    if not turns:
        fix = "write the conversation, or remove the row"
        raise DataFault(f"the column {column!r} is an empty list", expected=expected, fix=fix)
    return [_read_turn(turn, f"turn {number} of {column!r}", keys) for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: object, where: str, keys: TurnKeys) -> Message:
    if not isinstance(turn, dict):
        raise DataFault(f"{where} is {kind_of(turn)}", expected="an object", fix="correct the turn, or remove the row")
    calls_given = turn.get("tool_calls") not in (None, [])
    for key in (keys.role, keys.content):
        if key not in turn and not (key == keys.content and calls_given):
            raise DataFault(
                f"{where} has no {key!r} (it has {', '.join(map(repr, turn)) or 'nothing'})",
                expected=f"the keys {keys.role!r} and {keys.content!r}",
                fix="rename the keys or the column: 'messages' has role and content, 'conversations' from and value",
            )
    _refuse_keys(turn, where)
    role = turn[keys.role]
    if not isinstance(role, str) or role not in keys.roles:
        raise _unknown_role(role, where, keys)
    content = f"the {keys.content} of {where}"
    if role == FUNCTION_CALL:
        return Message("assistant", "", read_function_call(turn[keys.content], content))
    if calls_given and keys.roles[role] != "assistant":
        fix = "move them to the assistant turn that makes them, or remove the row"
        raise DataFault(f"{where} ({role}) has tool_calls", expected="tool_calls in assistant turns alone", fix=fix)
    calls: tuple[ToolCall, ...] = read_tool_calls(turn["tool_calls"], where) if calls_given else ()
    text = "" if calls and turn.get(keys.content) is None else _read_content(turn[keys.content], content)
    if keys.roles[role] != "tool":
        return Message(keys.roles[role], text, calls)
    name, call = (_optional_text(turn.get(key), f"the {key} of {where}") for key in ("name", "tool_call_id"))
    return Message("tool", text, (), name, call)


def _refuse_keys(turn: Mapping[str, Any], where: str) -> None:
    for key, fix in _REFUSED_KEYS.items():
        if key in turn and turn[key] not in _HARMLESS:
            shown = f" ({json.dumps(turn[key])})" if isinstance(turn[key], (bool, int, float)) else ""
            raise DataFault(
                f"{where} has the key {key!r}{shown}, which would have no effect",
                expected="turns of role, content and tool_calls",
                fix=fix,
            )


def _unknown_role(role: object, where: str, keys: TurnKeys) -> DataFault:
    meant = _OTHER_NAMES.get(role.lower()) if isinstance(role, str) else None
    written = next((name for name, stands_for in keys.roles.items() if stands_for == meant), None)
    return DataFault(
        f"{where} has the unknown role {role!r}"
        if isinstance(role, str)
        else f"the role of {where} is {kind_of(role)}",
        expected=f"one of {', '.join(keys.roles)}",
        fix=advice(str(role or ""), keys.roles) if written is None else f"write {written!r}",
    )


def _optional_text(value: object, where: str) -> str | None:
    return None if value is None else read_text(value, where)


def _read_content(value: object, where: str) -> str:
    """A turn's content: text, or OpenAI's list of parts of type text."""
    if not isinstance(value, list):
        return read_text(value, where)
    texts = []
    for number, part in enumerate(value, start=1):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise DataFault(
                f"part {number} of {where} is of type {kind!r}",
                expected='parts of the form {"type": "text", "text": "..."}',
                fix="remove the row: only text can be trained",
            )
        texts.append(read_text(part.get("text"), f"the text of part {number} of {where}"))
    return "".join(texts)
