"""A response of server-sent events over answers in the making, which are cancelled when the connection ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from qlora_kit.server.choices import Choices
from qlora_kit.server.errors import ApiError
from qlora_kit.server.metrics import ServerMetrics

_DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx would hold the events back


class EventStream(StreamingResponse):
    """Sends events until the answers end, fail or run out of time; a client that goes takes its answers with it."""

    def __init__(self, events: AsyncIterator[BaseModel], choices: Choices, metrics: ServerMetrics) -> None:
        super().__init__(_in_bytes(events), media_type="text/event-stream", headers=_HEADERS)
        self._choices = choices
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            self._choices.cut()
            raise
        finally:
            if not self._choices.ended:
                self._metrics.disconnects.inc()
            self._choices.cancel()


async def _in_bytes(events: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    """Each event as it is sent. The status is sent already, so that a failure becomes an event too."""
    try:
        async for event in events:
            yield _event(event)
    except ApiError as error:
        yield _event(error.body)
    else:
        yield _DONE


def _event(body: BaseModel) -> bytes:
    return b"data: " + body.model_dump_json().encode() + b"\n\n"
