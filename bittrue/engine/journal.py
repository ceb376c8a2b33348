"""Token journal: prompt, sampling and tokens so far of every unfinished request, so that streams go on."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from bittrue.engine.types import Request, TokenEvent


@dataclass(slots=True)
class JournalEntry:
    """One unfinished request. ``num_fruitless_restarts`` counts engine deaths since its last token."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    has_prompt_logprobs: bool = False
    num_fruitless_restarts: int = 0


class Journal:
    """Owns the entries. A request enters once, collects tokens, and leaves with its finish or its abort."""

    def __init__(self) -> None:
        self._entries: dict[str, JournalEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[JournalEntry]:
        return iter(list(self._entries.values()))

    def open(self, request: Request) -> None:
        assert request.request_id not in self._entries, request.request_id
        self._entries[request.request_id] = JournalEntry(request, list(request.resume))

    def record(self, event: TokenEvent) -> TokenEvent | None:
        """Notes the event's tokens. Returns it as the client may see it, None if the request is not open.

        An engine that replays a request tells the prompt's log-probabilities again; the client has them.
        """
        entry = self._entries.get(event.request_id)
        if entry is None:
            return None
        if event.token_ids:
            entry.tokens.extend(event.token_ids)
            entry.num_fruitless_restarts = 0
        if event.prompt_logprobs is not None:
            if entry.has_prompt_logprobs:
                event = msgspec.structs.replace(event, prompt_logprobs=None)
            entry.has_prompt_logprobs = True
        if event.finish_reason is not None:
            del self._entries[event.request_id]
        return event

    def close(self, request_id: str) -> bool:
        """Forgets a request; False if it was not open."""
        return self._entries.pop(request_id, None) is not None

    def resumed(self) -> list[Request]:
        """Every unfinished request with its tokens so far, oldest first: what a new engine is sent."""
        return [
            msgspec.structs.replace(entry.request, resume=tuple(entry.tokens))
            for entry in self._entries.values()
        ]
