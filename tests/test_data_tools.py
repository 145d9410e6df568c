"""Tool calls and plain texts from the record to the mask, held against TRL's masks and the template's own rendering."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import trl_template

from qlora_kit.conversation import DataFault, Example, Message, ToolCall, check_texts
from qlora_kit.data.chat import render_prompt, render_prompts
from qlora_kit.data.duplicates import example_digest
from qlora_kit.data.encoding import Encoded, Unencodable, encode_rows, self_check
from qlora_kit.errors import BaseModelError
from qlora_kit.formats import to_example
from qlora_kit.tasks import Task

STOP = "<|im_end|>"
TASK = Task("own", "", (), "", "", "", ("perplexity",), 16)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "day": {"type": "integer"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


PARIS = call("weather", {"town": "Paris", "day": 2})
USER = {"role": "user", "content": "How is Paris?"}
END = {"role": "assistant", "content": "It is fine."}
RESULT = {"role": "tool", "content": '{"sky": "clear"}'}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one call": [USER, {"role": "assistant", "tool_calls": [PARIS]}, RESULT, END],
    "text and call": [USER, {"role": "assistant", "content": "Let me look.", "tool_calls": [PARIS]}, RESULT, END],
    "two calls at once": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [PARIS, call("clock", {})]},
        RESULT,
        {"role": "tool", "content": "12:00", "name": "clock"},
        END,
    ],
    "ends with a call": [{"role": "system", "content": "s"}, USER, {"role": "assistant", "tool_calls": [PARIS]}],
    "no call was needed": [USER, END],
    "call upon call": [
        USER,
        {"role": "assistant", "tool_calls": [call("clock", {})]},
        {"role": "tool", "content": ""},
        {
            "role": "assistant",
            "tool_calls": [call("weather", {"town": "Été 🙂", "day": None, "deep": [1.5, {"x": True}]})],
        },
        RESULT,
        END,
    ],
}


def example(messages: Any, tools: Any = None, *, format: str = "messages", column: str = "messages") -> Example:
    record = {column: messages} | ({} if tools is None else {"tools": tools})
    return to_example(record, format=format, task=TASK, source="f.jsonl:1")


def fault(messages: Any, tools: Any = None) -> str:
    with pytest.raises(DataFault) as caught:
        example(messages, tools)
    return caught.value.what


def supervised(encoded: Encoded | Unencodable, tokenizer: Any) -> list[str]:
    assert isinstance(encoded, Encoded), encoded
    texts, before = [], -100
    for label in encoded.labels:
        if label != -100:
            texts = [*texts, []] if before == -100 else texts
            texts[-1].append(label)
        before = label
    return [tokenizer.decode(ids) for ids in texts]


def test_openai_json_text_and_sharegpt_give_the_same_conversation() -> None:
    expected = (
        Message("user", "How is Paris?"),
        Message("assistant", "", (ToolCall("weather", '{"town": "Paris", "day": 2}'),)),
        Message("tool", '{"sky": "clear"}'),
        Message("assistant", "It is fine."),
    )
    tools = (json.dumps(WEATHER),)
    as_text = {"role": "assistant", "content": "", "tool_calls": [call("weather", '{"town": "Paris", "day": 2}')]}
    for messages in (
        TALKS["one call"],
        [USER, as_text, RESULT, END],
        [USER, as_text | {"tool_calls": [PARIS["function"]]}, RESULT, END],
        json.dumps(TALKS["one call"]),
    ):
        for given in ([WEATHER], json.dumps([WEATHER]), [WEATHER["function"]], json.dumps([WEATHER["function"]])):
            got = example(messages, given)
            assert (got.messages, got.tools) == (expected, tools)
    value = json.dumps({"name": "weather", "arguments": {"town": "Paris", "day": 2}})
    roles = [("human", USER["content"]), ("function_call", value), ("observation", RESULT["content"])]
    sharegpt = [{"from": role, "value": text} for role, text in (*roles, ("gpt", END["content"]))]
    got = example(sharegpt, json.dumps([WEATHER["function"]]), format="sharegpt", column="conversations")
    assert (got.messages, got.tools) == (expected, tools)


def test_calls_written_in_the_text_may_have_results() -> None:
    """As the Hermes data sets write them, for bases whose template renders them so."""
    got = example([USER, {"role": "assistant", "content": '<tool_call>{"name": "weather"}</tool_call>'}, RESULT, END])
    assert [message.role for message in got.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([USER, RESULT, END], None, "turn 2: tool stands after user"),
        ([RESULT, END], None, "turn 1: tool stands at the start"),
        ([*TALKS["one call"], RESULT, END], None, "turn 5 (tool) is result 1, but no call was made"),
        ([*TALKS["one call"][:3], RESULT, END], None, "turn 4 (tool) is result 2, but 1 call was made"),
        (TALKS["one call"], [CLOCK], "turn 2 (assistant) calls the unknown tool 'weather'"),
        ([USER, END, END], None, "turn 3: assistant stands after assistant"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", "{")]}], None, "are not JSON: Expecting property name"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", '{"a": 1, "a": 2}')]}], None, "'a' appears twice"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", [1])]}], None, "(f) are a list"),
        ([USER, {"role": "assistant", "tool_calls": [call("f", None)]}], None, "(f) has no arguments"),
        (
            [USER, {"role": "assistant", "tool_calls": [call("", {})]}],
            None,
            "tool call 1 of turn 2 of 'messages' has no",
        ),
        ([USER, {"role": "assistant", "tool_calls": "look"}], None, "is text, but not JSON"),
        ([USER | {"tool_calls": [PARIS]}, END], None, "turn 1 of 'messages' (user) has tool_calls"),
        (TALKS["one call"], [CLOCK, CLOCK], "tool 2 of 'tools' has the name 'clock' again"),
        (TALKS["one call"], [{"type": "function", "function": {}}], "tool 1 of 'tools' has no name"),
        (TALKS["one call"], {"name": "clock"}, "the column 'tools' is an object"),
        (
            [
                USER,
                {"role": "assistant", "tool_calls": [PARIS | {"id": "a1"}]},
                RESULT | {"tool_call_id": "b2"},
                END,
            ],
            None,
            "turn 3 (tool) answers the call 'b2', which was not made",
        ),
        ([USER, END | {"function_call": {"name": "f"}}], None, "has the key 'function_call'"),
        ([USER, END | {"weight": 0}], None, "has the key 'weight' (0), which would have no effect"),
    ],
)
def test_tool_faults(messages: Any, tools: Any, message: str) -> None:
    assert message in fault(messages, tools)


def test_control_tokens_are_found_in_calls_tools_and_names() -> None:
    import re

    control = re.compile(re.escape(STOP))
    bad = [
        example([USER, {"role": "assistant", "tool_calls": [call("f", {"a": f"x{STOP}"})]}]),
        example([USER, END], [{"name": "clock", "description": STOP}]),
        example([*TALKS["one call"][:2], RESULT | {"name": STOP}, END]),
        to_example({"text": f"a{STOP}"}, format="text", task=TASK, source="f.txt:1"),
    ]
    places = ["a tool call of turn 2 (assistant)", "the column 'tools'", "the name of turn 3 (tool)", "the text"]
    for row, place in zip(bad, places, strict=True):
        with pytest.raises(DataFault) as caught:
            check_texts(row, control)
        assert caught.value.what == f"{place} holds the control token {STOP}"
    check_texts(example(TALKS["two calls at once"], [WEATHER, CLOCK]), control)


@pytest.mark.parametrize("tools", [None, [WEATHER, CLOCK]])
def test_mask_equals_trl_assistant_mask_but_for_the_template_line_breaks(chatml_tokenizer, tools) -> None:
    """TRL's training template marks "\\n" + turn + stop + "\\n"; ours is the same without the two line breaks."""
    newline = chatml_tokenizer("\n", add_special_tokens=False)["input_ids"]
    for messages in TALKS.values():
        plain = [{"content": "", **turn} for turn in messages]
        plain = [turn | {"content": turn["content"] or ""} for turn in plain]
        theirs = chatml_tokenizer.apply_chat_template(
            plain,
            tools=tools,
            chat_template=trl_template("qwen2_5_training"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = list(theirs["assistant_masks"])
        edges = [0, *mask, 0]
        for place in range(len(mask)):
            if edges[place + 1] and not (edges[place] and edges[place + 2]):
                assert theirs["input_ids"][place] == newline[0]
                mask[place] = 0
        expected = [token if on else -100 for token, on in zip(theirs["input_ids"], mask, strict=True)]
        (ours,) = encode_rows([example(messages, tools)], chatml_tokenizer, loss_on="all_assistant")
        assert isinstance(ours, Encoded)
        last = max(place for place, label in enumerate(expected) if label != -100) + 1
        assert ours.input_ids == theirs["input_ids"][:last]
        assert ours.labels == expected[:last]


def test_calls_follow_the_prompt_of_generation_and_pass_the_self_check(chatml_tokenizer) -> None:
    rows = [
        example(messages, tools)
        for messages in TALKS.values()
        for tools in (None, [WEATHER, CLOCK], [WEATHER, {**CLOCK, "function": {"name": "clock"}}])
    ]
    decomposed = [USER, {"role": "assistant", "tool_calls": [call("weather", {"town": "Te\u0301ne\u0301s"})]}]
    rows.append(example(decomposed))  # the tokenizer composes the letters and accents
    self_check(rows, chatml_tokenizer, loss_on="all_assistant")
    batch = encode_rows(rows, chatml_tokenizer, loss_on="all_assistant")
    assert batch == [encode_rows([row], chatml_tokenizer, loss_on="all_assistant")[0] for row in rows]
    for row, encoded in zip(rows, batch, strict=True):
        assert isinstance(encoded, Encoded)
        prompt = render_prompts([row.messages[:-1]], chatml_tokenizer, tools=[row.tools])[0]
        plain = [{"role": m.role, "content": m.content} for m in row.messages[:1]]
        opening = chatml_tokenizer.apply_chat_template(
            plain, tools=[json.loads(tool) for tool in row.tools] or None, tokenize=True, return_dict=False
        )
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt) - 1] == -100
        assert encoded.labels[len(prompt)] != -100
        assert encoded.input_ids[: len(opening) - 1] == opening[:-1]
    one, *_ = batch
    assert supervised(one, chatml_tokenizer) == [
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Paris", "day": 2}}\n</tool_call><|im_end|>',
        "It is fine.<|im_end|>",
    ]


