"""The HTTP application: routes, and the gate every request passes (request id, key, counters, errors)."""

import re
import time
import uuid

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bittrue.errors import BittrueError, HttpRefused
from bittrue.server import admin, chat, completions, generate, models, requests, tokenize
from bittrue.server.answers import error_response, response_of_error
from bittrue.server.intake import ClientGone
from bittrue.server.keys import Caller, Keys, set_caller
from bittrue.server.state import ServerState

ROUTES = (
    Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
    Route("/v1/completions", completions.completions, methods=["POST"]),
    Route(requests.PATH, requests.show_request, methods=["GET"]),
    Route("/v1/models", models.list_models, methods=["GET"]),
    Route("/v1/models/{name:path}", models.show_model, methods=["GET"]),
    Route("/generate", generate.generate, methods=["POST"]),
    Route("/tokenize", tokenize.tokenize, methods=["POST"]),
    Route("/detokenize", tokenize.detokenize, methods=["POST"]),
    Route("/health", admin.health, methods=["GET"]),
    Route("/metrics", admin.metrics, methods=["GET"]),
    Route("/admin/fingerprint", admin.fingerprint, methods=["GET"]),
    Route("/admin/stats", admin.stats, methods=["GET"]),
    Route("/admin/cache", admin.cache, methods=["GET"]),
    Route("/admin/flush", admin.flush, methods=["POST"]),
)
_OPEN_PATHS = ("/health",)  # probes of orchestrators carry no key
_PATHS = frozenset(route.path for route in ROUTES)
_REQUESTS = requests.PATH.partition("{")[0]
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def build_app(state: ServerState) -> ASGIApp:
    """The ASGI application over ``state``."""
    app = Starlette(
        routes=ROUTES,
        exception_handlers={
            BittrueError: _answer_error,
            HTTPException: _answer_http_exception,
            RecursionError: _answer_recursion,
            ClientGone: _answer_nobody,
            Exception: _answer_bug,
        },
    )
    app.router.redirect_slashes = False
    app.state.bittrue = state
    return Gate(app, state)


class Gate:
    """Stands before the application: checks the key, gives each request an id, counts and logs it."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state, self._keys = app, state, Keys(state.config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        status = 499  # until an answer begins
        started_s = time.perf_counter()

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("ascii"))]
                if status == 413:  # the rest of the body is not read
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        self._state.num_active += 1
        try:
            owner = self._keys.owner_of(headers.get(b"authorization", b""), scope["path"])
            if owner is not None or scope["path"] in _OPEN_PATHS:
                set_caller(scope, Caller(request_id, owner or ""))
                await self._app(scope, receive, send_named)
            else:
                refused = HttpRefused(
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    status=401,
                    code="invalid_api_key",
                )
                await response_of_error(refused)(scope, receive, send_named)
        finally:
            self._state.num_active -= 1
            self._note(scope, request_id, status, time.perf_counter() - started_s)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        path = scope["path"]
        endpoint = path if path in _PATHS else "other"  # a bounded number of label values
        if path.startswith(_REQUESTS):
            endpoint = _REQUESTS + "{request_id}"
        self._state.metrics.count("bittrue_requests", endpoint=endpoint, status=str(status))
        write = self._state.log.debug if path in ("/health", "/metrics") else self._state.log.info
        write("request", id=request_id, method=scope["method"], path=path, status=status, seconds=seconds)


def _request_id(given: bytes) -> str:
    """The client's id if it is printable ASCII of a sensible length, else a fresh one."""
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BittrueError)
    return response_of_error(error)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _answer_bug(request: Request, error: Exception) -> Response:
    """The error itself goes on to the log."""
    return error_response(500, f"the server met a bug: {type(error).__name__}", code="internal_error")


async def _answer_recursion(request: Request, error: Exception) -> Response:
    return error_response(400, "the body is nested too deeply", code="invalid_request")


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        return error_response(404, f"there is no {path} here", code="unknown_path")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{path} does not take {request.method}; it takes {allowed}"
        return error_response(405, message, code="wrong_method", headers={"allow": allowed})
    return error_response(error.status_code, str(error.detail), code="http_error")
