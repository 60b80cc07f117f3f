"""Every failure as an answer in OpenAI's form, and nothing of the inside in it."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .. import sessions
from ..errors import EngineStopped, InvalidRequest, Overloaded, RequestFailed
from .answers import ErrorDetail, ErrorResponse

MODEL_NOT_FOUND = "model_not_found"
STATUS = {
    MODEL_NOT_FOUND: 404,
    sessions.NOT_FOUND: 404,
    sessions.CONFLICT: 409,
    sessions.FULL: 413,
}


class TimedOut(RuntimeError):
    """An answer took longer than the server allows."""


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> ErrorResponse:
    """OpenAI's error object."""
    # What a client sent may hold half a surrogate pair, which no answer can carry.
    readable = message.encode(errors="replace").decode()
    return ErrorResponse(error=ErrorDetail(message=readable, type=kind, param=param, code=code))


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An answer with OpenAI's error object."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse(error_body(message, kind, param, code).model_dump(), status, headers)


def overloaded(error: Overloaded) -> JSONResponse:
    """429, and when to come back."""
    headers = {"Retry-After": str(error.retry_after)}
    return error_response(429, str(error), code="overloaded", headers=headers)


async def _on_overload(_request: Request, error: Any) -> JSONResponse:
    return overloaded(error)


async def _on_invalid(_request: Request, error: Any) -> JSONResponse:
    return error_response(STATUS.get(error.code, 400), str(error), error.param, error.code)


async def _on_wrong_body(_request: Request, error: Any) -> JSONResponse:
    """One message for the first field at fault, however many alternatives its type has."""
    first = error.errors()[0]
    field_name = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
    reasons = [problem["msg"] for problem in error.errors() if problem["loc"][:2] == first["loc"][:2]]
    where = f"{field_name}: " if field_name else ""
    return error_response(400, where + "; ".join(dict.fromkeys(reasons)), field_name)


async def _on_http_error(_request: Request, error: Any) -> JSONResponse:
    return error_response(error.status_code, error.detail, headers=error.headers)


async def _on_failure(_request: Request, error: Exception) -> JSONResponse:
    status = 503 if isinstance(error, EngineStopped) else 504 if isinstance(error, TimedOut) else 500
    return error_response(status, str(error))


async def _on_bug(_request: Request, error: Exception) -> JSONResponse:
    """The traceback goes to the log, not to the client."""
    return error_response(500, f"internal error: {type(error).__name__}")


ERROR_HANDLERS: dict[type[Exception], Any] = {
    InvalidRequest: _on_invalid,
    Overloaded: _on_overload,
    RequestValidationError: _on_wrong_body,
    HTTPException: _on_http_error,
    RequestFailed: _on_failure,
    EngineStopped: _on_failure,
    TimedOut: _on_failure,
    Exception: _on_bug,
}
