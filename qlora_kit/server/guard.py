"""What a request passes before a route sees it: its Host, its key, its body's size and time; and what is counted."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_kit.server.errors import ApiError
from qlora_kit.server.metrics import ServerMetrics
from qlora_kit.server.operations_route import HEALTH, PAGE_FILES
from qlora_kit.server.settings import MAX_BODY_BYTES, ServerSettings

_log = logging.getLogger(__name__)
_OPEN_PATHS = frozenset({HEALTH, *PAGE_FILES})
_ROUTES = (*_OPEN_PATHS, "/metrics", "/openapi.json", "/v1/chat/completions", "/v1/completions", "/v1/models")
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
}


class Recorder:
    """Puts the security headers on every response, counts it, and logs it in one line (level INFO)."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def recorded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, recorded)
        except asyncio.CancelledError:  # by uvicorn alone, when the time to drain is up
            if not status:
                await ApiError(503, "The server is stopping.", code="stopping").response()(scope, receive, recorded)
        finally:
            seconds = time.perf_counter() - started
            route = _route_of(scope["path"])
            self._metrics.requests.labels(route, str(status or 500)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            _log.info("%s %s %d %.3f s", scope["method"], route, status, seconds)


class Guard:
    """Lets a request through to the routes, its body read to the end, or answers with what is wrong with it."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._key = None if settings.api_key is None else _digest(settings.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._require_host(headers)
            self._require_key(scope["path"], headers)
            body = await self._body(headers, receive) if scope["method"] == "POST" else b""
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _require_host(self, headers: Mapping[str, str]) -> None:
        names = self._settings.host_names
        if names is not None and _host_name(headers.get("host", "")) not in names:
            message = "The server answers to this machine's own names only; --allowed-host adds one."
            raise ApiError(421, message, code="unknown_host")

    def _require_key(self, path: str, headers: Mapping[str, str]) -> None:
        if self._key is None or path in _OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
            raise ApiError(
                401,
                "The server asks for its API key, in the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes | None:
        """The whole body; None where the client went before it was there."""
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced[:20]) > MAX_BODY_BYTES:
            raise _too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > MAX_BODY_BYTES:
                        raise _too_large()
        except TimeoutError:
            sentence = f"The body did not arrive within {self._settings.body_seconds:g} s."
            raise ApiError(408, sentence, code="slow_body", headers={"connection": "close"}) from None
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hands out a body that has been read, and then what follows it: that the client has gone."""
    read = False

    async def replayed() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _too_large() -> ApiError:
    return ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large")


def _host_name(host: str) -> str:
    """A Host header without its port: ``[::1]:8000`` is ``::1``."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _digest(key: str) -> bytes:
    """Of equal length for every key, so that comparing two takes the same time whatever they are."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _route_of(path: str) -> str:
    """The route's name in metrics and log; never what the client wrote."""
    if path in _ROUTES:
        return path
    return "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
