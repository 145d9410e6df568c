"""``POST /v1/chat/completions``: a conversation in, one or more answers out, whole or as a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from qlora_kit.conversation import Message
from qlora_kit.engine import Answer, Delta, Request
from qlora_kit.server.choices import Choices, Event
from qlora_kit.server.logprobs import chat_logprobs
from qlora_kit.server.request_schema import ChatRequest
from qlora_kit.server.responding import GENERATION_ERRORS, new_id, now, respond
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
from qlora_kit.server.sampling import sampling_of
from qlora_kit.server.service import Service

_ROLES = {"developer": "system"}


@dataclass(frozen=True)
class _Chat:
    """One request in the making: what its responses say of it, and its answers."""

    service: Service
    body: ChatRequest
    choices: Choices
    id: str = field(default_factory=partial(new_id, "chatcmpl"))
    created: int = field(default_factory=now)

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

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=GENERATION_ERRORS)
    async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a conversation, by the adapter that ``model`` names or by the base."""
        return await respond(service, request, body, ask=_requests, shape=_Chat)

    return router


def _requests(service: Service, body: ChatRequest, adapter: str | None) -> list[Request]:
    """What the engine is asked: one conversation.

    Raises:
        ApiError: A text with control tokens, or a limit beyond the context.
    """
    for number, message in enumerate(body.messages):
        service.require_text(message.content, f"messages.{number}.content")
    service.require_room(body.max_tokens, "max_tokens")
    service.require_room(body.max_completion_tokens, "max_completion_tokens")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    sampling = sampling_of(
        body,
        service.engine.default_sampling(adapter),
        max_new_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    turns = tuple(Message(_ROLES.get(message.role, message.role), message.content) for message in body.messages)
    return [Request(conversation=turns, adapter=adapter, sampling=sampling)]
