"""Every kind of bad row and bad file with the exact message for its user, and the counts around it.

Each message has its three parts: what and where, what was expected, what to do.
"""

from __future__ import annotations

import datetime
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.config import RunConfig, load_config
from qlora_kit.conversation import MAX_ROW_BYTES
from qlora_kit.data.preparing import examine, prepare
from qlora_kit.errors import DataError

CONTROL_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
S = {"role": "system", "content": "s"}
U = {"role": "user", "content": "x"}
A = {"role": "assistant", "content": "y"}
R = {"role": "tool", "content": "r"}
ROW = b'{"prompt": "a", "completion": "b"}\n'


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


# What the good rows before and behind a bad one look like, and the config that reads them.
GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pairs": ({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, "translation"),
    "messages": ({"messages": [U, A]}, {"messages": [S, U, A]}, "translation"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
        "translation",
    ),
    "alpaca": ({"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}, "translation"),
    "labels": ({"text": "a", "label": "positive"}, {"text": "b", "label": "neutral"}, "sentiment"),
    "text": ({"text": "a"}, {"text": "b"}, "plain"),
}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Kind -> the bad line between two good ones, in which group of GROUPS, and the message for rows.jsonl:2.
BAD_ROWS: dict[str, tuple[str, bytes | dict[str, Any], str, str, str]] = {
    "not JSON": (
        "pairs",
        b'{"prompt": "x" "completion": "y"}',
        "not valid JSON: Expecting ',' delimiter at column 16",
        "one JSON object on each line",
        "correct the row, or remove it",
    ),
    "cut off in the middle": (
        "pairs",
        b'{"prompt": "x", "compl',
        "not valid JSON: Unterminated string starting at column 17",
        "one JSON object on each line",
        "correct the row, or remove it",
    ),
    "single quotes": (
        "pairs",
        b"{'prompt': 'x', 'completion': 'y'}",
        "not valid JSON: Expecting property name enclosed in double quotes at column 2",
        "one JSON object on each line",
        "write the rows with json.dumps: Python's own notation, with single quotes, is not JSON",
    ),
    "a trailing comma": (
        "pairs",
        b'{"prompt": "x", "completion": "y",}',
        "not valid JSON: Expecting property name enclosed in double quotes at column 35",
        "one JSON object on each line",
        "correct the row, or remove it",
    ),
    "an object on several lines": (
        "pairs",
        b"{",
        "not valid JSON: Expecting property name enclosed in double quotes at column 2",
        "one JSON object on each line",
        "write each row on one line: jq -c . rows.jsonl",
    ),
    "NaN": (
        "pairs",
        b'{"prompt": "x", "completion": NaN}',
        "not valid JSON: NaN is not a JSON number",
        "one JSON object on each line",
        "correct the row, or remove it",
    ),
    "Infinity": (
        "pairs",
        b'{"prompt": "x", "completion": -Infinity}',
        "not valid JSON: -Infinity is not a JSON number",
        "one JSON object on each line",
        "correct the row, or remove it",
    ),
    "a number too large": (
        "pairs",
        b'{"prompt": "x", "completion": 1e999}',
        "the column 'completion' is inf",
        "text or a finite number",
        "write the value, or remove the row",
    ),
    "a key twice": (
        "pairs",
        b'{"prompt": "x", "completion": "y", "prompt": "z"}',
        "not valid JSON: the key 'prompt' appears twice in one object",
        "one JSON object on each line",
        "correct the row, or remove it",
    ),
    "nested too deeply": (
        "pairs",
        b'{"a": ' + b"[" * 200_000,
        "not valid JSON: it is nested too deeply",
        "one JSON object on each line",
        "correct the row, or remove it",
    ),
    "a raw line break in a text": (
        "pairs",
        b'{"prompt": "x\ty", "completion": "z"}',
        "not valid JSON: Invalid control character at column 14",
        "one JSON object on each line",
        "write a line break as \\n and a tab as \\t, remove other control characters, or remove the row",
    ),
    "a list in place of the object": (
        "pairs",
        b'["x", "y"]',
        "the row is a list",
        'a JSON object such as {"prompt": ..., "completion": ...}',
        "correct the row, or remove it",
    ),
    "a text in place of the object": (
        "pairs",
        b'"x"',
        "the row is text",
        'a JSON object such as {"prompt": ..., "completion": ...}',
        "correct the row, or remove it",
    ),
    "null in place of the object": (
        "pairs",
        b"null",
        "the row is null",
        'a JSON object such as {"prompt": ..., "completion": ...}',
        "correct the row, or remove it",
    ),
    "a number in place of the object": (
        "pairs",
        b"17",
        "the row is a number",
        'a JSON object such as {"prompt": ..., "completion": ...}',
        "correct the row, or remove it",
    ),
    "an empty object": (
        "pairs",
        b"{}",
        "the columns 'prompt', 'completion' are missing (the row has none)",
        "the columns prompt, completion of the format prompt_completion",
        "add the column, or remove the row",
    ),
    "Windows encoding": (
        "pairs",
        b'{"prompt": "caf\xe9", "completion": "y"}',
        "not UTF-8: byte 0xe9 at position 16",
        "UTF-8 text",
        "convert the file, for example: iconv -f CP1252 -t UTF-8 rows.jsonl > utf8.jsonl",
    ),
    "a byte order mark in the middle": (
        "pairs",
        b'\xef\xbb\xbf{"prompt": "x", "completion": "y"}',
        "a byte order mark stands at the start of the line, as where files were joined",
        "one at the start of the file at most",
        "remove the bytes EF BB BF there",
    ),
    "raw NUL bytes": (
        "pairs",
        b'{"prompt": "x\0", "completion": "y"}',
        "not valid JSON: Invalid control character at column 14",
        "one JSON object on each line",
        "write a line break as \\n and a tab as \\t, remove other control characters, or remove the row",
    ),
    "an escaped NUL": (
        "pairs",
        {"prompt": "x\0y", "completion": "z"},
        "turn 1 (user) holds a NUL character at position 2",
        "text without it",
        "remove the character (\\u0000 in JSON), or remove the row",
    ),
    "half a character": (
        "pairs",
        b'{"prompt": "x\\ud83d", "completion": "y"}',
        "turn 1 (user) holds half a character (a lone surrogate)",
        "whole Unicode characters",
        "write both halves of the escape, such as \\ud83d\\ude00, or remove the row",
    ),
    "a huge line": (
        "pairs",
        {"prompt": "x" * MAX_ROW_BYTES, "completion": "y"},
        "the row is longer than 1024 KiB",
        "rows of at most 1024 KiB",
        "split or shorten the row",
    ),
    "a missing column": (
        "pairs",
        {"prompt": "x"},
        "the column 'completion' is missing (the row has 'prompt')",
        "the columns prompt, completion of the format prompt_completion",
        "add the column, or remove the row",
    ),
    "a misspelt column": (
        "pairs",
        {"prompt": "x", "complete": "y"},
        "the column 'completion' is missing (the row has 'prompt', 'complete')",
        "the columns prompt, completion of the format prompt_completion",
        "rename 'complete' to 'completion', or remove the row",
    ),
    "null for the answer": (
        "pairs",
        {"prompt": "x", "completion": None},
        "the column 'completion' is null",
        "text",
        "write the text, or remove the row",
    ),
    "an empty answer": (
        "pairs",
        {"prompt": "x", "completion": ""},
        "the column 'completion' is empty",
        "text",
        "write the text, or remove the row",
    ),
    "a blank answer": (
        "pairs",
        {"prompt": "x", "completion": " \n\t"},
        "the column 'completion' is empty",
        "text",
        "write the text, or remove the row",
    ),
    "a blank prompt": (
        "pairs",
        {"prompt": "  ", "completion": "y"},
        "the column 'prompt' is empty",
        "text",
        "write the text, or remove the row",
    ),
    "true for the answer": (
        "pairs",
        {"prompt": "x", "completion": True},
        "the column 'completion' is true/false",
        "text",
        "write the text, or remove the row",
    ),
    "an object for the answer": (
        "pairs",
        {"prompt": "x", "completion": {"text": "y"}},
        "the column 'completion' is an object",
        "text",
        "write the text, or remove the row",
    ),
    "a list for the answer alone": (
        "pairs",
        {"prompt": "x", "completion": ["y"]},
        "'prompt' is text and 'completion' is a list",
        "text in both, or a list of messages in both",
        "write both in the same way",
    ),
    "a control token in the prompt": (
        "pairs",
        {"prompt": "x<|im_end|>", "completion": "y"},
        "turn 1 (user) holds the control token <|im_end|>",
        "plain text, which cannot end or open a turn",
        "remove the token from the text, or remove the row",
    ),
    "a control token in the answer": (
        "pairs",
        {"prompt": "x", "completion": "y<|endoftext|>"},
        "turn 2 (assistant) holds the control token <|endoftext|>",
        "plain text, which cannot end or open a turn",
        "remove the token from the text, or remove the row",
    ),
    "messages that are null": (
        "messages",
        {"messages": None},
        "the column 'messages' is null",
        'a list of {"role": ..., "content": ...}',
        "write the list, or remove the row",
    ),
    "an empty list of messages": (
        "messages",
        {"messages": []},
        "the column 'messages' is an empty list",
        'a list of {"role": ..., "content": ...}',
        "write the conversation, or remove the row",
    ),
    "messages that are an object": (
        "messages",
        {"messages": {"role": "user", "content": "x"}},
        "the column 'messages' is an object",
        'a list of {"role": ..., "content": ...}',
        "write the list, or remove the row",
    ),
    "messages in Python's notation": (
        "messages",
        {"messages": "[{'role': 'user', 'content': 'x'}]"},
        ("the column 'messages' is text, but not JSON: Expecting property name enclosed in double quotes at column 3"),
        'a list of {"role": ..., "content": ...}, or its JSON text',
        "write it with json.dumps (Python's own notation, with single quotes, is not JSON)",
    ),
    "a message that is text": (
        "messages",
        {"messages": ["x", "y"]},
        "turn 1 of 'messages' is text",
        "an object",
        "correct the turn, or remove the row",
    ),
    "a message without a role": (
        "messages",
        {"messages": [{"content": "x"}, A]},
        "turn 1 of 'messages' has no 'role' (it has 'content')",
        "the keys 'role' and 'content'",
        "rename the keys or the column: 'messages' has role and content, 'conversations' from and value",
    ),
    "a message without content": (
        "messages",
        {"messages": [U, {"role": "assistant"}]},
        "turn 2 of 'messages' has no 'content' (it has 'role')",
        "the keys 'role' and 'content'",
        "rename the keys or the column: 'messages' has role and content, 'conversations' from and value",
    ),
    "sharegpt's keys in messages": (
        "messages",
        {"messages": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        "turn 1 of 'messages' has no 'role' (it has 'from', 'value')",
        "the keys 'role' and 'content'",
        "rename the keys or the column: 'messages' has role and content, 'conversations' from and value",
    ),
    "a misspelt role": (
        "messages",
        {"messages": [U, {"role": "asistant", "content": "y"}]},
        "turn 2 of 'messages' has the unknown role 'asistant'",
        "one of system, user, assistant, tool",
        "did you mean 'assistant'?",
    ),
    "the role gpt in messages": (
        "messages",
        {"messages": [U, {"role": "gpt", "content": "y"}]},
        "turn 2 of 'messages' has the unknown role 'gpt'",
        "one of system, user, assistant, tool",
        "write 'assistant'",
    ),
    "the role developer in messages": (
        "messages",
        {"messages": [{"role": "developer", "content": "s"}, U, A]},
        "turn 1 of 'messages' has the unknown role 'developer'",
        "one of system, user, assistant, tool",
        "write 'system'",
    ),
    "a role that is null": (
        "messages",
        {"messages": [{"role": None, "content": "x"}, A]},
        "the role of turn 1 of 'messages' is null",
        "one of system, user, assistant, tool",
        "use one of the names above, or remove it",
    ),
    "content that is null": (
        "messages",
        {"messages": [U, {"role": "assistant", "content": None}]},
        "the content of turn 2 of 'messages' is null",
        "text",
        "write the text, or remove the row",
    ),
    "content that is a number": (
        "messages",
        {"messages": [U, {"role": "assistant", "content": 4}]},
        "the content of turn 2 of 'messages' is a number",
        "text",
        "write the text, or remove the row",
    ),
    "an image in the content": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A]},
        "part 1 of the content of turn 1 of 'messages' is of type 'image_url'",
        'parts of the form {"type": "text", "text": "..."}',
        "remove the row: only text can be trained",
    ),
    "a text part without text": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, A]},
        "the text of part 1 of the content of turn 1 of 'messages' is null",
        "text",
        "write the text, or remove the row",
    ),
    "a system turn in the middle": (
        "messages",
        {"messages": [U, A, S, U, A]},
        "turn 3: system stands after assistant",
        "an optional system turn, then user and assistant in turn",
        "correct the order of the turns, or remove the row",
    ),
    "two system turns": (
        "messages",
        {"messages": [S, S, U, A]},
        "turn 2: system stands after system",
        "an optional system turn, then user and assistant in turn",
        "correct the order of the turns, or remove the row",
    ),
    "two user turns in a row": (
        "messages",
        {"messages": [U, U, A]},
        "turn 2: user stands after user",
        "an optional system turn, then user and assistant in turn",
        "correct the order of the turns, or remove the row",
    ),
    "two answers in a row": (
        "messages",
        {"messages": [U, A, A]},
        "turn 3: assistant stands after assistant",
        "an optional system turn, then user and assistant in turn",
        "correct the order of the turns, or remove the row",
    ),
    "an answer at the start": (
        "messages",
        {"messages": [A, U, A]},
        "turn 1: assistant stands at the start",
        "an optional system turn, then user and assistant in turn",
        "correct the order of the turns, or remove the row",
    ),
    "a user turn at the end": (
        "messages",
        {"messages": [U, A, U]},
        "the last turn is user",
        "an assistant turn at the end",
        "add the answer, or remove the row",
    ),
    "a system turn alone": (
        "messages",
        {"messages": [S]},
        "the last turn is system",
        "an assistant turn at the end",
        "add the answer, or remove the row",
    ),
    "an empty answer in the middle": (
        "messages",
        {"messages": [U, {"role": "assistant", "content": ""}, U, A]},
        "turn 2 (assistant) is empty",
        "text",
        "write the text, or remove the row",
    ),
    "an empty system turn": (
        "messages",
        {"messages": [{"role": "system", "content": ""}, U, A]},
        "turn 1 (system) is empty",
        "text",
        "write the text, or remove the row",
    ),
    "a control token in a system turn": (
        "messages",
        {"messages": [{"role": "system", "content": "<|im_start|>"}, U, A]},
        "turn 1 (system) holds the control token <|im_start|>",
        "plain text, which cannot end or open a turn",
        "remove the token from the text, or remove the row",
    ),
    "a conversation of too many turns": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "x" * (MAX_ROW_BYTES // 2)},
                {"role": "assistant", "content": "y" * (MAX_ROW_BYTES // 2 - 60)},
            ]
        },
        "the row is longer than 1024 KiB",
        "rows of at most 1024 KiB",
        "split or shorten the row",
    ),
    "a weight of 0": (
        "messages",
        {"messages": [U, {**A, "weight": 0}]},
        "turn 2 of 'messages' has the key 'weight' (0), which would have no effect",
        "turns of role, content and tool_calls",
        "remove the key, or set data.loss_on=last to learn the last answer alone",
    ),
    "train: false": (
        "messages",
        {"messages": [U, {**A, "train": False}]},
        "turn 2 of 'messages' has the key 'train' (false), which would have no effect",
        "turns of role, content and tool_calls",
        "remove the key, or set data.loss_on=last to learn the last answer alone",
    ),
    "a thought of its own": (
        "messages",
        {"messages": [U, {**A, "reasoning_content": "hm"}]},
        "turn 2 of 'messages' has the key 'reasoning_content', which would have no effect",
        "turns of role, content and tool_calls",
        "remove the key, or write the reasoning into the text",
    ),
    "OpenAI's old function_call": (
        "messages",
        {"messages": [U, {**A, "function_call": {"name": "f", "arguments": "{}"}}]},
        "turn 2 of 'messages' has the key 'function_call', which would have no effect",
        "turns of role, content and tool_calls",
        "write the call as tool_calls",
    ),
    "a call without a name": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"arguments": {}}}]}]},
        "tool call 1 of turn 2 of 'messages' has no name",
        'a name, as in {"name": "...", "arguments": {...}}',
        "add the name, or remove the row",
    ),
    "a call without arguments": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]},
        "tool call 1 of turn 2 of 'messages' (f) has no arguments",
        "a JSON object, or the JSON text of one; {} where there are none",
        "write {}, or remove the row",
    ),
    "arguments that are not JSON": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [call("f", "town=Paris")]}]},
        "the arguments of tool call 1 of turn 2 of 'messages' (f) are not JSON: Expecting value at column 1",
        "a JSON object, or the JSON text of one; {} where there are none",
        "correct it, or remove the row",
    ),
    "arguments that are a list": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [call("f", ["Paris"])]}]},
        "the arguments of tool call 1 of turn 2 of 'messages' (f) are a list",
        "a JSON object, or the JSON text of one; {} where there are none",
        "correct it, or remove the row",
    ),
    "tool_calls that are an object": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": call("f", {})}]},
        "the tool_calls of turn 2 of 'messages' is an object",
        'a list of {"type": "function", "function": {"name": "...", "arguments": {...}}}',
        "write the list, or remove the row",
    ),
    "a call of another type": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [{"type": "code_interpreter"}]}]},
        "tool call 1 of turn 2 of 'messages' is of type 'code_interpreter'",
        "the type 'function'",
        "remove the row",
    ),
    "tool_calls of the user": (
        "messages",
        {"messages": [{**U, "tool_calls": [call("f", {})]}, A]},
        "turn 1 of 'messages' (user) has tool_calls",
        "tool_calls in assistant turns alone",
        "move them to the assistant turn that makes them, or remove the row",
    ),
    "a tool result without a call": (
        "messages",
        {"messages": [U, R, A]},
        "turn 2: tool stands after user",
        "a tool turn behind the assistant turn that calls it",
        "correct the order of the turns, or remove the row",
    ),
    "a tool result behind another answer": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [call("f", {})]}, R, A, R, A]},
        "turn 5 (tool) is result 1, but no call was made",
        "at most one result for each call of the assistant turn before it",
        "write the call into tool_calls of that turn, or remove the row",
    ),
    "more tool results than calls": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [call("f", {})]}, R, R, A]},
        "turn 4 (tool) is result 2, but 1 call was made",
        "at most one result for each call of the assistant turn before it",
        "write the call into tool_calls of that turn, or remove the row",
    ),
    "a result of another call": (
        "messages",
        {
            "messages": [
                U,
                {"role": "assistant", "tool_calls": [{**call("f", {}), "id": "1"}]},
                {**R, "tool_call_id": "2"},
                A,
            ]
        },
        "turn 3 (tool) answers the call '2', which was not made",
        "a tool_call_id of the turn before it: 1",
        "correct the id, or remove the row",
    ),
    "a conversation that ends with a tool result": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [call("f", {})]}, R]},
        "the last turn is tool",
        "an assistant turn at the end",
        "add the answer, or remove the row",
    ),
    "a tool result that is an object": (
        "messages",
        {
            "messages": [
                U,
                {"role": "assistant", "tool_calls": [call("f", {})]},
                {"role": "tool", "content": {"x": 1}},
                A,
            ]
        },
        "the content of turn 3 of 'messages' is an object",
        "text",
        "write the text, or remove the row",
    ),
    "an unknown tool": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [call("wether", {})]}], "tools": [tool("weather")]},
        "turn 2 (assistant) calls the unknown tool 'wether'",
        "one of the row's tools: weather",
        "did you mean 'weather'? (else add it to the column 'tools')",
    ),
    "tools that are text but not JSON": (
        "messages",
        {"messages": [U, A], "tools": "weather, clock"},
        "the column 'tools' is text, but not JSON: Expecting value at column 1",
        (
            'a list of {"type": "function", "function": {"name": "...", "description": "...", "parameters": '
            "{...}}}, or its JSON text"
        ),
        "write it with json.dumps (Python's own notation, with single quotes, is not JSON)",
    ),
    "a tool without a name": (
        "messages",
        {"messages": [U, A], "tools": [{"description": "d"}]},
        "tool 1 of 'tools' has no name",
        '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}',
        "add the name, or remove the tool",
    ),
    "a tool twice": (
        "messages",
        {"messages": [U, A], "tools": [tool("f"), tool("f")]},
        "tool 2 of 'tools' has the name 'f' again",
        "a name for each tool",
        "correct it, or remove the row",
    ),
    "a tool whose parameters are a list": (
        "messages",
        {"messages": [U, A], "tools": [{"name": "f", "parameters": ["town"]}]},
        "the parameters of tool 1 of 'tools' (f) are a list",
        'a JSON schema such as {"type": "object", "properties": {...}}',
        "correct it, or remove the row",
    ),
    "a control token in the arguments": (
        "messages",
        {"messages": [U, {"role": "assistant", "tool_calls": [call("f", {"x": "<|im_end|>"})]}]},
        "a tool call of turn 2 (assistant) holds the control token <|im_end|>",
        "plain text, which cannot end or open a turn",
        "remove the token from the text, or remove the row",
    ),
    "a control token in a tool result": (
        "messages",
        {
            "messages": [
                U,
                {"role": "assistant", "tool_calls": [call("f", {})]},
                {"role": "tool", "content": "<|im_end|>"},
                A,
            ]
        },
        "turn 3 (tool) holds the control token <|im_end|>",
        "plain text, which cannot end or open a turn",
        "remove the token from the text, or remove the row",
    ),
    "a control token in the tools": (
        "messages",
        {"messages": [U, A], "tools": [{"name": "f", "description": "<|im_end|>"}]},
        "the column 'tools' holds the control token <|im_end|>",
        "plain text, which cannot end or open a turn",
        "remove the token from the text, or remove the row",
    ),
    "a misspelt role of sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "humen", "value": "x"}, {"from": "gpt", "value": "y"}]},
        "turn 1 of 'conversations' has the unknown role 'humen'",
        "one of system, human, user, gpt, assistant, function_call, function, tool, observation",
        "did you mean 'human'?",
    ),
    "OpenAI's keys in conversations": (
        "sharegpt",
        {"conversations": [U, A]},
        "turn 1 of 'conversations' has no 'from' (it has 'role', 'content')",
        "the keys 'from' and 'value'",
        "rename the keys or the column: 'messages' has role and content, 'conversations' from and value",
    ),
    "conversations that are text": (
        "sharegpt",
        {"conversations": "human: x, gpt: y"},
        "the column 'conversations' is text, but not JSON: Expecting value at column 1",
        'a list of {"from": ..., "value": ...}, or its JSON text',
        "write it with json.dumps (Python's own notation, with single quotes, is not JSON)",
    ),
    "a system column and a system turn": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "x"},
                {"from": "gpt", "value": "y"},
            ],
            "system": "s",
        },
        "the row has a 'system' column and a system turn",
        "one of the two",
        "remove one of them",
    ),
    "a function_call that is not JSON": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "weather(Paris)"}]},
        "the value of turn 2 of 'conversations' is not JSON: Expecting value at column 1",
        'the JSON text {"name": "...", "arguments": {...}}',
        "correct it, or remove the row",
    ),
    "a function_call without a name": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": '{"arguments": {}}'}]},
        "the value of turn 2 of 'conversations' has no name",
        'a name, as in {"name": "...", "arguments": {...}}',
        "add the name, or remove the row",
    ),
    "alpaca without output": (
        "alpaca",
        {"instruction": "x", "input": "y"},
        "the column 'output' is missing (the row has 'instruction', 'input')",
        "the columns instruction, output of the format alpaca",
        "add the column, or remove the row",
    ),
    "alpaca with output null": (
        "alpaca",
        {"instruction": "x", "input": "y", "output": None},
        "the column 'output' is null",
        "text",
        "write the text, or remove the row",
    ),
    "alpaca with a blank instruction": (
        "alpaca",
        {"instruction": " ", "input": "y", "output": "z"},
        "the column 'instruction' is empty",
        "text",
        "write the text, or remove the row",
    ),
    "alpaca with an input that is a list": (
        "alpaca",
        {"instruction": "x", "input": ["y"], "output": "z"},
        "the column 'input' is a list",
        "text",
        "write the text, or remove the row",
    ),
    "alpaca with a history of texts": (
        "alpaca",
        {"instruction": "x", "output": "y", "history": ["a", "b"]},
        "pair 1 of 'history' is text",
        "a list of [user text, assistant text] pairs",
        "correct the pair, or remove the row",
    ),
    "alpaca with half a pair in its history": (
        "alpaca",
        {"instruction": "x", "output": "y", "history": [["a"]]},
        "pair 1 of 'history' is a list of 1",
        "a list of [user text, assistant text] pairs",
        "correct the pair, or remove the row",
    ),
    "prompt text and completion messages": (
        "pairs",
        {"prompt": "x", "completion": [A]},
        "'prompt' is text and 'completion' is a list",
        "text in both, or a list of messages in both",
        "write both in the same way",
    ),
    "an unknown label": (
        "labels",
        {"text": "x", "label": "excellent"},
        "the answer 'excellent' is not a label of the task sentiment",
        "one of positive, negative, neutral",
        "use one of the names above, or remove it (for other labels, set data.completion)",
    ),
    "a label in another case": (
        "labels",
        {"text": "x", "label": "Positive"},
        "the answer 'Positive' is not a label of the task sentiment",
        "one of positive, negative, neutral",
        "did you mean 'positive'? (for other labels, set data.completion)",
    ),
    "a label with a space behind it": (
        "labels",
        {"text": "x", "label": "positive "},
        "the answer 'positive ' is not a label of the task sentiment",
        "one of positive, negative, neutral",
        "did you mean 'positive'? (for other labels, set data.completion)",
    ),
    "a label as a number": (
        "labels",
        {"text": "x", "label": 1},
        "the answer '1' is not a label of the task sentiment",
        "one of positive, negative, neutral",
        "use one of the names above, or remove it (for other labels, set data.completion)",
    ),
    "an empty text of the task": (
        "labels",
        {"text": "", "label": "positive"},
        "the column 'text' is empty",
        "text",
        "write the text, or remove the row",
    ),
    "a blank plain text": (
        "text",
        {"text": " \n"},
        "the column 'text' is empty",
        "text",
        "write the text, or remove the row",
    ),
    "a plain text that is a list": (
        "text",
        {"text": ["a", "b"]},
        "the column 'text' is a list",
        "text",
        "write the text, or remove the row",
    ),
    "a control token in a plain text": (
        "text",
        {"text": "a<|endoftext|>b"},
        "the text holds the control token <|endoftext|>",
        "plain text, which cannot end or open a turn",
        "remove the token from the text, or remove the row",
    ),
    "half a character in a plain text": (
        "text",
        b'{"text": "a\\udc00"}',
        "the text holds half a character (a lone surrogate)",
        "whole Unicode characters",
        "write both halves of the escape, such as \\ud83d\\ude00, or remove the row",
    ),
}
# Kind -> file, content with one bad row between two good ones, and the message.
BAD_FILE_ROWS: dict[str, tuple[str, bytes, str, str, str]] = {
    "a CSV row with a cell too few": (
        "rows.csv",
        b"prompt,completion\na,b\nc\nd,e\n",
        "rows.csv:3: the row has 1 cell",
        "2 cells, as in the first line (prompt, completion)",
        "quote cells that hold a comma or a line break",
    ),
    "a CSV row with a cell too many": (
        "rows.csv",
        b"prompt,completion\na,b\nc,d,e\nd,e\n",
        "rows.csv:3: the row has 3 cells",
        "2 cells, as in the first line (prompt, completion)",
        "quote cells that hold a comma or a line break",
    ),
    "a CSV row with text behind a quote": (
        "rows.csv",
        b'prompt,completion\na,b\nc,"d"e\nd,e\n',
        "rows.csv:3: not valid CSV: ',' expected after '\"'",
        'comma-separated cells, quoted by "',
        "quote the cell, double each quote inside it, or remove the row",
    ),
    "a CSV row in another encoding": (
        "rows.csv",
        b"prompt,completion\na,b\nc,caf\xe9\nd,e\n",
        "rows.csv:3: not UTF-8: byte 0xe9 at position 6",
        "UTF-8 text",
        "convert the file, for example: iconv -f CP1252 -t UTF-8 rows.csv > utf8.csv",
    ),
    "a CSV row with an empty cell": (
        "rows.csv",
        b"prompt,completion\na,b\nc,\nd,e\n",
        "rows.csv:3: the column 'completion' is empty",
        "text",
        "write the text, or remove the row",
    ),
    "a CSV row with NUL": (
        "rows.csv",
        b"prompt,completion\na,b\nc,d\0\nd,e\n",
        "rows.csv:3: turn 2 (assistant) holds a NUL character at position 2",
        "text without it",
        "remove the character (\\u0000 in JSON), or remove the row",
    ),
    "a CSV row longer than the limit": (
        "rows.csv",
        b"prompt,completion\na,b\nc," + b"x" * MAX_ROW_BYTES + b"\nd,e\n",
        "rows.csv:3: the row is longer than 1024 KiB",
        "rows of at most 1024 KiB",
        "split or shorten the row",
    ),
    "a CSV joined from two files with marks": (
        "rows.csv",
        b"prompt,completion\na,b\n\xef\xbb\xbfc,d\nd,e\n",
        "rows.csv:3: a byte order mark stands at the start of the line, as where files were joined",
        "one at the start of the file at most",
        "remove the bytes EF BB BF there",
    ),
    "a row of a JSON list that is text": (
        "rows.json",
        b'[{"prompt": "a", "completion": "b"},\n"c",\n{"prompt": "d", "completion": "e"}]',
        "rows.json:2: the row is text",
        'a JSON object such as {"prompt": ..., "completion": ...}',
        "correct the row, or remove it",
    ),
    "a doubled key in a JSON list": (
        "rows.json",
        b'[{"prompt": "a", "completion": "b"},\n{"prompt": "c", "prompt": "d"},\n{"prompt": "d", "completion": "e"}]',
        "rows.json:2: not valid JSON: the key 'prompt' appears twice in one object",
        "one JSON list of objects",
        "correct the row, or remove it",
    ),
    "a Parquet row with null": (
        "rows.parquet",
        parquet(
            [
                {"prompt": "a", "completion": "b"},
                {"prompt": "c", "completion": None},
                {"prompt": "d", "completion": "e"},
            ]
        ),
        "rows.parquet:2: the column 'completion' is null",
        "text",
        "write the text, or remove the row",
    ),
    "a text line in another encoding": (
        "rows.txt",
        b"a\ncaf\xe9\nd\n",
        "rows.txt:2: not UTF-8: byte 0xe9 at position 4",
        "UTF-8 text",
        "convert the file, for example: iconv -f CP1252 -t UTF-8 rows.txt > utf8.txt",
    ),
    "a text line with NUL": (
        "rows.txt",
        b"a\nb\0\nd\n",
        "rows.txt:2: the text holds a NUL character at position 2",
        "text without it",
        "remove the character (\\u0000 in JSON), or remove the row",
    ),
}
# Kind -> file, content (None for no file), and the message; no row can be used, whatever data.on_error says.
BAD_FILES: dict[str, tuple[str, bytes | None, str, str, str]] = {
    "an empty file": (
        "rows.jsonl",
        b"",
        "rows.jsonl: the file is empty",
        "at least one row",
        "fill the file or name another",
    ),
    "blank lines alone": (
        "rows.jsonl",
        b"\n  \n",
        "rows.jsonl: the file holds no row",
        "at least one row",
        "fill the file or name another",
    ),
    "a CSV of a header alone": (
        "rows.csv",
        b"prompt,completion\n",
        "rows.csv: the file holds no row",
        "at least one row",
        "fill the file or name another",
    ),
    "an empty JSON list": (
        "rows.json",
        b"[]",
        "rows.json: the file holds no row",
        "at least one row",
        "fill the file or name another",
    ),
    "a blank text file": (
        "rows.txt",
        b"\n\n",
        "rows.txt: the file holds no row",
        "at least one row",
        "fill the file or name another",
    ),
    "UTF-16 with its mark": (
        "rows.jsonl",
        ROW.decode().encode("utf-16"),
        "rows.jsonl: the file is UTF-16 (by its byte order mark)",
        "UTF-8 text",
        "convert the file: iconv -f UTF-16 -t UTF-8 rows.jsonl > utf8.jsonl",
    ),
    "UTF-16 without a mark": (
        "rows.csv",
        "prompt,completion\na,b\n".encode("utf-16-le"),
        "rows.csv: every second byte or so is NUL, as in UTF-16 text",
        "UTF-8 text",
        "convert the file, for example: iconv -f UTF-16LE -t UTF-8 rows.csv > utf8.csv",
    ),
    "UTF-32": (
        "rows.jsonl",
        ROW.decode().encode("utf-32"),
        "rows.jsonl: the file is UTF-32 (by its byte order mark)",
        "UTF-8 text",
        "convert the file: iconv -f UTF-32 -t UTF-8 rows.jsonl > utf8.jsonl",
    ),
    "a Windows encoding in a CSV's header": (
        "rows.csv",
        b"prompt,r\xe9ponse\na,b\n",
        "rows.csv:1: not UTF-8: byte 0xe9 at position 9",
        "UTF-8 text",
        "convert the file, for example: iconv -f CP1252 -t UTF-8 rows.csv > utf8.csv",
    ),
    "a Windows encoding in a JSON list": (
        "rows.json",
        b'[{"prompt": "caf\xe9",\n"completion": "b"}]',
        "rows.json:1: not UTF-8: byte 0xe9 at position 17",
        "UTF-8 text",
        "convert the file, for example: iconv -f CP1252 -t UTF-8 rows.json > utf8.json",
    ),
    "gzip": (
        "rows.jsonl",
        gzip.compress(ROW),
        "rows.jsonl: the file is compressed by gzip",
        "a .jsonl file",
        "unpack it: gunzip -c rows.jsonl > unpacked.jsonl",
    ),
    "a workbook named .csv": (
        "rows.csv",
        b"PK\x03\x04\x14\x00\x06\x00[Content_Types].xml",
        "rows.csv: the file is a zip archive or an Excel workbook (.xlsx)",
        "a .csv file",
        "unpack it, or open it in the spreadsheet program and save it as CSV (UTF-8, commas)",
    ),
    "an old workbook named .csv": (
        "rows.csv",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "rows.csv: the file is an old Office document (.xls)",
        "a .csv file",
        "open it in the spreadsheet program and save it as CSV (UTF-8, commas)",
    ),
    "Parquet named .jsonl": (
        "rows.jsonl",
        parquet([{"prompt": "a", "completion": "b"}]),
        "rows.jsonl: the file is a Parquet file",
        "a .jsonl file",
        "rename it so that it ends in .parquet",
    ),
    "JSONL named .parquet": (
        "rows.parquet",
        ROW,
        "rows.parquet: the file does not begin as Parquet does (PAR1)",
        "a Parquet file",
        "write or download it again, or rename it by what it holds (.jsonl, .json, .csv)",
    ),
    "a damaged Parquet file": (
        "rows.parquet",
        parquet([{"prompt": "a", "completion": "b"}])[:-9],
        (
            "rows.parquet: not readable as Parquet: Parquet magic bytes not found in footer. Either the file is "
            "corrupted or this is not a parquet file."
        ),
        "a whole Parquet file",
        "write or download it again",
    ),
    "a web page": (
        "rows.jsonl",
        b"<!DOCTYPE html>\n<html><body>404</body></html>",
        "rows.jsonl: the file is a web page (HTML), not data",
        "the data",
        "download the data itself (on a code host: the raw file), after logging in if the site asks for it",
    ),
    "a web page named .parquet": (
        "rows.parquet",
        b"\n<html><body>login</body></html>",
        "rows.parquet: the file is a web page (HTML), not data",
        "the data",
        "download the data itself (on a code host: the raw file), after logging in if the site asks for it",
    ),
    "a Git LFS pointer": (
        "rows.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "rows.parquet: the file is a Git LFS pointer, not the data itself",
        "the data",
        "fetch the data: git lfs install && git lfs pull",
    ),
    "a JSON list named .jsonl": (
        "rows.jsonl",
        b'[{"prompt": "a", "completion": "b"}]\n',
        "rows.jsonl: the file holds one JSON list, as .json files do",
        "one JSON object on each line",
        "rename the file so that it ends in .json",
    ),
    "an indented JSON list named .jsonl": (
        "rows.jsonl",
        b'[\n  {"prompt": "a", "completion": "b"}\n]\n',
        "rows.jsonl: the file holds one JSON list, as .json files do",
        "one JSON object on each line",
        "rename the file so that it ends in .json",
    ),
    "JSONL named .json": (
        "rows.json",
        ROW + ROW,
        "rows.json: the file holds one JSON object on each line, as .jsonl files do",
        "one JSON list of objects",
        "rename the file so that it ends in .jsonl",
    ),
    "a JSON object": (
        "rows.json",
        b'{"prompt": "a", "completion": "b"}',
        "rows.json: the file holds an object",
        "one JSON list of objects",
        "put the objects into one list: [{...}, {...}]",
    ),
    "a JSON object around the list": (
        "rows.json",
        b'{"version": 1, "data": [{"prompt": "a", "completion": "b"}]}',
        "rows.json: the file holds an object",
        "one JSON list of objects",
        "keep only the list under 'data': jq .data rows.json > new.json",
    ),
    "a JSON list that is cut off": (
        "rows.json",
        b'[{"prompt": "a",\n"completion": "b"},\n{"prom',
        "rows.json:3: not valid JSON: Unterminated string starting at column 2",
        "one JSON list of objects",
        "correct the file there; where it ends too early, write or download it again",
    ),
    "a JSON file nested too deeply": (
        "rows.json",
        b"[" * 200_000,
        "rows.json: not valid JSON: it is nested too deeply",
        "one JSON list of objects",
        "correct the file",
    ),
    "semicolons in a CSV": (
        "rows.csv",
        b"prompt;completion\na;b\n",
        "rows.csv:1: the columns are separated by semicolons: 'prompt;completion'",
        "a first line of distinct column names, separated by commas",
        "save the file with commas (in a spreadsheet program: CSV UTF-8, comma delimited)",
    ),
    "tabs in a CSV": (
        "rows.csv",
        b"prompt\tcompletion\na\tb\n",
        "rows.csv:1: the columns are separated by tabs: 'prompt\\tcompletion'",
        "a first line of distinct column names, separated by commas",
        "save the file with commas (in a spreadsheet program: CSV UTF-8, comma delimited)",
    ),
    "a CSV without a header": (
        "rows.csv",
        b"a,b\nc,d\n",
        "rows.csv:2: the columns 'a', 'b' fit no format",
        (
            "the columns of one format: messages (messages), conversations (sharegpt), instruction + output "
            "(alpaca), prompt + completion (prompt_completion), english + french (task), text (text)"
        ),
        (
            "rename the columns (a CSV names them in its first line), or set data.prompt and data.completion to "
            "templates of your columns"
        ),
    ),
    "a CSV with a doubled column": (
        "rows.csv",
        b"prompt,prompt\na,b\n",
        "rows.csv:1: two columns have the same name 'prompt'",
        "a first line of distinct column names, separated by commas",
        "rename one of them",
    ),
    "a CSV with a nameless column": (
        "rows.csv",
        b"prompt,,completion\na,b,c\n",
        "rows.csv:1: column 2 has no name: 'prompt', '', 'completion'",
        "a first line of distinct column names, separated by commas",
        "name each column, or remove it",
    ),
    "an unclosed quote in a CSV": (
        "rows.csv",
        b'prompt,completion\na,b\nc,"d\ne,f\ng,h\n',
        "rows.csv:3: a quote opens in this row and is never closed: lines 3 to 5 would be one cell",
        'comma-separated cells, quoted by "',
        "close the quote, and double each quote inside a quoted cell",
    ),
    "a space in a CSV's column name": (
        "rows.csv",
        b"prompt, completion\na,b\n",
        "rows.csv:2: the columns 'prompt', ' completion' fit no format",
        (
            "the columns of one format: messages (messages), conversations (sharegpt), instruction + output "
            "(alpaca), prompt + completion (prompt_completion), english + french (task), text (text)"
        ),
        "did you mean the format prompt_completion? rename ' completion' to 'completion'",
    ),
    "mixed formats": (
        "rows.jsonl",
        ROW + b'{"instruction": "a", "output": "b"}\n',
        "rows.jsonl: mixed formats: prompt_completion (line 1), alpaca (line 2)",
        "one format in all rows",
        "split the file by format",
    ),
    "columns of two formats": (
        "rows.jsonl",
        b'{"prompt": "a", "completion": "b", "messages": []}\n',
        "rows.jsonl:1: the columns fit several formats: messages, prompt_completion",
        "columns of one format",
        "set data.format to one of messages, prompt_completion",
    ),
    "unknown columns": (
        "rows.jsonl",
        b'{"question": "a", "answer": "b"}\n',
        "rows.jsonl:1: the columns 'question', 'answer' fit no format",
        (
            "the columns of one format: messages (messages), conversations (sharegpt), instruction + output "
            "(alpaca), prompt + completion (prompt_completion), english + french (task), text (text)"
        ),
        (
            "rename the columns (a CSV names them in its first line), or set data.prompt and data.completion to "
            "templates of your columns"
        ),
    ),
    "an unknown file type": (
        "rows.xlsx",
        b"PK\x03\x04",
        "rows.xlsx: unknown file type '.xlsx'",
        "one of .jsonl, .json, .csv, .parquet, .txt",
        "open it in the spreadsheet program and save it as CSV (UTF-8, commas)",
    ),
    "tab-separated values": (
        "rows.tsv",
        b"prompt\tcompletion\na\tb\n",
        "rows.tsv: unknown file type '.tsv'",
        "one of .jsonl, .json, .csv, .parquet, .txt",
        "replace the tabs by commas (quote cells that hold commas) and name it .csv",
    ),
    "a packed file": (
        "rows.jsonl.gz",
        gzip.compress(ROW),
        "rows.jsonl.gz: unknown file type '.gz'",
        "one of .jsonl, .json, .csv, .parquet, .txt",
        "unpack it: gunzip rows.jsonl.gz",
    ),
    "no file": (
        "rows.jsonl",
        None,
        "rows.jsonl: the file does not exist",
        "an existing file",
        "correct the path; it is searched from the current folder, else from the YAML's folder",
    ),
    "plain text for a task of answers": (
        "rows.txt",
        b"Once upon a time.\n",
        ("rows.txt: plain text does not fit the task translation, which has a system prompt and the metric chrf, bleu"),
        "a task whose one metric is perplexity, without system prompt and labels",
        "name a task of your own: task: my_text, data.format: text, eval.metrics: [perplexity]",
    ),
}
# Kind -> file of one row, its content, and the message of that row; another says that no row is left.
ONLY_ROWS: dict[str, tuple[str, bytes, str, str, str]] = {
    "only faulty rows": (
        "rows.jsonl",
        b'{"prompt": "", "completion": "b"}\n',
        "rows.jsonl:1: the column 'prompt' is empty",
        "text",
        "write the text, or remove the row",
    ),
    "dates where text is expected": (
        "rows.parquet",
        parquet([{"prompt": "a", "completion": datetime.date(2024, 5, 1)}]),
        "rows.parquet:1: the column 'completion' is a date",
        "text",
        "write the text, or remove the row",
    ),
    "structs where text is expected": (
        "rows.parquet",
        parquet([{"prompt": "a", "completion": {"text": "b"}}]),
        "rows.parquet:1: the column 'completion' is an object",
        "text",
        "write the text, or remove the row",
    ),
    "raw bytes where text is expected": (
        "rows.parquet",
        parquet([{"prompt": "a", "completion": b"b"}]),
        "rows.parquet:1: the column 'completion' is raw bytes",
        "text",
        "write the text, or remove the row",
    ),
}


