"""JSON answers and errors in OpenAI's shape."""

from typing import Any

import msgspec
from starlette.responses import Response

from bittrue.errors import BittrueError, PoisonRequest, QueueFull

_ENCODE = msgspec.json.Encoder().encode
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    408: "invalid_request_error",
    410: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


def error_body(status: int, message: str, *, code: str, param: str | None = None) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}``."""
    return _ENCODE(ErrorBody(ErrorDetail(message, _TYPES.get(status, "server_error"), param, code)))


def body_of_error(error: BittrueError) -> bytes:
    return error_body(error.status, str(error), code=error.code, param=getattr(error, "param", None))


def json_response(value: object, *, status: int = 200) -> Response:
    return Response(_ENCODE(value), status_code=status, media_type="application/json")


def error_response(
    status: int, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    body = error_body(status, message, code=code, param=param)
    return Response(body, status_code=status, media_type="application/json", headers=headers)


def response_of_error(error: BittrueError) -> Response:
    headers: dict[str, Any] = {}
    if isinstance(error, QueueFull):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, PoisonRequest):
        headers["x-should-retry"] = "false"  # OpenAI's clients would send it again, and kill another engine
    return Response(
        body_of_error(error), status_code=error.status, media_type="application/json", headers=headers
    )