def test_self_check_catches_a_call_that_is_not_supervised(make_tokenizer) -> None:
    from tokenizers import normalizers

    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    rows = [example(TALKS["one call"], [WEATHER])]
    self_check(rows, tokenizer, loss_on="all_assistant")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("weather", "w")
    with pytest.raises(BaseModelError, match="decodes to"):
        self_check(rows, tokenizer, loss_on="all_assistant")


def test_other_templates_render_calls_in_their_own_way(make_tokenizer) -> None:
    llama = make_tokenizer("llama3", "llama3_1", eos_token="<|eot_id|>")
    rows = [example(TALKS[name], [WEATHER, CLOCK]) for name in ("one call", "text and call", "two calls at once")]
    one, beside, two = encode_rows(rows, llama, loss_on="all_assistant")
    assert supervised(one, llama) == [
        '{"name": "weather", "parameters": {"town": "Paris", "day": 2}}<|eot_id|>',
        "It is fine.<|eot_id|>",
    ]
    assert isinstance(beside, Unencodable)
    assert beside.reason == "turn 2: the chat template leaves out the text beside the tool call"
    assert isinstance(two, Unencodable)
    assert "only supports single tool-calls" in two.reason
    for name in ("qwen3", "qwen3_5_nothink"):  # calls as JSON, calls as XML
        tokenizer = make_tokenizer("qwen", name, eos_token=STOP)
        row = example(TALKS["one call"], [WEATHER])
        (encoded,) = encode_rows([replace(row, messages=row.messages[:2])], tokenizer, loss_on="last")
        (text,) = supervised(encoded, tokenizer)
        assert "weather" in text
        assert "Paris" in text
        assert text.endswith(STOP)


