"""Reads tool calls and tool schemas as OpenAI, transformers and LLaMA-Factory write them, into one form of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_kit.conversation import DataFault, ToolCall, kind_of
from qlora_kit.strict_json import json_reason, parse_json

CALL_FORM = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
TOOL_FORM = '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'
_MEND = "correct it, or remove the row"
_PYTHON_LIST = "write it with json.dumps (Python's own notation, with single quotes, is not JSON)"


def read_list(value: object, where: str, *, expected: str) -> list[Any]:
    """A list, or the JSON text of one (CSV, and Parquet with columns of text).

    Raises:
        DataFault: It is neither.
    """
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            what = f"{where} is text, but not JSON: {json_reason(error)}"
            raise DataFault(what, expected=f"{expected}, or its JSON text", fix=_PYTHON_LIST) from error
    if not isinstance(value, list):
        raise DataFault(f"{where} is {kind_of(value)}", expected=expected, fix="write the list, or remove the row")
    return value


def read_tool_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """The calls in the ``tool_calls`` of a turn.

    Raises:
        DataFault: It is not a list of calls with name and arguments.
    """
    calls = read_list(value, f"the tool_calls of {where}", expected=f"a list of {CALL_FORM}")
    return tuple(_read_call(call, f"tool call {number} of {where}") for number, call in enumerate(calls, start=1))


def read_function_call(value: object, where: str) -> tuple[ToolCall, ...]:
    """The calls in a ``function_call`` turn of sharegpt: the JSON text of one call, or of a list of them.

    Raises:
        DataFault: It is something else.
    """
    expected = 'the JSON text {"name": "...", "arguments": {...}}'
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise DataFault(f"{where} is not JSON: {json_reason(error)}", expected=expected, fix=_MEND) from error
    if isinstance(value, dict):
        return (_read_call(value, where),)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else kind_of(value)
        raise DataFault(f"{where} is {kind}", expected=expected, fix=_MEND)
    return tuple(_read_call(call, f"call {number} of {where}") for number, call in enumerate(value, start=1))


def _read_call(value: object, where: str) -> ToolCall:
    if not isinstance(value, dict):
        raise DataFault(f"{where} is {kind_of(value)}", expected=CALL_FORM, fix=_MEND)
    if value.get("type") not in (None, "function"):
        raise DataFault(f"{where} is of type {value['type']!r}", expected="the type 'function'", fix="remove the row")
    function = value.get("function") if value.get("function") is not None else value
    if not isinstance(function, dict):
        raise DataFault(f"the function of {where} is {kind_of(function)}", expected=CALL_FORM, fix=_MEND)
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        what = f"{where} has no name" if name in (None, "") else f"the name of {where} is {kind_of(name)}"
        raise DataFault(
            what, expected='a name, as in {"name": "...", "arguments": {...}}', fix="add the name, or remove the row"
        )
    identifier = value.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise DataFault(f"the id of {where} is {kind_of(identifier)}", expected="text", fix="put it into quotes")
    return ToolCall(name, _read_arguments(function.get("arguments"), f"{where} ({name})"), identifier)


def _read_arguments(value: object, where: str) -> str:
    expected = "a JSON object, or the JSON text of one; {} where there are none"
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            what = f"the arguments of {where} are not JSON: {json_reason(error)}"
            raise DataFault(what, expected=expected, fix=_MEND) from error
    if value is None:
        raise DataFault(f"{where} has no arguments", expected=expected, fix="write {}, or remove the row")
    if not isinstance(value, dict):
        raise DataFault(f"the arguments of {where} are {kind_of(value)}", expected=expected, fix=_MEND)
    return _json_text(value, f"the arguments of {where}")


def _json_text(value: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:  # dates and NaN out of Parquet
        fix = "write them as text, or remove the row"
        raise DataFault(f"{where} cannot be written as JSON: {error}", expected="plain JSON values", fix=fix) from error


def read_tools(value: object) -> tuple[str, ...]:
    """The schemas in a row's ``tools`` column, each as JSON text in OpenAI's form.

    A bare ``{"name", "description", "parameters"}`` (LLaMA-Factory) is put into that form, so that training shows
    what a request to a server shows.

    Raises:
        DataFault: It is not a list of schemas with distinct names.
    """
    if value is None or value == "":
        return ()
    tools: dict[str, str] = {}
    for number, tool in enumerate(read_list(value, "the column 'tools'", expected=f"a list of {TOOL_FORM}"), start=1):
        where = f"tool {number} of 'tools'"
        name, text = _read_tool(tool, where)
        if name in tools:
            raise DataFault(f"{where} has the name {name!r} again", expected="a name for each tool", fix=_MEND)
        tools[name] = text
    return tuple(tools.values())


def _read_tool(value: object, where: str) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise DataFault(f"{where} is {kind_of(value)}", expected=TOOL_FORM, fix=_MEND)
    if value.get("type") not in (None, "function"):
        raise DataFault(f"{where} is of type {value['type']!r}", expected="the type 'function'", fix="remove the tool")
    wrapped = value.get("function") is not None
    function = value["function"] if wrapped else value
    if not isinstance(function, dict):
        raise DataFault(f"the function of {where} is {kind_of(function)}", expected=TOOL_FORM, fix=_MEND)
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise DataFault(f"{where} has no name", expected=TOOL_FORM, fix="add the name, or remove the tool")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        what = f"the parameters of {where} ({name}) are {kind_of(parameters)}"
        raise DataFault(what, expected='a JSON schema such as {"type": "object", "properties": {...}}', fix=_MEND)
    if not wrapped:
        function = {key: entry for key, entry in value.items() if key != "type"}
    return name, _json_text({"type": "function", "function": function}, where)


def tool_names(tools: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the functions in schemas as ``read_tools`` gives them."""
    return tuple(json.loads(tool)["function"]["name"] for tool in tools)
