"""Serves an engine and a store on a bound socket, from the first look at the store to the last drained request."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from qlora_kit.engine import Engine
from qlora_kit.server.backend import EngineBackend
from qlora_kit.server.running import Stop, run_server
from qlora_kit.server.served_models import ServedModels
from qlora_kit.server.service import Service
from qlora_kit.server.settings import ServerSettings
from qlora_kit.server.watching import StoreWatcher


def serve_engine(
    engine: Engine, settings: ServerSettings, listener: socket.socket, on_ready: Callable[[ServedModels], None]
) -> Stop:
    """Serve ``engine`` and the adapters of its store until SIGINT or SIGTERM.

    Args:
        engine: The base is loaded; adapters are loaded here.
        settings: The limits.
        listener: Where clients come (``listen``); closed at the end.
        on_ready: Called with what is served, once clients are accepted.
    """
    backend = EngineBackend(engine)
    models = ServedModels(backend.base, started=int(time.time()))
    watcher = StoreWatcher(engine.store, backend, models)
    with engine:
        watcher.sync()
        watcher.start()
        try:
            return run_server(Service.of(backend, models, settings), listener, lambda: on_ready(models))
        finally:
            watcher.stop()