@pytest.mark.parametrize("name", ["phi3", "gemma", "llama3"])
def test_templates_that_do_not_know_tools_are_refused(make_tokenizer, name) -> None:
    if name == "llama3":
        tokenizer = make_tokenizer("llama3", name, eos_token="<|eot_id|>")
    else:
        tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.chat_template = trl_template(name).replace("<|end|>", STOP).replace("<end_of_turn>", STOP)
    plain = example([USER, END])
    assert isinstance(encode_rows([plain], tokenizer, loss_on="last")[0], Encoded)
    for row in (example([USER, END], [CLOCK]), example(TALKS["one call"])):
        with pytest.raises(BaseModelError, match="does not know tools"):
            encode_rows([plain, row], tokenizer, loss_on="last")


def test_plain_text_is_what_trl_trains_on(chatml_tokenizer, make_tokenizer, tmp_path) -> None:
    from test_data_encoding import trl_dataset

    texts = ["Once upon a time.", "  two  spaces \n", "naïve 你好 🙂"]
    rows = [to_example({"text": text}, format="text", task=TASK, source=f"f:{n}") for n, text in enumerate(texts, 1)]
    theirs = trl_dataset([{"text": text} for text in texts], chatml_tokenizer, tmp_path)
    ours = encode_rows(rows, chatml_tokenizer, loss_on="all_assistant")
    for mine, its in zip(ours, theirs, strict=True):
        assert isinstance(mine, Encoded)
        assert mine.input_ids == its["input_ids"]
        assert mine.labels == [-100, *its["labels"][1:]]  # nothing predicts the first token
        assert mine.input_ids.count(chatml_tokenizer.eos_token_id) == 1
    self_check(rows, chatml_tokenizer, loss_on="all_assistant")
    mixed = [rows[0], example([USER, END]), rows[1]]
    assert encode_rows(mixed, chatml_tokenizer, loss_on="last") == [
        ours[0],
        encode_rows(mixed[1:2], chatml_tokenizer, loss_on="last")[0],
        ours[1],
    ]


