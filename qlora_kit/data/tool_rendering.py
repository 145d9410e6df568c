"""How turns with tool calls are handed to a chat template, and what of a call is missing in the text it rendered."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_kit.conversation import Message, ToolCall

_PROBE_ID = "probe0001"  # nine letters and digits, which Mistral's templates ask for
PROBE_TOOL = json.dumps(
    {
        "type": "function",
        "function": {
            "name": "probe_tool",
            "description": "Describes the probe.",
            "parameters": {"type": "object", "properties": {"probe_argument": {"type": "string"}}},
        },
    }
)
PROBE_RESULT = "probe result"
TOOL_PROBE = (
    Message("user", "Question?"),
    Message("assistant", "", (ToolCall("probe_tool", '{"probe_argument": "probe value"}', _PROBE_ID),)),
    Message("tool", PROBE_RESULT, name="probe_tool", tool_call_id=_PROBE_ID),
    Message("assistant", "The answer"),
)


def uses_tools(messages: Sequence[Message], tools: Sequence[str]) -> bool:
    """Whether a template has to know tools to render this conversation."""
    return bool(tools) or any(message.tool_calls or message.role == "tool" for message in messages)


def plain_message(message: Message) -> dict[str, Any]:
    """A turn as chat templates take it; keys that it does not use are left out, since templates ask for them."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _plain_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    plain: dict[str, Any] = {"type": "function", "function": function}
    return plain if call.id is None else {**plain, "id": call.id}


def missing_from_turn(text: str, message: Message) -> str | None:
    """What a turn's rendered text lacks of its content, or of the names and values of its calls; None if nothing."""
    text = without_space(text)
    if without_space(message.content) not in text:
        return "the text beside the tool call"
    for call in message.tool_calls:
        if without_space(call.name) not in text:
            return f"the name of the tool call {call.name}"
        if not all(_stands_in(value, text) for value in _values(json.loads(call.arguments))):
            return f"arguments of the tool call {call.name}"
    return None


def without_space(text: str) -> str:
    """``text`` for comparing: templates strip and indent, and some tokenizers normalise characters."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _values(value: Any) -> Iterator[Any]:
    """The names and single values in nested arguments."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from _values(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _values(entry)
    else:
        yield value


def _stands_in(value: Any, text: str) -> bool:
    """Whether a value stands in ``text`` (without space) as it is, or in JSON's or Python's notation."""
    written = (str(value), json.dumps(value, ensure_ascii=False).strip('"'), json.dumps(value).strip('"'))
    return any(without_space(form) in text for form in written)
