"""From the engine's requests to an HTTP response: whole or as a stream, cancelled when the client goes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from qlora_kit.engine import Answer, Request
from qlora_kit.server.choices import Choices, Disconnected, Event, while_connected
from qlora_kit.server.errors import error_responses
from qlora_kit.server.event_stream import EventStream
from qlora_kit.server.request_schema import GenerationFields
from qlora_kit.server.sampling import choices_of
from qlora_kit.server.service import Service

GENERATION_ERRORS = error_responses(400, 401, 404, 408, 413, 421, 429, 500, 503)
CLIENT_GONE = 499  # nginx's number for it; nobody receives this response
Fields = TypeVar("Fields", bound=GenerationFields)


class Shape(Protocol):
    """One request's answers in the words of its route."""

    def whole(self, answers: list[Answer]) -> BaseModel:
        """The body of a response that waits for all of them."""

    def events(self, first: Event | None) -> AsyncIterator[BaseModel]:
        """The events of a stream; the first of the engine's has been taken."""


async def respond(
    service: Service,
    request: HttpRequest,
    body: Fields,
    *,
    ask: Callable[[Service, Fields, str | None], Sequence[Request]],
    shape: Callable[[Service, Fields, Choices], Shape],
) -> Response:
    """Answer what ``body`` asks for, by the adapter that it names or by the base.

    Args:
        service: The server's parts.
        request: Whose connection says whether the client is there.
        body: The request's fields.
        ask: Makes the engine's requests, each to be answered ``n`` times; called in a thread, with the adapter's name.
        shape: Words the answers.

    Raises:
        ApiError: The request cannot be answered.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    adapter = service.models.adapter_of(body.model)
    asked = await loop.run_in_executor(service.workers.threads, ask, service, body, adapter)
    requests = [choice for prompt in asked for choice in choices_of(prompt, body.n)]
    deadline = started + service.settings.deadline_seconds
    choices = service.workers.start(requests, pieces=bool(body.stream), deadline=deadline)
    shaped = shape(service, body, choices)
    try:
        if not body.stream:
            return JSONResponse(shaped.whole(await while_connected(request, choices.collect(), choices)).model_dump())
        first = await while_connected(request, choices.next_event(), choices)
    except Disconnected:
        service.metrics.disconnects.inc()
        return Response(status_code=CLIENT_GONE)
    service.metrics.first_token_seconds.observe(loop.time() - started)
    return EventStream(shaped.events(first), choices, service.metrics)


def new_id(kind: str) -> str:
    """An id that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    """When a response was made, in seconds since 1970."""
    return int(time.time())
