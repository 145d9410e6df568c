"""The server's answers as OpenAI's own client sees them, over an engine that follows a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from faults.runs import make_run
from live_server import LiveServer, serving
from openai import OpenAI
from scripted_engine import ScriptedAnswer, ScriptedEngine, wait_until

from qlora_kit.conversation import Message
from qlora_kit.engine import Delta
from qlora_kit.errors import AdapterError, ConfigError, DataError, GuardError, Interrupted
from qlora_kit.server.protocol import Load

SOUP: list[Any] = [{"role": "user", "content": "Good soup."}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Two adapters: reviews with a contract, plain without."""
    root = tmp_path_factory.mktemp("served")
    make_run(root / "reviews")
    make_run(root / "plain", contract=None)
    with serving(ScriptedEngine(root), root) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: LiveServer) -> OpenAI:
    return live.client()


def engine_of(live: LiveServer) -> ScriptedEngine:
    engine = live.service.engine
    assert isinstance(engine, ScriptedEngine)
    return engine


def test_models_are_the_base_and_every_adapter(live: LiveServer, client: OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["base", "plain", "reviews"]
    cards = {model["id"]: model["card"] for model in live.send("GET", "/v1/models").json["data"]}
    assert cards["reviews"]["task"] == "sentiment"
    assert cards["reviews"]["scores"] == {"accuracy": 0.95}
    assert cards["reviews"]["base"] == "Qwen/Qwen2.5-7B-Instruct"
    assert cards["plain"]["task"] is None
    assert client.models.retrieve("reviews").id == "reviews"
    with pytest.raises(openai.NotFoundError, match="Did you mean 'reviews'"):
        client.models.retrieve("review")


def test_chat_is_answered_by_the_model_that_is_named(client: OpenAI) -> None:
    for model in ("base", "reviews"):
        reply = client.chat.completions.create(model=model, messages=SOUP)
        assert reply.choices[0].message.content == f"{model}: Good soup."
        assert (reply.choices[0].finish_reason, reply.model) == ("stop", model)
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (2, 3, 5)


def test_a_conversation_reaches_the_engine_as_it_is(live: LiveServer, client: OpenAI) -> None:
    first = client.chat.completions.create(model="base", messages=SOUP)
    turns: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        *SOUP,
        first.choices[0].message,  # an answer goes back with all of its fields
        {"role": "user", "content": "And the bread?"},
    ]
    reply = client.chat.completions.create(model="base", messages=turns)
    assert reply.choices[0].message.content == "base: [Be brief.] And the bread?"
    assert engine_of(live).requests[-1].conversation == (
        Message("system", "Be brief."),
        Message("user", "Good soup."),
        Message("assistant", "base: Good soup."),
        Message("user", "And the bread?"),
    )


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_adds_up_to_the_answer(client: OpenAI, usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(model="reviews", messages=SOUP, stream=True, **options))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert [choice.delta.content for choice in choices] == ["", "reviews:", " Good", " soup.", None]
    assert [choice.finish_reason for choice in choices] == [None, None, None, None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    found = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert [(item.prompt_tokens, item.completion_tokens) for item in found] == ([(2, 3)] if usage else [])
    assert (chunks[-1].choices == []) is usage


def test_a_stream_is_events_that_end_with_a_mark(live: LiveServer) -> None:
    reply = live.post("/v1/chat/completions", {"model": "base", "messages": SOUP, "stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, mark, rest = reply.text.split("\n\n")
    assert (mark, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


def test_sampling_is_the_requests_on_top_of_the_adapters(live: LiveServer, client: OpenAI) -> None:
    client.chat.completions.create(
        model="reviews",
        messages=SOUP,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        max_completion_tokens=5,
        stop="x",
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1},
    )
    sampling = engine_of(live).requests[-1].sampling
    assert sampling is not None
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 3, 0.1)
    assert (sampling.seed, sampling.max_new_tokens, sampling.stop) == (7, 5, ("x",))
    assert sampling.repetition_penalty == 1.1
    client.chat.completions.create(model="reviews", messages=SOUP)
    assert engine_of(live).requests[-1].sampling == engine_of(live).default_sampling("reviews")


def test_length_and_stop_end_an_answer(client: OpenAI) -> None:
    cut = client.chat.completions.create(model="base", messages=SOUP, max_tokens=2).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("base: Good", "length")
    stopped = client.chat.completions.create(model="base", messages=SOUP, stop=["soup", "?"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("base: Good ", "stop")


def test_several_choices_have_seeds_of_their_own(live: LiveServer, client: OpenAI) -> None:
    reply = client.chat.completions.create(model="base", messages=SOUP, n=3, seed=2**32 - 1)
    assert [choice.message.content for choice in reply.choices] == [
        f"base: Good soup. #{seed}" for seed in (2**32 - 1, 0, 1)
    ]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 12)
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(model="base", messages=SOUP, n=3, seed=4, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {index: f"base: Good soup. #{4 + index}" for index in range(3)}


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_a_chat(client: OpenAI, stream: bool) -> None:
    fields: Any = {"model": "base", "messages": SOUP, "logprobs": True, "top_logprobs": 2, "max_tokens": 2}
    if stream:
        chunks = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**fields, stream=True)]
        tokens = [token for found in chunks if found is not None for token in found.content or ()]
    else:
        found = client.chat.completions.create(**fields).choices[0].logprobs
        assert found is not None
        tokens = found.content or []
    assert [(token.token, token.logprob) for token in tokens] == [("t0", -1.0), ("t1", -1.0)]
    assert [(item.token, item.logprob) for item in tokens[1].top_logprobs] == [("t1", -1.0), ("t2", -2.0)]
    assert tokens[0].bytes == list(b"t0")


def test_completions_of_texts_and_token_ids(live: LiveServer, client: OpenAI) -> None:
    reply = client.completions.create(model="base", prompt="one two three")
    assert reply.choices[0].text == "base: 0 1 2"
    assert reply.choices[0].finish_reason == "stop"
    assert engine_of(live).requests[-1].conversation == ()
    reply = client.completions.create(model="reviews", prompt=["one two", "one"], n=2)
    assert [choice.text for choice in reply.choices] == ["reviews: 0 1"] * 2 + ["reviews: 0"] * 2
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 10)
    reply = client.completions.create(model="base", prompt=[[5, 6], [7]])
    assert [choice.text for choice in reply.choices] == ["base: 5 6", "base: 7"]
    chunks = list(
        client.completions.create(
            model="base", prompt=[5, 6], stream=True, stream_options={"include_usage": True}, logprobs=1
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "base: 5 6"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3
    offsets = [chunk.choices[0].logprobs.text_offset for chunk in chunks[:-1] if chunk.choices[0].logprobs is not None]
    assert offsets == [[0], [5], [7]]


def test_log_probabilities_of_a_completion(client: OpenAI) -> None:
    found = client.completions.create(model="base", prompt="one", logprobs=2).choices[0].logprobs
    assert found is not None
    assert found.tokens == ["t0", "t1"]
    assert found.top_logprobs == [{"t0": -1.0, "t1": -2.0}, {"t1": -1.0, "t2": -2.0}]


def test_values_that_ask_for_nothing_are_accepted(client: OpenAI) -> None:
    neutral: dict[str, Any] = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "store": False,
        "metadata": {"run": "1"},
        "user": "someone",
        "modalities": ["text"],
        "prompt_cache_options": {"mode": "implicit"},
        "prompt_cache_retention": "in_memory",
        "prompt_cache_key": "key",
        "logprobs": False,
        "n": 1,
    }
    reply = client.chat.completions.create(model="base", messages=SOUP, **neutral)
    assert reply.choices[0].message.content == "base: Good soup."
    older: dict[str, Any] = {"best_of": 1, "echo": False, "suffix": "", "frequency_penalty": 0}
    assert client.completions.create(model="base", prompt="one", **older).choices[0].text == "base: 0"


def test_health_metrics_and_description(live: LiveServer, client: OpenAI) -> None:
    assert live.send("GET", "/health").json == {"status": "ok"}
    client.chat.completions.create(model="plain", messages=SOUP)
    metrics = live.send("GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert float(lines['qlora_kit_tokens_total{kind="completion",model="plain"}']) >= 3
    assert float(lines["qlora_kit_adapters"]) == 2
    assert float(lines['qlora_kit_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    paths = live.send("GET", "/openapi.json").json["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/health", "/metrics"} <= paths.keys()
    assert live.send("GET", "/docs").status == 404  # it would load scripts from elsewhere


def test_health_says_that_the_engine_has_failed(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.service.engine, "load_now", lambda: Load(running=0, waiting=0, alive=False))
    reply = live.send("GET", "/health")
    assert (reply.status, reply.json) == (503, {"status": "failed"})


def test_what_fails_in_the_engine_is_told_by_its_kind(live: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    for error, status, told in (
        (ConfigError("the prompt is 900 tokens long", expected="less than 512", fix="x"), 400, "900 tokens long"),
        (DataError("the chat template refuses it", expected="a conversation", fix="x"), 400, "refuses"),
        (AdapterError("/secret/place: gone", expected="x", fix="x"), 503, "cannot be used now"),
        (Interrupted("the engine was closed", expected="x", fix="x"), 503, "is stopping"),
        (GuardError("memory ran out at /secret/place", expected="x", fix="x"), 500, "its log says why"),
    ):
        for stream in (False, True):
            engine_of(live).failure = error
            try:
                reply = live.post("/v1/chat/completions", {"model": "base", "messages": SOUP, "stream": stream})
            finally:
                engine_of(live).failure = None
            assert reply.status == status
            assert told in reply.json["error"]["message"]
            assert "secret" not in reply.text
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sum("/secret/place" in text for text in logged) == 4
    assert "Traceback" not in caplog.text


def disconnects(live: LiveServer) -> list[str]:
    return [
        line for line in live.send("GET", "/metrics").text.splitlines() if line.startswith("qlora_kit_disconnects_t")
    ]


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    poll, pieces = ScriptedAnswer.poll, []

    def fail(answer: ScriptedAnswer) -> Delta | None:
        if len(pieces) == 2:
            raise GuardError("memory ran out at 7 tokens", expected="x", fix="x")
        piece = poll(answer)
        pieces.extend([] if piece is None else [piece])
        return piece

    monkeypatch.setattr(ScriptedAnswer, "poll", fail)
    gone = disconnects(live)
    reply = live.post("/v1/chat/completions", {"model": "base", "messages": SOUP, "stream": True})
    *events, rest = reply.text.split("\n\n")
    assert (reply.status, rest) == (200, "")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "7 tokens" in caplog.text
    assert "Traceback" not in caplog.text
    assert disconnects(live) == gone  # the client was there


def test_a_model_that_goes_while_its_card_is_made(live: LiveServer) -> None:
    models = live.service.models
    before, looks = models.adapters, []

    class Name(str):
        __slots__ = ()
        __eq__ = str.__eq__

        def __hash__(self) -> int:
            looks.append(self)
            if len(looks) == 1:  # behind the first look
                models.set({})
            return str.__hash__(self)

    try:
        assert models.card(Name("reviews")).id == "reviews"
    finally:
        models.set(before)


def test_a_bug_is_told_without_its_traceback_and_logged_with_it(
    live: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    engine_of(live).failure = RuntimeError("in /secret/place")
    try:
        reply = live.post("/v1/chat/completions", {"model": "base", "messages": SOUP})
    finally:
        engine_of(live).failure = None
    assert reply.status == 500
    assert reply.json["error"]["code"] == "internal_error"
    assert "secret" not in reply.text
    wait_until(lambda: "/secret/place" in caplog.text, "the log has the reason")