def config(task: str, file: str, *overrides: str) -> RunConfig:
    """A config of ``task``; ``plain`` is a task of its own, for plain text."""
    lines = ["name: faults", f"task: {task}", f"data: {{train: {file}}}"]
    if task == "plain":
        lines[2:] = [f"data: {{train: {file}, format: text}}", "eval: {metrics: [perplexity]}"]
    Path("run.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_config("run.yaml", overrides)


def message(what: str, expected: str, fix: str) -> str:
    return f"{what}\n  expected: {expected}\n  do: {fix}"


def as_bytes(row: bytes | dict[str, Any]) -> bytes:
    return row if isinstance(row, bytes) else json.dumps(row).encode()


def check(task: str, file: str, expected: str) -> None:
    """The message is exact, stops by default, and with ``on_error: drop`` the two good rows are kept."""
    with pytest.raises(DataError) as caught:
        prepare(config(task, file), control_tokens=CONTROL_TOKENS)
    assert str(caught.value) == expected
    data = examine(config(task, file, "data.on_error=drop"), control_tokens=CONTROL_TOKENS)
    assert [str(problem.fault) for problem in data.ledger.problems] == [expected]
    assert data.stopping == ()
    assert len(data.train) == 2
    report = data.report
    assert (report.rows, report.kept, report.dropped, report.duplicates) == (3, 2, 1, 0)
    places = [f"{entry.file}:{entry.line}" for entry in data.ledger.entries]
    assert places == [expected.split(": ")[0]]


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_told_and_its_neighbours_are_kept(kind: str) -> None:
    group, bad, *parts = BAD_ROWS[kind]
    first, last, task = GROUPS[group]
    Path("rows.jsonl").write_bytes(b"\n".join(map(as_bytes, (first, bad, last))) + b"\n")
    check(task, "rows.jsonl", f"rows.jsonl:2: {message(*parts)}")


@pytest.mark.parametrize("kind", BAD_FILE_ROWS)
def test_a_bad_row_of_each_kind_of_file(kind: str) -> None:
    file, content, *parts = BAD_FILE_ROWS[kind]
    Path(file).write_bytes(content)
    check("plain" if file.endswith(".txt") else "translation", file, message(*parts))


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_cannot_be_read_stops_whatever_on_error_says(kind: str) -> None:
    file, content, *parts = BAD_FILES[kind]
    if content is not None:
        Path(file).write_bytes(content)
    data = examine(config("translation", file, "data.on_error=drop"), control_tokens=CONTROL_TOKENS)
    assert [str(problem.fault) for problem in data.stopping] == [message(*parts)]


@pytest.mark.parametrize("kind", ONLY_ROWS)
def test_a_file_without_a_good_row_stops_too(kind: str) -> None:
    file, content, *parts = ONLY_ROWS[kind]
    Path(file).write_bytes(content)
    data = examine(config("translation", file, "data.on_error=drop"), control_tokens=CONTROL_TOKENS)
    assert [str(problem.fault) for problem in data.ledger.problems] == [
        message(*parts),
        message(f"{file}: no row of train is left of 1", "at least one row", "correct the rows"),
    ]
    assert [problem.line for problem in data.stopping] == [None]


def test_counts_add_up_over_faults_and_duplicates_of_several_files() -> None:
    pair = json.dumps(GROUPS["pairs"][0]).encode()
    other = json.dumps(GROUPS["pairs"][1]).encode()
    Path("a.jsonl").write_bytes(b"\n".join([pair, b"{", pair, other, b'{"prompt": ""}', pair]))
    Path("b.csv").write_bytes(b"prompt,completion\nc,d\ne,f\ng\nh,\n")
    settings = config("translation", "[a.jsonl, b.csv]", "data.on_error=drop")
    data = examine(settings, control_tokens=CONTROL_TOKENS)
    report = data.report
    assert (report.rows, report.kept, report.dropped, report.duplicates) == (10, 3, 4, 3)
    assert report.rows == report.kept + report.dropped + report.duplicates
    assert [example.source for example in data.train] == ["a.jsonl:1", "a.jsonl:4", "b.csv:3"]
    entries = [(f"{entry.file}:{entry.line}", entry.action) for entry in data.ledger.entries]
    assert sorted(entries) == [
        ("a.jsonl:2", "dropped"),
        ("a.jsonl:3", "duplicate"),
        ("a.jsonl:5", "dropped"),
        ("a.jsonl:6", "duplicate"),
        ("b.csv:2", "duplicate"),
        ("b.csv:4", "dropped"),
        ("b.csv:5", "dropped"),
    ]


def test_there_are_enough_kinds() -> None:
    kinds = [*BAD_ROWS, *BAD_FILE_ROWS, *BAD_FILES, *ONLY_ROWS]
    assert len(set(kinds)) == len(kinds) >= 60
