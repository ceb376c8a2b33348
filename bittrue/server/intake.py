"""What comes in over HTTP: bodies within a size and a time, and clients that go away."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from bittrue.errors import HttpRefused

_BODY_TIMEOUT_S = 60.0  # a client that sends its body slower than this holds a connection for nothing
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed the connection; nobody reads an answer. Never leaves the server."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises HttpRefused: 413 as soon as it is too large, 408 when it is too slow."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for part in request.stream():
                parts += part
                if len(parts) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError as error:
        message = f"the body did not arrive within {_BODY_TIMEOUT_S:g} s; send it again"
        raise HttpRefused(message, status=408, code="body_too_slow") from error
    except ClientDisconnect as error:
        raise ClientGone from error
    return bytes(parts)


def _too_large(max_bytes: int) -> HttpRefused:
    message = f"the body is larger than {max_bytes} bytes; shorten it or serve with a larger --max-body-bytes"
    return HttpRefused(message, status=413, code="body_too_large")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client goes away. Raises ClientGone then.

    The body must have been read: only then does ``receive`` speak of nothing but the disconnect.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
