"""The ASGI application: guard, recorder and routes around an engine."""

from __future__ import annotations

from fastapi import FastAPI

from qlora_kit.server.chat_route import chat_router
from qlora_kit.server.completion_route import completion_router
from qlora_kit.server.errors import add_error_handlers
from qlora_kit.server.guard import Guard, Recorder
from qlora_kit.server.model_route import model_router
from qlora_kit.server.operations_route import operations_router
from qlora_kit.server.service import Service


def create_app(service: Service) -> FastAPI:
    """The application that serves ``service``.

    Its description is at ``/openapi.json``. Pages that FastAPI makes of it load scripts from elsewhere; they are off.
    """
    app = FastAPI(title="QLoRA Kit", docs_url=None, redoc_url=None)
    add_error_handlers(app)
    for router in (chat_router, completion_router, model_router, operations_router):
        app.include_router(router(service))
    app.add_middleware(Guard, settings=service.settings)
    app.add_middleware(Recorder, metrics=service.metrics)  # added last, so that it sees the guard's refusals too
    return app
