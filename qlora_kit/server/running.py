"""Runs the server until a signal ends it: uvicorn on a bound socket, slow clients cut off, requests drained."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from qlora_kit.server.app import create_app
from qlora_kit.server.service import Service

MAX_CONNECTIONS = 900  # below the 1,024 open files that a process may usually have
_KEEP_ALIVE_SECONDS = 30


@dataclass(frozen=True)
class Stop:
    """How a server ended.

    Attributes:
        signal: The number of the signal that ended it; None where none did.
        cut: Answers that were still running when the time to drain was up.
    """

    signal: int | None
    cut: int


class PatientProtocol(H11Protocol):
    """uvicorn's protocol with an end to its patience: it waits for a request's headers as long as the client likes."""

    head_seconds = 10.0

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _watch_head(self) -> None:
        """The time runs while no request is being answered: for headers, and for a body that nobody reads any more."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._close_if_waiting)

    def _close_if_waiting(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def run_server(service: Service, listener: socket.socket, on_ready: Callable[[], None]) -> Stop:
    """Serve on ``listener`` until SIGINT or SIGTERM, then let running answers finish.

    Args:
        service: What is served.
        listener: A bound socket; closed at the end.
        on_ready: Called once clients are accepted.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    # uvicorn takes both signals while it runs, and raises them again at its end, for the handlers it found.
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(_serve(service, listener, on_ready, received))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return Stop(received[0] if received else None, service.workers.cut)


def server_config(service: Service) -> uvicorn.Config:
    """uvicorn's settings: one process, HTTP/1.1 only, nothing of the client trusted but what the guard checks."""
    return uvicorn.Config(
        create_app(service),
        loop="asyncio",
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=service.settings.drain_seconds,
    )


async def _serve(service: Service, listener: socket.socket, on_ready: Callable[[], None], received: list[int]) -> None:
    server = uvicorn.Server(server_config(service))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if received:  # before uvicorn took the signals
        server.should_exit = True
    elif server.started:
        on_ready()
    await serving
