"""What is not the API itself: ``/health``, ``/metrics``, and the playground's three files."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from qlora_kit.server.errors import error_responses
from qlora_kit.server.metrics import CONTENT_TYPE
from qlora_kit.server.response_schema import Health
from qlora_kit.server.service import Service

# Path -> file of the package, and its type. These paths and /health are open without a key.
PAGE_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/playground.css": ("page.css", "text/css; charset=utf-8"),
    "/playground.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEALTH = "/health"
# The page runs its own script and talks to its own server, and to nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)


def operations_router(service: Service) -> APIRouter:
    """The routes on top of ``service``."""
    router = APIRouter()

    @router.get(HEALTH, response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """200 while the engine works, 503 once it has failed."""
        alive = service.engine.load_now().alive
        return JSONResponse({"status": "ok" if alive else "failed"}, status_code=200 if alive else 503)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **error_responses(401, 421)},
    )
    async def metrics() -> Response:
        """Counters and gauges for Prometheus."""
        load = service.engine.load_now()
        text = service.metrics.text(load, adapters=len(service.models.adapters))
        return Response(text, headers={"content-type": CONTENT_TYPE})

    for path, (name, media_type) in PAGE_FILES.items():
        content = files("qlora_kit.server").joinpath(name).read_bytes()
        _add_page(router, path, content, media_type)
    return router


def _add_page(router: APIRouter, path: str, content: bytes, media_type: str) -> None:
    headers = {"content-type": media_type, "content-security-policy": _POLICY, "cache-control": "no-cache"}

    async def page() -> Response:
        return Response(content, headers=headers)

    router.add_api_route(path, page, include_in_schema=False)
