"""Formats: detection over all rows, and one conversation from each way of writing it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_kit.format_detection import detect_format, extra_columns
from qlora_kit.formats import DataFault, Message, extra_fields, to_example
from qlora_kit.formats import to_messages as convert
from qlora_kit.tasks import TASKS

QA, CODE, SENTIMENT = TASKS["question_answering"], TASKS["code_generation"], TASKS["sentiment"]
PLAIN = replace(QA, system_prompt="")
EXPECTED = (
    Message("system", "Answer the question from the text."),
    Message("user", "The box is red.\n\nWhat is red?"),
    Message("assistant", "the box"),
)
USER, ANSWER = EXPECTED[1].content, EXPECTED[2].content
SAME: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]},
    "sharegpt": {"conversations": [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}]},
    "alpaca": {"instruction": "What is red?", "input": "The box is red.", "output": ANSWER},
    "prompt_completion": {"prompt": USER, "completion": ANSWER},
    "task": {"context": "The box is red.", "question": "What is red?", "answer": ANSWER},
}


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize("name", SAME)
def test_each_format_gives_the_same_conversation(name: str) -> None:
    assert detect_format([SAME[name]], QA) == name
    assert convert(SAME[name], format=name, task=QA) == EXPECTED


def test_the_rows_own_system_turn_wins() -> None:
    for record, name in (
        (turns(("system", "Be brief."), ("user", USER), ("assistant", ANSWER)), "messages"),
        (SAME["sharegpt"] | {"system": "Be brief."}, "sharegpt"),
    ):
        assert convert(record, format=name, task=QA) == (Message("system", "Be brief."), *EXPECTED[1:])
    assert convert(SAME["messages"], format="messages", task=PLAIN) == EXPECTED[1:]


def test_alpaca_with_and_without_input() -> None:
    row = {"instruction": "Add 1 to it.", "input": "x = 3", "output": "4"}
    assert convert(row, format="alpaca", task=CODE)[1].content == "Add 1 to it.\n\nx = 3"
    for empty in ({"input": ""}, {"input": None}):
        assert convert(row | empty, format="alpaca", task=QA)[1].content == "Add 1 to it."
    del row["input"]
    assert convert(row, format="alpaca", task=QA)[1].content == "Add 1 to it."


def test_messages_with_parts_tools_and_many_turns() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    pairs = [("user", parts), ("assistant", "1"), ("tool", "t"), ("assistant", "2"), ("user", "c"), ("assistant", "3")]
    got = convert(turns(*pairs), format="messages", task=PLAIN)
    assert [message.content for message in got] == ["ab", "1", "t", "2", "c", "3"]
    assert [message.role for message in got] == [role for role, _ in pairs]


def test_sharegpt_roles() -> None:
    roles = ("system", "human", "gpt", "function", "gpt", "user", "assistant")
    record = {"conversations": [{"from": role, "value": "x"} for role in roles]}
    expected = ["system", "user", "assistant", "tool", "assistant", "user", "assistant"]
    assert [message.role for message in convert(record, format="sharegpt", task=QA)] == expected


def test_prompt_completion_as_message_lists() -> None:
    record = {"prompt": [{"role": "user", "content": USER}], "completion": [{"role": "assistant", "content": ANSWER}]}
    assert convert(record, format="prompt_completion", task=QA) == EXPECTED


def test_detection_looks_at_all_rows() -> None:
    assert detect_format([{"broken": 1}, SAME["alpaca"], {"instruction": "", "output": ""}], QA) == "alpaca"
    own = replace(QA, fields=("instruction", "output"), prompt="{instruction}", completion="{output}")
    assert detect_format([SAME["alpaca"]], own) == "task"  # the config's template asks for these columns


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no rows"),
        ([SAME["alpaca"], SAME["alpaca"], SAME["messages"]], "mixed formats: alpaca (line 2), messages (line 6)"),
        ([{"a": 1, "b": 2}], "the columns 'a', 'b' fit no format"),
        ([SAME["messages"] | SAME["alpaca"]], "the columns fit several formats: messages, alpaca"),
    ],
)
def test_detection_faults(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataFault) as caught:
        detect_format(rows, QA, lines=[2, 4, 6][: len(rows)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("record", "name", "message"),
    [
        ({"prompt": "x"}, "prompt_completion", "the column 'completion' is missing (the row has 'prompt')"),
        ({"prompt": "x", "completion": None}, "prompt_completion", "'completion' is null"),
        ({"prompt": "x", "completion": []}, "prompt_completion", "'prompt' is text and 'completion' is a list"),
        ({"prompt": "x", "completion": " \n"}, "prompt_completion", "the column 'completion' is empty"),
        ({"prompt": "", "completion": "x"}, "prompt_completion", "the column 'prompt' is empty"),
        ({"instruction": ["x"], "output": "y"}, "alpaca", "'instruction' is a list"),
        ({"instruction": "x", "output": True}, "alpaca", "'output' is true/false"),
        ({"instruction": "x", "input": {}, "output": "y"}, "alpaca", "'input' is an object"),
        ({"messages": []}, "messages", "the column 'messages' is an empty list"),
        ({"messages": None}, "messages", "the column 'messages' is null"),
        ({"messages": ["x"]}, "messages", "turn 1 of 'messages' is text"),
        ({"messages": [{"from": "human", "value": "x"}]}, "messages", "has no 'role' (it has 'from', 'value')"),
        (turns(("usr", "x"), ("assistant", "y")), "messages", "unknown role 'usr'"),
        (turns(("user", None), ("assistant", "y")), "messages", "the content of turn 1 of 'messages' is null"),
        (turns(("user", [{"type": "image_url"}]), ("assistant", "y")), "messages", "is of type 'image_url'"),
        (turns(("user", "x")), "messages", "the last turn is user"),
        (turns(("assistant", "x")), "messages", "turn 1: assistant stands at the start"),
        (turns(("user", "x"), ("user", "x"), ("assistant", "y")), "messages", "turn 2: user stands after user"),
        (turns(("user", "x"), ("system", "x"), ("assistant", "y")), "messages", "turn 2: system stands after user"),
        (turns(("system", ""), ("user", "x"), ("assistant", "y")), "messages", "turn 1 (system) is empty"),
        ({"conversations": [{"from": "gtp", "value": "x"}]}, "sharegpt", "unknown role 'gtp'"),
        ({"context": "x", "question": "y"}, "task", "the column 'answer' is missing"),
    ],
)
def test_bad_rows(record: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(DataFault) as caught:
        convert(record, format=name, task=QA)
    assert message in caught.value.what
    assert caught.value.expected
    assert caught.value.fix


def test_system_twice_is_refused() -> None:
    record = {"conversations": [{"from": "system", "value": "x"}, {"from": "human", "value": "x"}], "system": "y"}
    with pytest.raises(DataFault, match="a 'system' column and a system turn"):
        convert(record, format="sharegpt", task=QA)


def test_labels_are_checked() -> None:
    assert convert({"text": "x", "label": "neutral"}, format="task", task=SENTIMENT)[-1].content == "neutral"
    with pytest.raises(DataFault, match="did you mean 'positive'"):
        convert({"text": "x", "label": "Positive"}, format="task", task=SENTIMENT)


def test_numbers_in_a_column_are_written_out() -> None:
    task = replace(SENTIMENT, labels=())
    assert convert({"text": "x", "label": 3}, format="task", task=task)[-1].content == "3"


@pytest.mark.parametrize("tests", [["assert f() == 1"], '["assert f() == 1"]', "assert f() == 1"])
def test_extra_fields_of_code_rows(tests: Any) -> None:
    record = {"prompt": "x", "completion": "y", "tests": tests, "id": 3}
    example = to_example(record, format="prompt_completion", task=CODE, source="a.jsonl:3")
    assert example.extra == {"tests": ["assert f() == 1"]}
    assert example.source == "a.jsonl:3"
    assert extra_columns(record, format="prompt_completion", task=CODE) == ("id",)
    assert extra_columns(record, format="prompt_completion", task=QA) == ("id", "tests")
    assert extra_fields(record, QA) == {}


@pytest.mark.parametrize("tests", [[], [1], [""], 3, "[broken", ""])
def test_bad_extra_fields(tests: Any) -> None:
    with pytest.raises(DataFault, match="tests"):
        extra_fields({"tests": tests}, CODE)
