"""Server-sent events: streams what the sequences of a request bring, until they end or the client goes."""

import contextlib
from collections.abc import Iterable
from typing import Protocol

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bittrue.engine.types import TokenEvent
from bittrue.errors import BittrueError
from bittrue.server.answers import body_of_error, response_of_error
from bittrue.server.intake import ClientGone, while_connected
from bittrue.server.submission import Submission

_ENCODE = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
_RESTARTED = b": engine restarted\n\n"


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
    """Turns events of the engine into bytes of the stream. ``body``: the answer as a whole, once all have
    come."""

    def feed(self, event: TokenEvent) -> Iterable[bytes]: ...
    def end(self) -> Iterable[bytes]: ...
    def body(self) -> msgspec.Struct: ...


class EventStream(Response):
    """Answers with a stream. The first event decides the status: a request the engine refuses gets its 4xx.

    Silence longer than ``keepalive_s`` is broken by comment lines, so that proxies keep the connection; they
    tell how far a prefill is. One more tells of an engine that was restarted: the stream goes on as if
    nothing had been. The answer as a whole is kept before the stream's last bytes leave.
    """

    def __init__(self, submission: Submission, renderer: Renderer) -> None:
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            }
        )
        self._submission, self._renderer = submission, renderer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone), self._submission:
            await while_connected(receive, self._stream(scope, receive, send))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        channel, renderer = self._submission.channel, self._renderer
        keepalive_s = self._submission.state.config.keepalive_s
        try:
            events = await channel.next_events(keepalive_s)
        except BittrueError as error:
            self._submission.keep(error.status, body_of_error(error))
            await response_of_error(error)(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        channel.is_open = True
        try:
            while True:
                out = [piece for event in events for piece in renderer.feed(event)]
                if channel.take_restart():
                    out.insert(0, _RESTARTED)
                elif not events:
                    out = [_comment(channel.prefill())]
                if out:
                    await send({"type": "http.response.body", "body": b"".join(out), "more_body": True})
                if not channel.unfinished:
                    break
                events = await channel.next_events(keepalive_s)
            if self._submission.is_kept_afterwards:
                self._submission.keep(200, _ENCODE(renderer.body()))
            last = b"".join(renderer.end()) + DONE
        except BittrueError as error:
            self._submission.keep(error.status, body_of_error(error))
            last = b"data: " + body_of_error(error) + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})
