"""Submission: the sequences of one HTTP request, their ids, and the channel their events come from."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from bittrue.engine.supervisor import EventChannel
from bittrue.engine.types import Request, SamplingParams, TokenEvent
from bittrue.errors import Draining
from bittrue.server.state import ServerState


@dataclass(frozen=True, slots=True)
class Submission:
    """``index_of`` maps a sequence's request id to its place: prompt-major, then sample."""

    response_id: str
    channel: EventChannel
    index_of: dict[str, int]

    def index(self, event: TokenEvent) -> int:
        return self.index_of[event.request_id]


def submit(
    state: ServerState,
    prefix: str,
    sequences: Sequence[tuple[tuple[int, ...], SamplingParams]],
    *,
    priority: int = 0,
) -> Submission:
    """Hands (prompt, sampling) pairs to the engine, all or none. Raises QueueFull, Draining, EngineDied."""
    if state.is_draining:
        raise Draining("the server is shutting down and takes no new request; send it to another one")
    response_id = f"{prefix}-{uuid.uuid4().hex}"
    requests = [
        Request(request_id=f"{response_id}/{index}", prompt=prompt, params=params, priority=priority)
        for index, (prompt, params) in enumerate(sequences)
    ]
    channel = state.client.open(requests)
    return Submission(response_id, channel, {r.request_id: i for i, r in enumerate(requests)})
