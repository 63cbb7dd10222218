"""Errors in the form that OpenAI's clients read: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from moralguard.errors import GuardError
from moralguard.serving.engine import BusyError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status, 4xx.
        code: for programs, such as "context_length_exceeded".
        param: the field of the body that it is about.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    # a lone surrogate in what a message quotes can't be sent as UTF-8
    text = message.encode("utf-8", "replace").decode("utf-8")
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def error_response(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_body(status, message, code, param), status, headers=dict(headers or {}))


def describe(error: RequestValidationError) -> tuple[str, str | None]:
    """(message, field) of what is wrong with a body; what was given isn't repeated, as it may be text, or no JSON."""
    lines: list[str] = []
    first = None
    if any(finding["type"] == "json_invalid" for finding in error.errors()):
        return "the body isn't JSON; expected a JSON object", None
    for finding in error.errors()[:5]:
        # parts with brackets are pydantic's names of a union's branches
        places = [str(part) for part in finding["loc"] if part != "body" and "[" not in str(part)]
        place = ".".join(places)[:200]
        first = first or (places[0][:100] if places else None)
        lines.append(f"{place or 'the body'}: {finding['msg']}")
    return "; ".join(lines) or "the body can't be read; expected a JSON object", first


def add_handlers(app: FastAPI) -> None:
    """Answer every error that an app raises on purpose in OpenAI's form; ``middleware.Faults`` answers the others."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, error.message, error.code, error.param)

    @app.exception_handler(BusyError)
    async def _busy(request: Request, error: BusyError) -> JSONResponse:
        return error_response(429, str(error), "server_busy", headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(GuardError)
    async def _guard(request: Request, error: GuardError) -> JSONResponse:
        return error_response(400, str(error), "invalid_request")

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = describe(error)
        return error_response(400, message, "invalid_request", param)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return error_response(error.status_code, str(error.detail), code, headers=error.headers)
