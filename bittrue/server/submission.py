"""Submission: the sequences of one HTTP request, and what remains of its answer when it has ended."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from bittrue.engine.journal import OpenResponse
from bittrue.engine.journal_records import Origin
from bittrue.engine.supervisor import EventChannel
from bittrue.engine.types import FinishReason, Request, SamplingParams, TokenEvent
from bittrue.errors import BittrueError, Draining
from bittrue.server.answers import ErrorDetail, body_of_error, error_body
from bittrue.server.intake import ClientGone
from bittrue.server.keys import Caller
from bittrue.server.state import ServerState
from bittrue.text.tokenizer import Tokenizer

GONE = 410
MAX_KEPT_BODY = 16 << 20  # bytes; a longer answer is told once


class PartialChoice(msgspec.Struct):
    """What one sequence had when its response ended. ``text`` is the tokens as text, special ones spelt
    out."""

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None


class PartialResponse(msgspec.Struct):
    """What is known of a response that did not finish."""

    id: str
    endpoint: str
    created: int
    choices: list[PartialChoice]
    state: str = "interrupted"


class InterruptedBody(msgspec.Struct):
    error: ErrorDetail
    response: PartialResponse


def interrupted_body(tokenizer: Tokenizer, response: OpenResponse, reason: str) -> bytes:
    """The answer to who fetches a response that did not finish because of ``reason``."""
    message = f"the response did not finish: {reason}; what it had until then is in `response`"
    choices = [
        PartialChoice(index, entry.tokens, tokenizer.decode(entry.tokens), entry.finish_reason)
        for index, entry in enumerate(response.entries)
    ]
    origin = response.origin
    return msgspec.json.encode(
        InterruptedBody(
            ErrorDetail(message, "not_found_error", None, "response_interrupted"),
            PartialResponse(origin.response_id, origin.endpoint, origin.created, choices),
        )
    )


@dataclass(slots=True)
class Submission:
    """``index_of`` maps a sequence's request id to its place: prompt-major, then sample.

    Leaving the ``with`` block aborts what has not finished; what a fetch will get is then settled.
    """

    state: ServerState
    response_id: str
    channel: EventChannel
    index_of: dict[str, int]

    @property
    def is_kept_afterwards(self) -> bool:
        """Whether the answer can be fetched again: otherwise a stream need not collect it."""
        return self.state.config.keep_responses_s > 0

    def index(self, event: TokenEvent) -> int:
        return self.index_of[event.request_id]

    def keep(self, status: int, body: bytes) -> None:
        """The response has ended with this; to be called before its last byte leaves."""
        if len(body) > MAX_KEPT_BODY:
            message = f"the response has {len(body)} bytes; at most {MAX_KEPT_BODY} are kept"
            status, body = GONE, error_body(GONE, message, code="response_too_large")
        self.state.client.journal.keep(self.response_id, status, body)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        response = self.state.client.journal.opened(self.response_id)
        if response is not None and isinstance(error, BittrueError):
            self.keep(error.status, body_of_error(error))
        elif response is not None:
            is_gone = isinstance(error, ClientGone)
            reason = "the client closed the connection" if is_gone else "the server could not complete it"
            self.keep(GONE, interrupted_body(self.state.tokenizer, response, reason))
        self.channel.__exit__(kind, error, trace)


def submit(
    state: ServerState,
    prefix: str,
    sequences: Sequence[tuple[tuple[int, ...], SamplingParams]],
    *,
    caller: Caller,
    endpoint: str,
    cache_salt: str | None,
    priority: int = 0,
    records_choices: bool = False,
) -> Submission:
    """Hands (prompt, sampling) pairs to the engine, all or none. Raises QueueFull, Draining, EngineDied."""
    if state.client.dead is not None:
        raise state.client.dead
    if state.is_draining:
        raise Draining("the server is shutting down and takes no new request; send it to another one")
    response_id = f"{prefix}-{uuid.uuid4().hex}"
    salt = caller.cache_salt(cache_salt)
    requests = [
        Request(
            request_id=f"{response_id}/{index}",
            prompt=prompt,
            params=params,
            priority=priority,
            cache_salt=salt,
            records_choices=records_choices,
        )
        for index, (prompt, params) in enumerate(sequences)
    ]
    origin = Origin(response_id, caller.request_id, caller.owner, endpoint, int(time.time()))
    channel = state.client.open(requests, origin)
    return Submission(state, response_id, channel, {r.request_id: i for i, r in enumerate(requests)})
