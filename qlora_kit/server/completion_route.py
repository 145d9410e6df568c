"""``POST /v1/completions``: texts or token ids to go on from, as they are, without a chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from qlora_kit.engine import Answer, Delta, Request
from qlora_kit.server.choices import Choices, Event
from qlora_kit.server.errors import ApiError
from qlora_kit.server.logprobs import completion_logprobs
from qlora_kit.server.request_schema import CompletionRequest, PromptValue
from qlora_kit.server.responding import GENERATION_ERRORS, new_id, now, respond
from qlora_kit.server.response_schema import Completion, CompletionChoice, CompletionLogprobs, Usage
from qlora_kit.server.sampling import sampling_of
from qlora_kit.server.service import Service


@dataclass(frozen=True)
class _Continuation:
    """One request in the making: what its responses say of it, and its answers."""

    service: Service
    body: CompletionRequest
    choices: Choices
    id: str = field(default_factory=partial(new_id, "cmpl"))
    created: int = field(default_factory=now)
    sent: dict[int, int] = field(default_factory=dict)  # characters of each choice that a stream has sent

    def logprobs(self, part: Answer | Delta, offset: int) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(part.logprobs, self.service.engine.decode, offset=offset)

    def whole(self, answers: list[Answer]) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self.logprobs(answer, 0),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        return self._completion(choices, self.usage(answers))

    def usage(self, answers: list[Answer]) -> Usage:
        return self.service.usage(self.body.model, answers, choices=self.body.n or 1)

    async def events(self, first: Event | None) -> AsyncIterator[Completion]:
        answers: dict[int, Answer] = {}
        event = first
        while event is not None:
            index, content = event
            if isinstance(content, Answer):
                answers[index] = content
                yield self._completion([CompletionChoice(index=index, text="", finish_reason=content.finish_reason)])
            elif content.text or content.logprobs:
                offset = self.sent.get(index, 0)
                self.sent[index] = offset + len(content.text)
                logprobs = self.logprobs(content, offset)
                choice = CompletionChoice(index=index, text=content.text, logprobs=logprobs, finish_reason=None)
                yield self._completion([choice])
            event = await self.choices.next_event()
        usage = self.usage([answers[index] for index in sorted(answers)])
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self._completion([], usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.body.model, choices=choices, usage=usage)


def completion_router(service: Service) -> APIRouter:
    """The route on top of ``service``."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=Completion, responses=GENERATION_ERRORS)
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        """Go on from each prompt, by the adapter that ``model`` names or by the base."""
        return await respond(service, request, body, ask=_requests, shape=_Continuation)

    return router


def _requests(service: Service, body: CompletionRequest, adapter: str | None) -> list[Request]:
    """What the engine is asked, for each prompt.

    Raises:
        ApiError: A token id is none of the vocabulary's, or a limit beyond the context.
    """
    service.require_room(body.max_tokens, "max_tokens")
    sampling = sampling_of(
        body, service.engine.default_sampling(adapter), max_new_tokens=body.max_tokens, logprobs=body.logprobs
    )
    return [
        Request(prompt_ids=_token_ids(service, prompt), adapter=adapter, sampling=sampling) for prompt in body.prompt
    ]


def _token_ids(service: Service, prompt: PromptValue) -> tuple[int, ...]:
    """A prompt's token ids. A text may hold control tokens, since here they are the client's own business.

    Raises:
        ApiError: A token id is none of the vocabulary's.
    """
    if isinstance(prompt, str):
        return service.engine.encode(prompt)
    if max(prompt) >= service.engine.vocabulary_tokens:
        message = f"prompt: token ids are below {service.engine.vocabulary_tokens}."
        raise ApiError(400, message, param="prompt", code="invalid_value")
    return prompt
