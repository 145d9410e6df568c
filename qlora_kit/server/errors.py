"""Errors as OpenAI's API words them, and the handlers that put every failure of a request into that shape."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from qlora_kit.errors import AdapterError, ConfigError, DataError, Interrupted, QloraKitError
from qlora_kit.server.request_schema import TEMPLATE_FIELDS

_log = logging.getLogger(__name__)
MAX_FAULTS = 5
_LOGGED = "The server failed on this request; its log says why."
_INVALID = "invalid_request_error"
_TYPES = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
_SENTENCES = {
    404: "There is nothing at this address; the API's routes begin with /v1.",
    405: "This address does not take that method.",
}


class ErrorBody(BaseModel):
    """What went wrong: a sentence, OpenAI's kind of error, the field at fault, and a code for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorBody


class ApiError(Exception):
    """A request that cannot be answered; raised anywhere below a route."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        kind = _TYPES.get(status, "server_error" if status >= 500 else _INVALID)
        self.body = ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))
        self.headers = headers
        super().__init__(message)

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body.model_dump(), status_code=self.status, headers=self.headers)


def told_to_client(error: BaseException) -> ApiError | None:
    """What a client is told of a failure below the routes; None for a bug, which becomes a 500 with its traceback.

    Messages of what the client itself sent name no file; those of adapters and the engine do, and stay in the log.
    """
    if isinstance(error, DataError | ConfigError):
        return ApiError(400, f"{error.faults[0].what}; expected: {error.faults[0].expected}.", code="invalid_request")
    if isinstance(error, Interrupted):
        return ApiError(503, "The server is stopping.", code="stopping")
    if not isinstance(error, QloraKitError):
        return None
    _log.warning("an answer failed: %s", error.faults[0])
    if isinstance(error, AdapterError):
        return ApiError(503, "The adapter cannot be used now: it is gone, or its files are unsound.", code="adapter")
    return ApiError(500, _LOGGED, code="internal_error")


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route's description says of its errors."""
    return {status: {"model": ErrorResponse} for status in statuses}


def add_error_handlers(app: FastAPI) -> None:
    """Every failure under ``app`` becomes an ``ErrorResponse``; a bug also goes to the log with its traceback."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, ApiError):
            raise error
        return error.response()

    async def on_kit_error(request: Request, error: Exception) -> JSONResponse:
        told = told_to_client(error)
        if told is None:
            raise error
        return told.response()

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            raise error
        return _of_faults(error.errors()).response()

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise error
        sentence = _SENTENCES.get(error.status_code, "The request cannot be read: its body is no sound JSON in UTF-8.")
        return ApiError(error.status_code, sentence, headers=error.headers).response()

    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, _LOGGED, code="internal_error").response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(QloraKitError, on_kit_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def _of_faults(faults: Sequence[Mapping[str, Any]]) -> ApiError:
    """One error that names every field at fault; ``param`` is the first of them."""
    if any(fault["type"] == "json_invalid" for fault in faults):
        return ApiError(400, "The body is no sound JSON.", code="invalid_json")
    places = [".".join(str(part) for part in fault["loc"][1:]) for fault in faults]
    sentences = [f"{place or 'the body'}: {_reason(fault)}" for place, fault in zip(places, faults, strict=True)]
    if len(sentences) > MAX_FAULTS:
        sentences = [*sentences[:MAX_FAULTS], f"and {len(sentences) - MAX_FAULTS} more faults"]
    return ApiError(400, "; ".join(sentences) + ".", code="invalid_value", param=places[0][:200] or None)


def _reason(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        if fault["loc"][-1] in TEMPLATE_FIELDS:
            return "refused: an adapter is served with the chat template of its training"
        return "this server does not know the field"
    if fault["type"] == "missing":
        return "the field is missing"
    if fault["type"] == "model_attributes_type":
        return "expected a JSON object, sent as content-type application/json"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
