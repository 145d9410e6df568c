"""What every route works with: the engine's workers, the models, the settings and the metrics of one server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.conversation import control_pattern, text_fault
from qlora_kit.engine import Answer
from qlora_kit.server.admission import Admission
from qlora_kit.server.choices import Workers
from qlora_kit.server.errors import ApiError
from qlora_kit.server.metrics import ServerMetrics
from qlora_kit.server.protocol import ServedEngine
from qlora_kit.server.response_schema import Usage
from qlora_kit.server.served_models import ServedModels
from qlora_kit.server.settings import ServerSettings


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

    def require_text(self, text: str, where: str) -> None:
        """Refuse a turn that the engine would refuse, with the name of its field.

        Raises:
            ApiError: Its text would end the turn and open another, or is no text.
        """
        fault = text_fault(where, text, self.control)
        if fault is not None:
            message = f"{fault.what}; expected: {fault.expected}."
            raise ApiError(400, message, param=where, code="invalid_value")

    def require_room(self, max_new_tokens: int | None, where: str) -> None:
        """Refuse a limit that no answer can reach.

        Raises:
            ApiError: It is beyond the model's context.
        """
        context = self.engine.context_tokens
        if max_new_tokens is not None and max_new_tokens > context:
            message = f"{where}: at most {context}, the model's context."
            raise ApiError(400, message, param=where, code="context_length_exceeded")

    def usage(self, model: str, answers: Sequence[Answer], *, choices: int) -> Usage:
        """Tokens of a request's answers; a prompt that has several ``choices`` counts once. Adds to the metrics."""
        prompt = sum(answer.prompt_tokens for answer in answers[::choices])
        completion = sum(answer.completion_tokens for answer in answers)
        self.metrics.count_tokens(model, prompt=prompt, completion=completion)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
