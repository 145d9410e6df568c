"""What every route works with: the engine's workers, the models, the settings and the metrics of one server."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi.responses import Response

from qlora_kit.conversation import control_pattern
from qlora_kit.engine import Answer
from qlora_kit.server.admission import Admission
from qlora_kit.server.choices import Workers
from qlora_kit.server.errors import ApiError
from qlora_kit.server.metrics import ServerMetrics
from qlora_kit.server.protocol import ServedEngine
from qlora_kit.server.response_schema import Usage
from qlora_kit.server.served_models import ServedModels
from qlora_kit.server.settings import ServerSettings

CLIENT_GONE = 499  # nginx's number for it; nobody receives this response


@dataclass(frozen=True)
class Service:
    """The parts of a running server.

    Attributes:
        engine: Makes the answers.
        models: What may be named in a request.
        settings: The limits.
        workers: Runs answers on the engine.
        metrics: Counts what happens.
        control: Matches the engine's control tokens in a text; None where it has none.
    """

    engine: ServedEngine
    models: ServedModels
    settings: ServerSettings
    workers: Workers
    metrics: ServerMetrics
    control: re.Pattern[str] | None

    @classmethod
    def of(cls, engine: ServedEngine, models: ServedModels, settings: ServerSettings) -> Service:
        """The parts around an engine."""
        admission = Admission(capacity=settings.capacity, at_once=settings.max_running)
        control = control_pattern(engine.control_tokens)
        return cls(engine, models, settings, Workers(engine, admission), ServerMetrics(), control)

    def refuse_control_tokens(self, text: str, where: str) -> None:
        """Refuse a turn whose text would end the turn, or open another.

        Raises:
            ApiError: It holds a control token.
        """
        found = None if self.control is None else self.control.search(text)
        if found is not None:
            message = f"{where}: the text holds {found.group()}, which would end or open a turn."
            raise ApiError(400, message, param=where, code="control_token")

    def require_room(self, max_new_tokens: int | None) -> None:
        """Refuse a limit that no answer can reach.

        Raises:
            ApiError: It is beyond the model's context.
        """
        context = self.engine.context_tokens
        if max_new_tokens is not None and max_new_tokens > context:
            message = f"max_tokens: at most {context}, the model's context."
            raise ApiError(400, message, param="max_tokens", code="context_length_exceeded")

    def usage(self, model: str, answers: Sequence[Answer], *, choices: int) -> Usage:
        """Tokens of a request's answers; a prompt that has several ``choices`` counts once. Adds to the metrics."""
        prompt = sum(answer.prompt_tokens for answer in answers[::choices])
        completion = sum(answer.completion_tokens for answer in answers)
        self.metrics.count_tokens(model, prompt=prompt, completion=completion)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def new_id(kind: str) -> str:
    """An id that no other answer has."""
    return f"{kind}-{uuid.uuid4().hex}"


def gone(service: Service) -> Response:
    """What is left to do for a client that has gone."""
    service.metrics.disconnects.inc()
    return Response(status_code=CLIENT_GONE)
