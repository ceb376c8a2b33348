"""Server-sent events: streams what the sequences of a request bring, until they end or the client goes."""

import contextlib
from collections.abc import Iterable
from typing import Protocol

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bittrue.engine.supervisor import EventChannel
from bittrue.engine.types import TokenEvent
from bittrue.errors import BittrueError
from bittrue.server.answers import body_of_error, response_of_error
from bittrue.server.intake import ClientGone, while_connected

_ENCODE = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def data(value: object) -> bytes:
    """One event with ``value`` as JSON."""
    return b"data: " + _ENCODE(value) + b"\n\n"


def _comment(prefill: tuple[int, int] | None) -> bytes:
    """A line that clients pass over: how far the prefill is, if one runs."""
    if prefill is None:
        return b": keep-alive\n\n"
    done, total = prefill
    return b": prefill %d/%d\n\n" % (done, total)


class Renderer(Protocol):
    """Turns events of the engine into bytes of the stream."""

    def feed(self, event: TokenEvent) -> Iterable[bytes]: ...
    def end(self) -> Iterable[bytes]: ...


class EventStream(Response):
    """Answers with a stream. The first event decides the status: a request the engine refuses gets its 4xx.

    Silence longer than ``keepalive_s`` is broken by comment lines, so that proxies keep the connection; they
    tell how far a prefill is.
    """

    def __init__(self, channel: EventChannel, renderer: Renderer, *, keepalive_s: float) -> None:
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            }
        )
        self._channel, self._renderer, self._keepalive_s = channel, renderer, keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._channel, contextlib.suppress(ClientGone):
            await while_connected(receive, self._stream(scope, receive, send))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        channel, renderer = self._channel, self._renderer
        try:
            events = await channel.next_events(self._keepalive_s)
        except BittrueError as error:
            await response_of_error(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while True:
                out = [piece for event in events for piece in renderer.feed(event)]
                if not events:
                    out = [_comment(channel.prefill())]
                if out:
                    await send({"type": "http.response.body", "body": b"".join(out), "more_body": True})
                if not channel.unfinished:
                    break
                events = await channel.next_events(self._keepalive_s)
            last = b"".join(renderer.end()) + DONE
        except BittrueError as error:
            last = b"data: " + body_of_error(error) + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})
