"""/health, /metrics and /admin: what the server is, how it does, what an operator may ask of it."""

import os
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.engine.types import CacheCounters, DraftCounters
from bittrue.obs.resident import resident
from bittrue.server.answers import json_response
from bittrue.server.state import state_of


class Health(msgspec.Struct):
    status: str  # ok, draining, restarting (requests wait and go on), or failed (no engine any more)
    model: str
    weight_version: str
    reason: str | msgspec.UnsetType = msgspec.UNSET  # of failed


class Fingerprint(msgspec.Struct):
    model: str
    max_context: int
    engine: dict[str, Any]


class Cache(msgspec.Struct):
    """``pages``, ``snapshots``: cached on the device. The rest: totals since the engine started."""

    pages: int
    snapshots: int
    cache: CacheCounters
    drafts: DraftCounters


class Flush(msgspec.Struct):
    """What was dropped: ``pages`` and ``snapshots`` of the device, blobs of each other tier."""

    dropped: dict[str, int]


async def health(request: Request) -> Response:
    """200 while requests are served; 503 while draining, and when the engine cannot be kept alive."""
    state = state_of(request)
    dead = state.client.dead
    if dead is not None:
        status = "failed"
    elif state.is_draining:
        status = "draining"
    else:
        status = "ok" if state.client.is_up else "restarting"
    answer = Health(status, state.config.name, state.weight_version)
    if dead is not None:
        answer.reason = str(dead)
    return json_response(answer, status=200 if status in ("ok", "restarting") else 503)


async def metrics(request: Request) -> Response:
    state = state_of(request)
    client = state.client
    state.metrics.update_engine(client.stats)
    state.metrics.set("bittrue_engine_up", int(client.is_up))
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
    """Numbers of the engine after everything submitted so far; pages and slots: free + held + cached =
    total."""
    return json_response(await state_of(request).client.fresh_stats())


async def cache(request: Request) -> Response:
    """What the prefix cache holds and did, and what became of drafts."""
    stats = await state_of(request).client.fresh_stats()
    return json_response(Cache(stats.pages_cached, stats.slots_cached, stats.cache, stats.drafts))


async def flush(request: Request) -> Response:
    """Drops every cached prefix on every tier. 200 means that nothing was left; NotFlushed (500) and
    EngineDied (503) that something may be."""
    state = state_of(request)
    flushed = await state.client.flush()
    state.log.info("cache_flushed", **flushed.dropped)
    return json_response(Flush(flushed.dropped))
