"""``POST /v1/chat/completions``: a conversation in, one or more answers out, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from qlora_kit.conversation import Message
from qlora_kit.engine import Answer, Delta, Request
from qlora_kit.server.choices import Choices, Disconnected, Event, while_connected
from qlora_kit.server.errors import error_responses
from qlora_kit.server.event_stream import EventStream
from qlora_kit.server.logprobs import chat_logprobs
from qlora_kit.server.request_schema import ChatRequest
from qlora_kit.server.response_schema import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from qlora_kit.server.sampling import choices_of, sampling_of
from qlora_kit.server.service import Service, gone, new_id

_ROLES = {"developer": "system"}
GENERATION_ERRORS = (400, 401, 404, 408, 413, 421, 429, 500, 503)


@dataclass(frozen=True)
class _Chat:
    """One request in the making: what its responses say of it, and its answers."""

    service: Service
    body: ChatRequest
    choices: Choices
    id: str
    created: int

    def logprobs(self, part: Answer | Delta) -> ChatLogprobs | None:
        return chat_logprobs(part.logprobs, self.service.engine.decode) if self.body.logprobs else None

    def whole(self, answers: list[Answer]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=answer.text),
                logprobs=self.logprobs(answer),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        usage = self.usage(answers)
        return ChatCompletion(id=self.id, created=self.created, model=self.body.model, choices=choices, usage=usage)

    def usage(self, answers: list[Answer]) -> Usage:
        return self.service.usage(self.body.model, answers, choices=len(answers))

    async def events(self, first: Event | None) -> AsyncIterator[ChatChunk]:
        for index in range(self.body.n or 1):
            yield self._chunk(ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content="")))
        answers = []
        event = first
        while event is not None:
            index, content = event
            if isinstance(content, Answer):
                answers.append(content)
                end = ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=content.finish_reason)
                yield self._chunk(end)
            elif content.text or content.logprobs:
                delta = ChatDelta(content=content.text)
                yield self._chunk(ChatChunkChoice(index=index, delta=delta, logprobs=self.logprobs(content)))
            event = await self.choices.next_event()
        usage = self.usage(answers)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield ChatChunk(id=self.id, created=self.created, model=self.body.model, choices=[], usage=usage)

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.body.model, choices=[choice])


def chat_router(service: Service) -> APIRouter:
    """The route on top of ``service``."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=error_responses(*GENERATION_ERRORS))
    async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a conversation, by the adapter that ``model`` names or by the base."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        adapter = service.models.adapter_of(body.model)
        asked = await loop.run_in_executor(service.workers.threads, _request, service, body, adapter)
        deadline = started + service.settings.deadline_seconds
        choices = service.workers.start(choices_of(asked, body.n), pieces=bool(body.stream), deadline=deadline)
        chat = _Chat(service, body, choices, new_id("chatcmpl"), int(time.time()))
        try:
            if not body.stream:
                return JSONResponse(chat.whole(await while_connected(request, choices.collect(), choices)).model_dump())
            first = await while_connected(request, choices.next_event(), choices)
        except Disconnected:
            return gone(service)
        service.metrics.first_token_seconds.observe(loop.time() - started)
        return EventStream(chat.events(first), choices, service.metrics)

    return router


def _request(service: Service, body: ChatRequest, adapter: str | None) -> Request:
    """What the engine is asked.

    Raises:
        ApiError: A text with control tokens, or a limit beyond the context.
    """
    for number, message in enumerate(body.messages):
        service.refuse_control_tokens(message.content, f"messages.{number}.content")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    service.require_room(limit)
    sampling = sampling_of(
        body,
        service.engine.default_sampling(adapter),
        max_new_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    turns = tuple(Message(_ROLES.get(message.role, message.role), message.content) for message in body.messages)
    return Request(conversation=turns, adapter=adapter, sampling=sampling)