def test_plain_text_begins_with_the_bos_that_the_tokenizer_adds(make_tokenizer) -> None:
    from tokenizers import processors

    llama = make_tokenizer("llama3", "llama3", eos_token="<|end_of_text|>")
    bos = llama.bos_token_id
    llama.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    rows = [to_example({"text": "Once upon."}, format="text", task=TASK, source="f:1")]
    (encoded,) = encode_rows(rows, llama, loss_on="last")
    assert isinstance(encoded, Encoded)
    assert llama.decode(encoded.input_ids) == "<|begin_of_text|>Once upon.<|end_of_text|>"
    assert supervised(encoded, llama) == ["Once upon.<|end_of_text|>"]
    self_check(rows, llama, loss_on="last")
    template, llama.chat_template = llama.chat_template, None
    with pytest.raises(BaseModelError, match="no chat template"):  # before training, not when it writes the contract
        self_check(rows, llama, loss_on="last")
    llama.chat_template, llama.eos_token = template, None
    with pytest.raises(BaseModelError, match="no EOS token"):
        encode_rows(rows, llama, loss_on="last")


def test_digests_tell_apart_what_is_learned_and_nothing_else() -> None:
    rows = [example(messages, tools) for messages in TALKS.values() for tools in (None, [WEATHER, CLOCK])]
    rows.append(to_example({"text": "How is Paris?"}, format="text", task=TASK, source="f:1"))
    assert len({example_digest(row) for row in rows}) == len(rows)
    with_id = [USER, {"role": "assistant", "tool_calls": [PARIS | {"id": "a1"}]}, RESULT | {"tool_call_id": "a1"}, END]
    assert example_digest(example(with_id)) == example_digest(example(TALKS["one call"]))


def test_prompt_with_tools_is_the_templates_own(chatml_tokenizer) -> None:
    prompt = render_prompts([[Message("user", "Hi")]], chatml_tokenizer, tools=[(json.dumps(WEATHER),)])[0]
    assert prompt == chatml_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tools=[WEATHER], add_generation_prompt=True, return_dict=False
    )
    assert prompt != render_prompt([Message("user", "Hi")], chatml_tokenizer)


@pytest.mark.parametrize("kind", ["tools", "text"])
def test_tools_and_plain_text_reach_the_tokens_through_the_check(kind, tmp_path, monkeypatch) -> None:
    """The whole pipeline counts the tokens that the encoding of the same rows has: no tool and no text is lost."""
    from qlora_kit.base_files import resolve_description
    from qlora_kit.config import load_config
    from qlora_kit.data_check import check
    from qlora_kit.models import load_tokenizer

    monkeypatch.chdir(tmp_path)
    if kind == "tools":
        rows = [{"messages": messages, "tools": [WEATHER, CLOCK]} for messages in TALKS.values()]
    else:
        rows = [{"text": "Once upon a time."}, {"text": "It rained."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    name = "messages" if kind == "tools" else "text"
    (tmp_path / "run.yaml").write_text(
        f"name: t\ntask: own\ndata: {{train: rows.jsonl, format: {name}}}\neval: {{metrics: [perplexity]}}\n",
        encoding="utf-8",
    )
    data = check(load_config("run.yaml")).data
    examples = [to_example(row, format=name, task=TASK, source="rows.jsonl:1") for row in rows]
    tiny = load_tokenizer(resolve_description("tiny"))
    encoded = [row for row in encode_rows(examples, tiny, loss_on="all_assistant") if isinstance(row, Encoded)]
    assert not data.stopping
    assert data.report.total_tokens == sum(len(row.input_ids) for row in encoded)
    assert data.report.supervised_tokens == sum(row.supervised_tokens for row in encoded)
