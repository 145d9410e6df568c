"""A real server in a thread of the test's process: real sockets, real disconnects."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI
from scripted_engine import wait_until

from qlora_kit.adapters import AdapterStore
from qlora_kit.server.protocol import ServedEngine
from qlora_kit.server.running import server_config
from qlora_kit.server.served_models import ServedModels
from qlora_kit.server.service import Service
from qlora_kit.server.settings import ServerSettings, listen
from qlora_kit.server.watching import StoreWatcher


@dataclass(frozen=True)
class Reply:
    """A response as it came."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class LiveServer:
    """A server that answers, and what is behind it."""

    port: int
    service: Service
    watcher: StoreWatcher
    key: str | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> OpenAI:
        """OpenAI's own client, which tries once."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=60)

    def send(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> Reply:
        """One request as it is given, with no more headers than HTTP needs."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, names)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read().decode())
        finally:
            connection.close()

    def post(self, path: str, content: Any, **headers: str) -> Reply:
        """One JSON request; bytes are sent as they are."""
        body = content if isinstance(content, bytes | str) else json.dumps(content)
        return self.send("POST", path, body, **{"content_type": "application/json", **headers})


@contextmanager
def serving(engine: ServedEngine, store: Path, **settings: Any) -> Iterator[LiveServer]:
    """A server on a free port, with the store as it is at the start; ``watcher.sync()`` looks again."""
    chosen = ServerSettings(port=0, **settings)
    models = ServedModels(engine.base, started=1)
    watcher = StoreWatcher(AdapterStore(store), engine, models)
    watcher.sync()
    service = Service.of(engine, models, chosen)
    listener = listen(chosen)
    server = uvicorn.Server(server_config(service))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server starts")
    try:
        yield LiveServer(listener.getsockname()[1], service, watcher, chosen.api_key)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        assert not thread.is_alive()
