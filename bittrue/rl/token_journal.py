"""TokenJournal: what an engine elsewhere has said of every unfinished request, so that another can go on."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bittrue.engine.types import Abort, Request, Running, TokenEvent
from bittrue.errors import InvalidRequest


@dataclass(slots=True)
class Unfinished:
    """One request. ``token_ids``: all it has so far, those of its ``resume`` among them; ``logprobs``: of
    those that were sampled here, where they were asked for. ``versions``: of the weights, by the token they
    begin with."""

    request: Request
    token_ids: list[int]
    versions: list[tuple[int, str]]
    logprobs: list[float] = field(default_factory=list)
    is_aborted: bool = False
    is_resumed: bool = False  # by another engine than the first
    is_begun: bool = False  # an event was passed on
    has_prompt_logprobs: bool = False
    num_cached: int = 0  # as the first engine told it
    num_drafted: int = 0  # with all engines so far
    num_accepted: int = 0
    drafts_before: tuple[int, int] = (0, 0)  # drafted and accepted with the engines before this one


class TokenJournal:
    """Owns the entries, and the version of the weights that the engine has.

    A token belongs to the version at the time its event comes: an engine tells what it sampled before it
    tells that its weights are others.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        self._entries: dict[str, Unfinished] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Unfinished]:
        return iter(list(self._entries.values()))

    def open(self, request: Request) -> None:
        """A request that the engine is given. Raises InvalidRequest for an id that is in use."""
        if request.request_id in self._entries:
            fact = f"a request with id {request.request_id!r} already runs; give another id"
            raise InvalidRequest(fact, param="request_id")
        self._entries[request.request_id] = Unfinished(request, list(request.resume), [(0, self.version)])

    def close(self, request_id: str) -> None:
        """A request that the engine refused."""
        self._entries.pop(request_id, None)

    def abort(self, request_id: str) -> bool:
        """A request that the engine is told to end; False where it is not under way."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.is_aborted = True
        return entry is not None

    def record(self, event: TokenEvent) -> TokenEvent | None:
        """Notes an event. Returns it as one engine would have told it that ran the request from its
        beginning; None where the request is not open."""
        entry = self._entries.get(event.request_id)
        if entry is None:
            return None
        told = self._as_of_one_engine(entry, event) if entry.is_resumed else event
        entry.token_ids += event.token_ids
        entry.logprobs += [each.logprob for each in event.logprobs]
        entry.is_begun = True
        entry.has_prompt_logprobs |= event.prompt_logprobs is not None
        entry.num_cached, entry.num_drafted, entry.num_accepted = (
            told.num_cached_tokens,
            told.num_drafted,
            told.num_accepted,
        )
        if event.finish_reason is not None:
            del self._entries[event.request_id]
        return told

    def note_update(self, version: str, running: Running) -> None:
        """The engine has told that its weights are ``version`` now."""
        self.version = version
        for entry in self._entries.values():
            entry.is_aborted |= running == "abort"
            if not entry.is_aborted:  # else its end is on the way
                if running == "retract":
                    _drop_empty(entry)
                entry.versions.append((len(entry.token_ids), version))

    def give_back(self) -> list[Request | Abort]:
        """The engine has gone: what another is sent so that it goes on with every request."""
        messages: list[Request | Abort] = []
        for name, entry in self._entries.items():
            entry.is_resumed = True
            current = entry.versions[-1]
            _drop_empty(entry)
            if entry.versions[-1:] != [current]:
                entry.versions.append(current)
            entry.drafts_before = (entry.num_drafted, entry.num_accepted)
            messages.append(msgspec.structs.replace(entry.request, resume=tuple(entry.token_ids)))
            if entry.is_aborted:
                messages.append(Abort(request_id=name))
        return messages

    def _as_of_one_engine(self, entry: Unfinished, event: TokenEvent) -> TokenEvent:
        drafted, accepted = entry.drafts_before
        changes: dict[str, Any] = {
            "num_drafted": drafted + event.num_drafted,
            "num_accepted": accepted + event.num_accepted,
        }
        if entry.is_begun:
            changes |= {"queued_s": None, "num_cached_tokens": entry.num_cached}
        if entry.has_prompt_logprobs:
            changes["prompt_logprobs"] = None
        if event.choices is not None:
            changes["choices"] = msgspec.structs.replace(event.choices, versions=tuple(entry.versions))
        return msgspec.structs.replace(event, **changes)


def _drop_empty(entry: Unfinished) -> None:
    """Versions that sampled no token, and whose rows are gone."""
    while entry.versions and entry.versions[-1][0] == len(entry.token_ids):
        entry.versions.pop()
