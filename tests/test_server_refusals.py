"""What the server refuses: malformed requests, strangers, too much at once; each with its status, in OpenAI's shape."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import openai
import pytest
from faults.runs import make_run
from live_server import LiveServer, Reply, serving
from openai.types import chat, completion_create_params
from scripted_engine import ScriptedEngine, wait_until

from qlora_kit.errors import ConfigError
from qlora_kit.server.running import PatientProtocol
from qlora_kit.server.settings import MAX_BODY_BYTES, ServerSettings, listen

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER: dict[str, Any] = {"role": "user", "content": "Good soup."}
GOOD: dict[str, Any] = {"model": "base", "messages": [USER]}
KEY = "a-key-of-the-tests-0123456789"
SENTENCE = '{"model": "base", "messages": [{"role": "user", "content": %s}]}'

# What is wrong -> the body sent to CHAT (bytes as they are), and the field that the answer must name.
MALFORMED: dict[str, tuple[Any, str | None]] = {
    "no body": (b"", None),
    "no JSON": (b"hello", None),
    "half a JSON": (b'{"model": "base"', None),
    "two JSONs": (b"{}{}", None),
    "a list": ([GOOD], None),
    "a text": ('"base"', None),
    "null": ("null", None),
    "NaN": (json.dumps(GOOD)[:-1].encode() + b', "temperature": NaN}', "temperature"),
    "infinity": (json.dumps(GOOD)[:-1].encode() + b', "temperature": 1e999}', "temperature"),
    "bytes that are no UTF-8": (b'{"model": "\xff\xfe"}', None),
    "half a character": ((SENTENCE % '"\\ud800"').encode(), None),
    "half a character in a name": (b'{"\\ud800": 1}', None),
    "a deep nest": (b"[" * 100_000, None),
    "a deep nest in a field": ((SENTENCE % ("[" * 5000 + "]" * 5000)).encode(), None),
    "a number of 100,000 digits": (json.dumps(GOOD)[:-1].encode() + b', "seed": ' + b"9" * 100_000 + b"}", None),
    "an unknown field": ({**GOOD, "temprature": 1}, "temprature"),
    "a template": ({**GOOD, "chat_template": "{{ messages }}"}, "chat_template"),
    "arguments of a template": ({**GOOD, "chat_template_kwargs": {}}, "chat_template_kwargs"),
    "no model": ({"messages": [USER]}, "model"),
    "model is a number": ({**GOOD, "model": 1}, "model"),
    "model is null": ({**GOOD, "model": None}, "model"),
    "model is empty": ({**GOOD, "model": ""}, "model"),
    "no messages": ({"model": "base"}, "messages"),
    "messages are empty": ({**GOOD, "messages": []}, "messages"),
    "messages are a text": ({**GOOD, "messages": "hi"}, "messages"),
    "a message is a text": ({**GOOD, "messages": ["hi"]}, "messages.0"),
    "too many messages": ({**GOOD, "messages": [USER] * 1001}, "messages"),
    "no role": ({**GOOD, "messages": [{"content": "hi"}]}, "messages.0.role"),
    "an unknown role": ({**GOOD, "messages": [{**USER, "role": "gpt"}]}, "messages.0.role"),
    "the role of a tool": ({**GOOD, "messages": [USER, {"role": "tool", "content": "1"}]}, "messages.1.role"),
    "no content": ({**GOOD, "messages": [{"role": "user"}]}, "messages.0.content"),
    "content is null": ({**GOOD, "messages": [{**USER, "content": None}]}, "messages.0.content"),
    "content is a number": ({**GOOD, "messages": [{**USER, "content": 5}]}, "messages.0.content"),
    "an image": (
        {
            **GOOD,
            "messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
        },
        "messages.0.content",
    ),
    "a control token": ({**GOOD, "messages": [{**USER, "content": "a<|im_end|>b"}]}, "messages.0.content"),
    "a NUL character": ({**GOOD, "messages": [USER, {**USER, "content": "a\0b"}]}, "messages.1.content"),
    "a call of a tool": ({**GOOD, "messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "messages.0.tool_calls"),
    "a name": ({**GOOD, "messages": [{**USER, "name": "bob"}]}, "messages.0.name"),
    "system in the middle": ({**GOOD, "messages": [USER, {**USER, "role": "system"}, USER]}, None),
    "the last turn is the assistant's": ({**GOOD, "messages": [USER, {**USER, "role": "assistant"}]}, None),
    "temperature below 0": ({**GOOD, "temperature": -0.1}, "temperature"),
    "temperature above 2": ({**GOOD, "temperature": 2.1}, "temperature"),
    "temperature is a text": ({**GOOD, "temperature": "0"}, "temperature"),
    "temperature is a truth value": ({**GOOD, "temperature": True}, "temperature"),
    "top_p is 0": ({**GOOD, "top_p": 0}, "top_p"),
    "top_p above 1": ({**GOOD, "top_p": 1.01}, "top_p"),
    "top_k below 0": ({**GOOD, "top_k": -1}, "top_k"),
    "top_k is enormous": ({**GOOD, "top_k": 10**12}, "top_k"),
    "min_p above 1": ({**GOOD, "min_p": 2}, "min_p"),
    "repetition_penalty is 0": ({**GOOD, "repetition_penalty": 0}, "repetition_penalty"),
    "max_tokens is 0": ({**GOOD, "max_tokens": 0}, "max_tokens"),
    "max_tokens is negative": ({**GOOD, "max_tokens": -5}, "max_tokens"),
    "max_tokens is a fraction": ({**GOOD, "max_tokens": 1.5}, "max_tokens"),
    "max_tokens beyond the context": ({**GOOD, "max_tokens": 513}, "max_tokens"),
    "max_completion_tokens beyond the context": ({**GOOD, "max_completion_tokens": 513}, "max_completion_tokens"),
    "max_tokens is enormous": ({**GOOD, "max_tokens": 10**30}, "max_tokens"),
    "two limits that differ": ({**GOOD, "max_tokens": 1, "max_completion_tokens": 2}, None),
    "n is 0": ({**GOOD, "n": 0}, "n"),
    "n is large": ({**GOOD, "n": 9}, "n"),
    "seed below 0": ({**GOOD, "seed": -1}, "seed"),
    "seed is enormous": ({**GOOD, "seed": 2**32}, "seed"),
    "seed is a text": ({**GOOD, "seed": "7"}, "seed"),
    "stop is a number": ({**GOOD, "stop": 1}, "stop"),
    "stop holds a number": ({**GOOD, "stop": ["a", 1]}, "stop"),
    "stop is an empty text": ({**GOOD, "stop": ""}, "stop"),
    "too many stops": ({**GOOD, "stop": ["a"] * 17}, "stop"),
    "a long stop": ({**GOOD, "stop": "a" * 257}, "stop"),
    "stream is a text": ({**GOOD, "stream": "yes"}, "stream"),
    "options without a stream": ({**GOOD, "stream_options": {"include_usage": True}}, None),
    "unknown option of a stream": ({**GOOD, "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    "top_logprobs alone": ({**GOOD, "top_logprobs": 2}, None),
    "many top_logprobs": ({**GOOD, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "logprobs is a number": ({**GOOD, "logprobs": 5}, "logprobs"),
    "a long user": ({**GOOD, "user": "u" * 513}, "user"),
    "frequency_penalty": ({**GOOD, "frequency_penalty": 0.5}, "frequency_penalty"),
    "presence_penalty": ({**GOOD, "presence_penalty": -1}, "presence_penalty"),
    "logit_bias": ({**GOOD, "logit_bias": {"50256": -100}}, "logit_bias"),
    "tools": ({**GOOD, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "tool_choice": ({**GOOD, "tool_choice": "required"}, "tool_choice"),
    "functions": ({**GOOD, "functions": [{"name": "f"}]}, "functions"),
    "response_format": ({**GOOD, "response_format": {"type": "json_object"}}, "response_format"),
    "modalities": ({**GOOD, "modalities": ["text", "audio"]}, "modalities"),
    "audio": ({**GOOD, "audio": {"voice": "x"}}, "audio"),
    "reasoning_effort": ({**GOOD, "reasoning_effort": "high"}, "reasoning_effort"),
    "service_tier": ({**GOOD, "service_tier": "priority"}, "service_tier"),
    "store": ({**GOOD, "store": True}, "store"),
    "prediction": ({**GOOD, "prediction": {"type": "content", "content": "x"}}, "prediction"),
    "web_search_options": ({**GOOD, "web_search_options": {}}, "web_search_options"),
    "prompt_cache_retention": ({**GOOD, "prompt_cache_retention": "24h"}, "prompt_cache_retention"),
    "a truth value for a number": ({**GOOD, "frequency_penalty": False}, "frequency_penalty"),
}
MALFORMED_TEXT: dict[str, tuple[Any, str | None]] = {
    "no prompt": ({"model": "base"}, "prompt"),
    "an empty prompt": ({"model": "base", "prompt": ""}, "prompt"),
    "a prompt without tokens": ({"model": "base", "prompt": "\r"}, None),
    "no prompts": ({"model": "base", "prompt": []}, "prompt"),
    "a prompt that is a number": ({"model": "base", "prompt": 5}, "prompt"),
    "texts and tokens": ({"model": "base", "prompt": ["a", [1]], "n": 0}, "n"),
    "a negative token": ({"model": "base", "prompt": [-1]}, "prompt"),
    "a token beyond the vocabulary": ({"model": "base", "prompt": [[1], [1000]]}, "prompt"),
    "a truth value as token": ({"model": "base", "prompt": [True]}, "prompt"),
    "too many prompts": ({"model": "base", "prompt": ["a"] * 17}, "prompt"),
    "messages": ({"model": "base", "prompt": "a", "messages": [USER]}, "messages"),
    "echo": ({"model": "base", "prompt": "a", "echo": True}, "echo"),
    "suffix": ({"model": "base", "prompt": "a", "suffix": "b"}, "suffix"),
    "best_of": ({"model": "base", "prompt": "a", "best_of": 2}, "best_of"),
    "many logprobs": ({"model": "base", "prompt": "a", "logprobs": 6}, "logprobs"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make_run(root / "reviews")
    return root


@pytest.fixture(scope="module")
def live(store: Path) -> Iterator[LiveServer]:
    with serving(ScriptedEngine(store), store) as server:
        yield server


def require_error(reply: Reply, status: int) -> dict[str, Any]:
    """The error, in OpenAI's shape and without anything of the server's inside."""
    assert reply.status == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error: dict[str, Any] = reply.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(reply.text) < 2000
    assert not any(mark in reply.text for mark in ("Traceback", "/work", "/tmp", "/home", ".py", "pydantic", "File "))
    return error


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_no_depth_of_a_nest_fails_the_server(live: LiveServer, opening: str, closing: str) -> None:
    """Some depths can be read and not be written again."""
    statuses = []
    for depth in range(860, 1010, 2):
        nest = f"{opening * depth}1{closing * depth}"
        statuses.append(live.post(CHAT, f'{json.dumps(GOOD)[:-1]}, "metadata": {{"a": {nest}}}}}').status)
    assert set(statuses) == {200, 400}
    assert statuses == sorted(statuses)


@pytest.mark.parametrize(("path", "case"), [*((CHAT, c) for c in MALFORMED), *((TEXT, c) for c in MALFORMED_TEXT)])
def test_a_malformed_request_gets_400_and_the_next_one_works(live: LiveServer, path: str, case: str) -> None:
    body, field = (MALFORMED if path == CHAT else MALFORMED_TEXT)[case]
    error = require_error(live.post(path, body), 400)
    assert error["type"] == "invalid_request_error"
    if field is not None:
        assert error["param"] == field
        assert field in error["message"]
    assert live.post(CHAT, GOOD).status == 200


def fields_of(*kinds: type) -> list[str]:
    return sorted({name for kind in kinds for name in get_type_hints(kind)})


@pytest.mark.parametrize(
    ("path", "required", "fields"),
    [
        (
            CHAT,
            GOOD,
            fields_of(
                chat.completion_create_params.CompletionCreateParamsNonStreaming,
                chat.completion_create_params.CompletionCreateParamsStreaming,
            ),
        ),
        (
            TEXT,
            {"model": "base", "prompt": "one"},
            fields_of(
                completion_create_params.CompletionCreateParamsNonStreaming,
                completion_create_params.CompletionCreateParamsStreaming,
            ),
        ),
    ],
)
def test_every_field_of_openais_client_is_known(
    live: LiveServer, path: str, required: dict[str, Any], fields: list[str]
) -> None:
    """As its installed version spells them: null asks for nothing, and what is not understood is named."""
    assert required.keys() < set(fields)
    assert len(fields) > 15
    for field in fields:
        if field not in required:
            assert live.post(path, {**required, field: None}).status == 200, field
        if field == "metadata":  # any object; it has no effect
            continue
        error = require_error(live.post(path, {**required, field: {"never": "so"}}), 400)
        assert error["param"].partition(".")[0] == field
        assert f"{field}: this server does not know" not in error["message"]


def test_every_field_of_a_message_of_openais_client_is_known(live: LiveServer) -> None:
    for role, kind in (
        ("system", chat.ChatCompletionSystemMessageParam),
        ("developer", chat.ChatCompletionDeveloperMessageParam),
        ("user", chat.ChatCompletionUserMessageParam),
        ("assistant", chat.ChatCompletionAssistantMessageParam),
    ):
        for field in set(fields_of(kind)) - {"role", "content"}:
            turns = [{"role": role, "content": "a", field: None}, USER]
            assert live.post(CHAT, {**GOOD, "messages": turns}).status == 200, (role, field)
            turns[0][field] = {"never": "so"}
            error = require_error(live.post(CHAT, {**GOOD, "messages": turns}), 400)
            assert error["param"] == f"messages.0.{field}"
            assert "does not know" not in error["message"]


@pytest.mark.parametrize(
    "model",
    [
        "nobody",
        "../reviews",
        "/etc/passwd",
        "reviews/",
        "Reviews",
        "reviews\0",
        "https://example.org/x",
        "base ",
        "x" * 512,
    ],
)
def test_a_model_is_a_name_that_is_served_and_never_a_place(live: LiveServer, model: str) -> None:
    error = require_error(live.post(CHAT, {**GOOD, "model": model}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert live.post(CHAT, GOOD).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("GET", "/page.html", 404),
        ("GET", "/v1/files", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models/reviews", 405),
        ("OPTIONS", CHAT, 405),
        ("POST", "/health", 405),
        ("BREW", "/", 405),
    ],
)
def test_other_addresses_and_methods(live: LiveServer, method: str, path: str, status: int) -> None:
    reply = live.send(method, path)
    require_error(reply, status)
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_a_form_of_another_site_cannot_send_a_request(live: LiveServer, content_type: str | None) -> None:
    """Browsers send these types across sites without asking first."""
    headers = {} if content_type is None else {"content_type": content_type}
    require_error(live.send("POST", CHAT, json.dumps(GOOD), **headers), 400)


# --- bodies ---


def test_a_body_beyond_the_limit_is_refused_with_and_without_its_length(live: LiveServer) -> None:
    fits = {**GOOD, "messages": [{**USER, "content": ""}]}
    room = MAX_BODY_BYTES - len(json.dumps(fits))
    fits["messages"] = [{**USER, "content": "a" * room}]
    assert live.post(CHAT, fits).status == 200
    fits["messages"] = [{**USER, "content": "a" * (room + 1)}]
    assert require_error(live.post(CHAT, fits), 413)["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b"a" * 65536

    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    connection.request("POST", CHAT, chunks(), {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    for length in ("-1", "1e9", "9" * 5000):
        assert live.send("POST", CHAT, b"", content_length=length).status in (400, 413)
    assert live.post(CHAT, GOOD).status == 200


def test_a_body_that_does_not_arrive_gets_408(store: Path) -> None:
    with serving(ScriptedEngine(store), store, body_seconds=1.0) as live:
        with socket.create_connection(("127.0.0.1", live.port), timeout=20) as client:
            head = ("POST", CHAT, "HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n")
            client.sendall(" ".join(head).encode() + b'{"model"')
            assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert live.post(CHAT, GOOD).status == 200


def test_headers_that_do_not_arrive_end_the_connection(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "head_seconds", 1.0)
    silent = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    slow = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    again = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    received = b""
    while not received.endswith(b'{"status":"ok"}'):
        received += again.recv(4096)
    again.sendall(b"GET /health HTTP/1.1\r\nHost: loc")  # the second request on a connection that is kept
    for client in (silent, slow, again):
        assert client.recv(4096) == b""
        client.close()


# --- strangers ---


def test_a_page_of_another_site_cannot_reach_a_local_server(store: Path, live: LiveServer) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[::2]", ""):
        assert require_error(live.send("GET", "/v1/models", host=host), 421)["code"] == "unknown_host"
        assert live.send("GET", "/", host=host).status == 421
    for host in ("localhost", f"127.0.0.1:{live.port}", "[::1]:1", "LOCALHOST"):
        assert live.send("GET", "/v1/models", host=host).status == 200
    with serving(ScriptedEngine(store), store, allowed_hosts=("Models.example",)) as other:
        assert other.send("GET", "/v1/models", host="models.example:443").status == 200
        assert other.send("GET", "/v1/models", host="evil.example").status == 421


def test_with_a_key_only_health_and_the_page_are_open(store: Path) -> None:
    with serving(ScriptedEngine(store), store, api_key=KEY) as live:
        for path in ("/health", "/", "/playground.css", "/playground.js"):
            assert live.send("GET", path).status == 200
        for given in (None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"):
            headers = {} if given is None else {"authorization": given}
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/v1/models/base"),
                ("GET", "/metrics"),
                ("GET", "/openapi.json"),
                ("GET", "/nowhere"),
                ("POST", CHAT),
                ("POST", TEXT),
            ):
                reply = live.send(method, path, **headers)
                assert require_error(reply, 401)["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"] == "Bearer"
                assert KEY not in reply.text
        assert (
            live.send("GET", "/v1/models", authorization="Bearer k\xe9y".encode("latin-1").decode("latin-1")).status
            == 401
        )
        assert live.send("GET", "/v1/models", authorization=f"bearer {KEY}").status == 200
        assert live.client().chat.completions.create(model="base", messages=[USER]).choices  # type: ignore[list-item]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_every_response_carries_headers_that_keep_other_sites_out(live: LiveServer) -> None:
    for reply in (
        live.send("GET", "/"),
        live.send("GET", "/v1/models"),
        live.send("GET", "/nowhere"),
        live.post(CHAT, GOOD),
    ):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in reply.headers
        assert "server" not in reply.headers
    policy = live.send("GET", "/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert "unsafe" not in policy


# --- too much at once ---


def test_beyond_the_queue_clients_are_asked_to_come_back(store: Path) -> None:
    engine = ScriptedEngine(store, seconds_per_token=0.05, places=1)
    with serving(engine, store, max_running=1, max_waiting=2) as live:
        replies: list[Reply] = []
        threads = [threading.Thread(target=lambda: replies.append(live.post(CHAT, GOOD))) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(engine.requests) == 3, "three are in")
        refused = live.post(CHAT, GOOD)
        assert require_error(refused, 429)["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert require_error(live.post(CHAT, {**GOOD, "n": 4}), 400)["param"] == "n"
        for thread in threads:
            thread.join()
        assert [reply.status for reply in replies] == [200, 200, 200]
        assert live.post(CHAT, {**GOOD, "n": 3}).status == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_deadline_ends_an_answer(store: Path, path: str) -> None:
    engine = ScriptedEngine(store, seconds_per_token=0.1)
    body = {**(GOOD if path == CHAT else {"model": "base", "prompt": [1, 2]})}
    with serving(engine, store, deadline_seconds=0.05) as live:
        for stream in (False, True):  # the status of a stream waits for its first piece
            assert require_error(live.post(path, {**body, "stream": stream}), 408)["code"] == "deadline"
        wait_until(lambda: all(answer.cancelled_after is not None for answer in engine.answers), "they are cancelled")
    engine = ScriptedEngine(store, seconds_per_token=0.25)
    engine.reply = lambda request: " ".join("word" for _ in range(50))
    with serving(engine, store, deadline_seconds=1.5) as live:
        reply = live.post(path, {**body, "stream": True})
        assert reply.status == 200
        last = reply.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline"
        assert "qlora_kit_disconnects_total 0.0" in live.send("GET", "/metrics").text  # the client read it to its end
        if path == CHAT:
            with pytest.raises(openai.APIError, match="longer than this server allows"):
                list(live.client().chat.completions.create(model="base", messages=[USER], stream=True))  # type: ignore[list-item]


# --- before it starts ---


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.example", ""])
def test_other_addresses_than_this_machine_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="others on the network") as error:
        ServerSettings(host=host)
    assert "--api-key-file" in error.value.faults[0].fix
    assert ServerSettings(host=host, api_key=KEY).host_names is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machines_own_addresses_need_none(host: str) -> None:
    assert ServerSettings(host=host).host_names is not None


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        ServerSettings(api_key=key)


def test_a_taken_port_is_told_before_anything_is_loaded() -> None:
    with listen(ServerSettings(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen"):
            listen(ServerSettings(port=port))
    with pytest.raises(ConfigError, match="cannot listen"):
        listen(ServerSettings(host="203.0.113.7", api_key=KEY))
