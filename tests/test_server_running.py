"""Clients that go and signals that come: answers end within two tokens, or are finished first."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, serving
from scripted_engine import ScriptedEngine, wait_until

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "go on"}], "max_tokens": 400}
# A server of its own process, over a scripted engine of 20 tokens a second.
PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from scripted_engine import ScriptedEngine
from qlora_kit.server.running import run_server
from qlora_kit.server.served_models import ServedModels
from qlora_kit.server.service import Service
from qlora_kit.server.settings import ServerSettings, listen

engine = ScriptedEngine(seconds_per_token=0.05)
engine.reply = lambda request: " ".join("word" for _ in range(20))
settings = ServerSettings(port=0, drain_seconds=int(sys.argv[2]))
with listen(settings) as listener:
    ready = lambda: print(listener.getsockname()[1], flush=True)
    stop = run_server(Service.of(engine, ServedModels("base", started=1), settings), listener, ready)
print(stop.signal, stop.cut, flush=True)
"""


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    engine = ScriptedEngine(seconds_per_token=0.1)
    engine.reply = lambda request: " ".join("word" for _ in range(400))
    with serving(engine, tmp_path) as server:
        yield server


def begin(port: int, body: dict[str, Any]) -> http.client.HTTPConnection:
    """Send a request and leave its response unread."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def leave(connection: http.client.HTTPConnection) -> None:
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.sock.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_goes_takes_its_answers_with_it(live: LiveServer, stream: bool, n: int) -> None:
    engine = live.service.engine
    assert isinstance(engine, ScriptedEngine)
    connection = begin(live.port, {**LONG, "stream": stream, "n": n})
    if stream:
        response = connection.getresponse()
        while b"word" not in response.readline():
            pass
        leave_with = response.fp
    wait_until(lambda: len(engine.answers) == n and all(answer.made >= 3 for answer in engine.answers), "it began")
    made = [answer.made for answer in engine.answers]
    if stream:
        connection.sock = None
        leave_with.close()  # http.client keeps the socket open for the response
    else:
        leave(connection)
    wait_until(lambda: all(answer.cancelled_after is not None for answer in engine.answers), "they are cancelled")
    for before, answer in zip(made, engine.answers, strict=True):
        assert answer.cancelled_after is not None
        assert answer.cancelled_after - before <= 2
    wait_until(lambda: live.service.workers.admission.in_flight == 0, "their places are free")
    assert [answer.result().finish_reason for answer in engine.answers] == ["cancelled"] * n
    metrics = live.send("GET", "/metrics").text
    assert "qlora_kit_disconnects_total 1.0" in metrics


def start(drain_seconds: int) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(drain_seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_signal_lets_running_answers_finish_and_takes_no_more() -> None:
    process, port = start(drain_seconds=30)
    whole, stream = begin(port, LONG), begin(port, {**LONG, "stream": True})
    response = stream.getresponse()
    assert b"data" in response.readline()
    process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False

    wait_until(refused, "no new clients are taken")
    assert json.loads(whole.getresponse().read())["choices"][0]["message"]["content"] == " ".join(["word"] * 20)
    assert response.read().decode().endswith("data: [DONE]\n\n")
    out, err = process.communicate(timeout=30)
    assert (out.split(), process.returncode) == ([str(int(signal.SIGTERM)), "0"], 0), err


def test_answers_that_take_too_long_to_finish_are_cut() -> None:
    process, port = start(drain_seconds=0)
    connection = begin(port, {**LONG, "stream": True})
    assert b"data" in connection.getresponse().readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out.split(), process.returncode) == ([str(int(signal.SIGINT)), "1"], 0), err
    assert "Traceback" not in err
