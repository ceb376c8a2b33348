"""Whole answers: the events of a request collected into one JSON body."""

from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bittrue.engine.types import TokenEvent
from bittrue.server.intake import while_connected
from bittrue.server.submission import Submission

_ENCODE = msgspec.json.Encoder().encode


class Collector(Protocol):
    """Takes in the events of a request; ``body`` is the answer once all have come."""

    def collect(self, event: TokenEvent) -> None: ...
    def body(self) -> msgspec.Struct: ...


async def whole_response(request: Request, submission: Submission, collector: Collector) -> Response:
    """Answers when every sequence has ended. Raises the BittrueError that ended one, ClientGone."""
    with submission:
        await while_connected(request.receive, _collect(submission, collector))
        body = _ENCODE(collector.body())
        submission.keep(200, body)
        return Response(body, media_type="application/json")


async def _collect(submission: Submission, collector: Collector) -> None:
    channel = submission.channel
    while channel.unfinished:
        for event in await channel.next_events():
            collector.collect(event)
