"""GET /health, /metrics, /admin/fingerprint and /admin/stats: what the server is and how it does."""

import os
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.obs.resident import resident
from bittrue.server.answers import json_response
from bittrue.server.state import state_of


class Health(msgspec.Struct):
    status: str  # ok, draining, or restarting (requests wait and go on)
    model: str
    weight_version: str


class Fingerprint(msgspec.Struct):
    model: str
    max_context: int
    engine: dict[str, Any]


async def health(request: Request) -> Response:
    """200 while requests are served; 503 while draining."""
    state = state_of(request)
    if state.is_draining:
        status = "draining"
    else:
        status = "ok" if state.client.is_up else "restarting"
    answer = Health(status, state.config.name, state.weight_version)
    return json_response(answer, status=503 if state.is_draining else 200)


async def metrics(request: Request) -> Response:
    state = state_of(request)
    client = state.client
    state.metrics.update_engine(client.stats)
    engine = None if client.pid is None else resident(client.pid)
    state.metrics.update_memory(
        client.ready.memory.ledger, {"engine": engine, "server": resident(os.getpid())}
    )
    return Response(state.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def fingerprint(request: Request) -> Response:
    """What the bits of an answer depend on."""
    state = state_of(request)
    return json_response(Fingerprint(state.config.name, state.max_context, state.client.ready.fingerprint))


async def stats(request: Request) -> Response:
    """Numbers of the engine after everything submitted so far; pages and slots: free + held = total."""
    return json_response(await state_of(request).client.fresh_stats())
