"""A server with a real engine under load, abuse and bad adapters: nothing is lost, mixed up or left behind."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.bad_adapters import ALL_KINDS, make_adapter, small_model
from faults.test_bad_adapters import fill
from live_server import LiveServer, serving
from scripted_engine import wait_until
from server_load import ROOT, Prompt, ask, ask_all, resident_bytes, reviews
from transformers import PreTrainedTokenizerFast

from qlora_kit.engine import Engine
from qlora_kit.server.backend import EngineBackend
from qlora_kit.server.settings import MAX_BODY_BYTES

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
ADAPTERS = ("sentiment", "translation", "question_answering", "code_generation", "text_generation")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    """The shipped base and adapters."""
    store = ROOT / "adapters"
    with Engine(store=store) as engine, serving(EngineBackend(engine), store) as server:
        yield server


def stats(live: LiveServer) -> tuple[int, int, int]:
    load = live.service.engine.load_now()
    return load.running, load.waiting, live.service.workers.admission.in_flight


def test_64_clients_get_what_one_client_gets_and_memory_stays(live: LiveServer) -> None:
    prompts: list[Prompt] = [(adapter, text) for text in reviews(10) for adapter in ADAPTERS]
    twins = dict(zip(prompts, ask_all(live, prompts, clients=1), strict=True))
    assert {status for status, _ in twins.values()} == {200}
    ask_all(live, prompts * 4, clients=64)  # every place has been in use once
    before = resident_bytes()
    replies = ask_all(live, prompts * 10, clients=64)
    assert len(replies) == 500
    assert [reply for prompt, reply in zip(prompts * 10, replies, strict=True) if reply != twins[prompt]] == []
    growth = resident_bytes() / before - 1
    print(f"memory grew by {growth:.2%}")
    assert growth < 0.05
    assert stats(live) == (0, 0, 0)


def test_clients_that_go_leave_nothing_behind(live: LiveServer) -> None:
    good: Prompt = ("sentiment", reviews(1)[0])
    twin = ask(live, good)
    body = {"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 400}
    for number in range(50):
        text = json.dumps({**body, "model": ADAPTERS[number % 5], "stream": number % 2 == 0, "n": 1 + number % 3})
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client = socket.create_connection(("127.0.0.1", live.port), timeout=20)
        client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        if number % 2 == 0:
            assert client.recv(64).startswith(b"HTTP/1.1 200")
        client.close()
        if number % 10 == 9:
            assert ask(live, good) == twin
    wait_until(lambda: stats(live) == (0, 0, 0), "every place is free")
    assert ask(live, good) == twin


def test_slow_clients_and_large_bodies_keep_nobody_waiting(live: LiveServer) -> None:
    slow = [socket.create_connection(("127.0.0.1", live.port), timeout=60) for _ in range(200)]
    for number, client in enumerate(slow):
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A" + str(number).encode())
    large = b'{"model": "' + b"a" * 10 * MAX_BODY_BYTES
    threads = [threading.Thread(target=lambda: live.post(CHAT, large)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for client in slow:
        client.sendall(b"b")
    for _ in range(20):
        assert live.send("GET", "/health").status == 200
    for thread in threads:
        thread.join()
    text = "word " * (MAX_BODY_BYTES // 8)  # within the limit, far beyond the context
    status, message = ask(live, ("sentiment", text))
    assert status == 400
    assert "tokens long" in message
    assert ask(live, ("sentiment", reviews(1)[0]))[0] == 200
    for client in slow:
        assert client.recv(100) == b""  # cut off: its headers never came
        client.close()


@pytest.fixture
def small(chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Iterator[tuple[LiveServer, Path]]:
    """A server of ``small_model`` with five adapters, and a sound adapter to spoil."""
    small_model().save_pretrained(tmp_path / "base")
    chatml_tokenizer.save_pretrained(tmp_path / "base")
    store = tmp_path / "store"
    for number in range(5):
        fill(make_adapter(store / f"good{number}")[0], seed=number)
    fill(make_adapter(tmp_path / "sound")[0], seed=9)
    engine = Engine(str(tmp_path / "base"), store=store)
    with engine, serving(EngineBackend(engine), store) as server:
        yield server, tmp_path / "sound"


def test_bad_adapters_dropped_into_the_store_disturb_nobody(
    small: tuple[LiveServer, Path], caplog: pytest.LogCaptureFixture
) -> None:
    live, sound = small
    store = sound.parent / "store"
    prompts: list[Prompt] = [(f"good{number}", f"word {number}") for number in range(5)]
    twins = dict(zip(prompts, ask_all(live, prompts, clients=1), strict=True))
    assert {status for status, _ in twins.values()} == {200}
    replies: list[tuple[Prompt, tuple[int, str]]] = []
    over = threading.Event()

    def go_on(prompt: Prompt) -> None:
        while not over.is_set():
            replies.append((prompt, ask(live, prompt)))

    clients = [threading.Thread(target=go_on, args=(prompt,)) for prompt in prompts]
    for thread in clients:
        thread.start()
    live.watcher.start()
    try:
        for number, spoil in enumerate(ALL_KINDS.values()):
            time.sleep(0.05)  # so that traffic goes on meanwhile
            folder = shutil.copytree(sound, sound.parent / "spoilt" / f"bad{number}")
            spoil(folder)
            if folder.exists():
                folder.rename(store / folder.name)  # as `adapters add` does it, whole
        shutil.copytree(sound, sound.parent / "late")
        (sound.parent / "late").rename(store / "late")
        models = {f"good{number}" for number in range(5)} | {"base", "late"}
        listed = lambda: {model["id"] for model in live.send("GET", "/v1/models").json["data"]}  # noqa: E731
        wait_until(lambda: "late" in listed(), "the sound one appears", seconds=120)
        assert listed() == models
    finally:
        over.set()
        for thread in clients:
            thread.join()
        live.watcher.stop()
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) >= len(list(store.glob("bad*"))) >= 100
    assert [reply for prompt, reply in replies if reply != twins[prompt]] == []
    print(f"{len(replies)} good requests beside {len(told)} bad adapters")
    assert ask(live, ("bad1", "word"))[0] == 404
    assert not (sound.parent / "canary").exists()
