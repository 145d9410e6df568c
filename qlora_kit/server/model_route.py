"""``GET /v1/models``: the base and every adapter that is served, each with its card."""

from __future__ import annotations

from fastapi import APIRouter

from qlora_kit.server.errors import error_responses
from qlora_kit.server.response_schema import ModelCard, ModelList
from qlora_kit.server.service import Service


def model_router(service: Service) -> APIRouter:
    """The routes on top of ``service``."""
    router = APIRouter()

    @router.get("/v1/models", responses=error_responses(401, 421))
    async def list_models() -> ModelList:
        """The base, and the adapters by name."""
        return ModelList(data=service.models.cards())

    @router.get("/v1/models/{model:path}", responses=error_responses(401, 404, 421))
    async def retrieve_model(model: str) -> ModelCard:
        """One of them; a Hub id holds a slash."""
        return service.models.card(model)

    return router
