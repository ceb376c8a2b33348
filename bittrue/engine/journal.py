"""Journal: what is known of every request, so that streams go on and answers can be fetched again."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from bittrue.engine.journal_file import MAGIC, SEGMENT_BYTES, JournalFile, unusable
from bittrue.engine.journal_records import (
    Kept,
    Opened,
    OpenedSequence,
    Origin,
    Record,
    SequenceTokens,
    Tokens,
    decode,
    encode,
)
from bittrue.engine.types import FinishReason, Request, TokenEvent
from bittrue.errors import ConfigError
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics

KEPT_BYTES = 64 << 20  # of all kept bodies together; beyond, the oldest go
_RETRY_S = 10.0  # a journal that could not be written is begun again so often
_TOKEN_BYTES = 5  # at most, of one token id in a record


@dataclass(slots=True)
class JournalEntry:
    """One sequence. ``tokens``: all it has so far. One that an earlier server left has no prompt."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    has_prompt_logprobs: bool = False
    finish_reason: FinishReason | None = None
    response: "OpenResponse | None" = None
    index: int = 0  # place among the response's sequences

    def resumed(self) -> Request:
        """What a new engine is sent."""
        return msgspec.structs.replace(self.request, resume=tuple(self.tokens))


@dataclass(slots=True)
class OpenResponse:
    """A response that has not ended, or whose server ended before it did. ``segment`` is the oldest with a
    record of it."""

    number: int
    origin: Origin
    entries: list[JournalEntry]
    segment: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class KeptResponse:
    """How a response ended. ``body`` is JSON; ``segment`` holds the record."""

    number: int
    origin: Origin
    status: int
    finished_at: float
    body: bytes
    segment: int = 0

    def record(self) -> Kept:
        return Kept(self.number, self.origin, self.status, self.finished_at, self.body)


class Journal:
    """Owns the entries. A sequence enters once, collects tokens, and leaves with its finish or its abort; the
    response it belongs to is kept for ``keep_s`` seconds after it ended.

    With a ``directory`` everything is also written there, one write per ``flush``: what was told to a client
    was in the kernel's hands before. If that fails the journal goes on in memory, says so and tries again.
    """

    def __init__(
        self,
        *,
        directory: str = "",
        keep_s: float = 0.0,
        log: Log | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Raises ConfigError for a directory that cannot be used."""
        self._entries: dict[str, JournalEntry] = {}
        self._open: dict[str, OpenResponse] = {}  # by response id
        self._kept: dict[str, KeptResponse] = {}  # by response id, in order of their end
        self._ids: dict[tuple[str, str], str] = {}  # (owner, X-Request-Id) -> response id
        self._kept_bytes = 0
        self._keep_s, self._log, self._metrics = keep_s, log, metrics
        self._next_number = 0
        self._added: list[SequenceTokens] = []
        self._file: JournalFile | None = None
        self._is_broken = False
        self._retry_at_s = 0.0
        if directory:
            self._file = JournalFile(directory)
            self._load(self._file, directory)

    # ---- sequences ----

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __getitem__(self, request_id: str) -> JournalEntry:
        return self._entries[request_id]

    def __iter__(self) -> Iterator[JournalEntry]:
        return iter(list(self._entries.values()))

    def open(self, requests: Sequence[Request], origin: Origin | None = None) -> None:
        """The sequences of one response; without an ``origin`` nothing of them is written or kept."""
        entries = [JournalEntry(request, list(request.resume), index=i) for i, request in enumerate(requests)]
        for entry in entries:
            assert entry.request.request_id not in self._entries, entry.request.request_id
            self._entries[entry.request.request_id] = entry
        if origin is None or self._keep_s == 0:
            return
        response = OpenResponse(self._next_number, origin, entries)
        self._next_number += 1
        for entry in entries:
            entry.response = response
        self._open[origin.response_id] = response
        self._ids[origin.owner, origin.request_id] = origin.response_id
        if self._writes:
            self._append_open(response)
            self.flush()

    def record(self, event: TokenEvent) -> TokenEvent | None:
        """Notes the event's tokens. Returns it as the client may see it, None if the sequence is not open.

        An engine that replays a sequence tells the prompt's log-probabilities again; the client has them.
        """
        entry = self._entries.get(event.request_id)
        if entry is None:
            return None
        entry.tokens.extend(event.token_ids)
        if event.prompt_logprobs is not None:
            if entry.has_prompt_logprobs:
                event = msgspec.structs.replace(event, prompt_logprobs=None)
            entry.has_prompt_logprobs = True
        if event.finish_reason is not None:
            entry.finish_reason = event.finish_reason
            del self._entries[event.request_id]
        response = entry.response
        if response is not None and self._writes and (event.token_ids or event.finish_reason):
            self._added.append(
                SequenceTokens(response.number, entry.index, event.token_ids, event.finish_reason)
            )
            response.num_bytes += 8 + _TOKEN_BYTES * len(event.token_ids)
        return event

    def flush(self) -> None:
        """Writes what was noted since the last time, in one go: before a client hears of it."""
        if self._file is None or self._is_broken:
            self._added.clear()
            return
        try:
            if self._added:
                self._file.append(encode(Tokens(self._added)))
                self._added = []
            self._file.flush()
            if self._file.sizes[self._file.current] >= SEGMENT_BYTES:
                self._file.rotate()
                self._clean(self._file)
        except OSError as error:
            self._fail(error)

    def close(self, request_id: str) -> bool:
        """Forgets a sequence; False if it was not open."""
        return self._entries.pop(request_id, None) is not None

    # ---- responses ----

    def keep(self, response_id: str, status: int, body: bytes) -> None:
        """The response has ended; ``body`` is what a fetch gets from now on. Ids that are not open are
        ignored."""
        response = self._open.pop(response_id, None)
        if response is None:
            return
        kept = KeptResponse(response.number, response.origin, status, time.time(), body)
        self._add_kept(kept)
        if self._writes:
            self._append_kept(kept)
            self.flush()

    def find(self, given_id: str, owner: str) -> OpenResponse | KeptResponse | None:
        """By response id or X-Request-Id (the last one with it); None for those of other owners as well."""
        response_id = self._ids.get((owner, given_id), given_id)
        found = self._open.get(response_id) or self._kept.get(response_id)
        if found is None or found.origin.owner != owner:
            return None
        if isinstance(found, KeptResponse) and found.finished_at + self._keep_s <= time.time():
            return None
        return found

    def opened(self, response_id: str) -> OpenResponse | None:
        return self._open.get(response_id)

    def interrupted(self) -> list[OpenResponse]:
        """Responses without a sequence that runs: an earlier server did not finish them. Each is to be
        kept."""
        return [
            response
            for response in self._open.values()
            if not any(entry.request.request_id in self._entries for entry in response.entries)
        ]

    def keep_house(self) -> None:
        """Lets go of what has expired, on the disk too, and tries a failed journal again. To be called every
        few seconds."""
        now = time.time()
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if oldest.finished_at + self._keep_s > now:
                break
            self._drop_kept(oldest)
        if self._file is None:
            return
        if self._is_broken:
            if time.monotonic() >= self._retry_at_s:
                self._begin_again(self._file)
            return
        try:
            is_stale = self._live_bytes == 0 and self._file.sizes[self._file.current] > len(MAGIC)
            if is_stale:
                self._file.rotate()
            self._clean(self._file)
        except OSError as error:
            self._fail(error)

    def shut(self) -> None:
        """Everything is on the disk, and the directory is free."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # ---- kept responses ----

    def _add_kept(self, kept: KeptResponse) -> None:
        self._kept[kept.origin.response_id] = kept
        self._ids[kept.origin.owner, kept.origin.request_id] = kept.origin.response_id
        self._kept_bytes += len(kept.body)
        while self._kept_bytes > KEPT_BYTES:
            self._drop_kept(next(iter(self._kept.values())))
        self._note_kept()

    def _drop_kept(self, kept: KeptResponse) -> None:
        origin = kept.origin
        del self._kept[origin.response_id]
        self._kept_bytes -= len(kept.body)
        if self._ids.get((origin.owner, origin.request_id)) == origin.response_id:
            del self._ids[origin.owner, origin.request_id]
        self._note_kept()

    def _note_kept(self) -> None:
        if self._metrics is not None:
            self._metrics.set("bittrue_kept_responses", len(self._kept))
            self._metrics.set("bittrue_kept_response_bytes", self._kept_bytes)

    # ---- the file ----

    @property
    def _writes(self) -> bool:
        return self._file is not None and not self._is_broken

    @property
    def _live_bytes(self) -> int:
        return self._kept_bytes + sum(response.num_bytes for response in self._open.values())

    def _append_open(self, response: OpenResponse) -> None:
        assert self._file is not None
        body = encode(_opened(response))
        self._file.append(body)
        response.segment, response.num_bytes = self._file.current, len(body)
        ended = _ended(response)
        if ended:
            self._file.append(encode(Tokens(ended)))

    def _append_kept(self, kept: KeptResponse) -> None:
        assert self._file is not None
        self._file.append(encode(kept.record()))
        kept.segment = self._file.current

    def _clean(self, file: JournalFile) -> None:
        """Deletes the oldest segments as long as nothing in them is needed. If more than half of all bytes
        is not, what is needed of the oldest moves to the newest.

        Only the oldest go: a segment that tells a response's end must not go before the one that opens it.
        """
        while len(file.sizes) > 1:
            oldest = next(iter(file.sizes))
            opens = [response for response in self._open.values() if response.segment <= oldest]
            kept = [response for response in self._kept.values() if response.segment <= oldest]
            if opens or kept:
                if file.num_bytes <= 2 * self._live_bytes + 4 * SEGMENT_BYTES:
                    break
                for response in opens:
                    self._append_open(response)
                for ended in kept:
                    self._append_kept(ended)
                file.flush()
            file.delete(oldest)
        if self._metrics is not None:
            self._metrics.set("bittrue_journal_bytes", file.num_bytes)

    def _fail(self, error: OSError) -> None:
        """From here on in memory only, until it can be written again."""
        assert self._file is not None
        self._is_broken = True
        self._added.clear()
        self._retry_at_s = time.monotonic() + _RETRY_S
        if self._log is not None:
            self._log.error(
                "journal_failed",
                directory=self._file.directory,
                error=error.strerror or error,
                retry_s=_RETRY_S,
                lost="a crash of the server now loses what it was told since",
            )
        if self._metrics is not None:
            self._metrics.count("bittrue_journal_errors")

    def _begin_again(self, file: JournalFile) -> None:
        try:
            self._write_all(file)
        except OSError as error:
            self._fail(error)
            return
        self._is_broken = False
        if self._log is not None:
            self._log.info("journal_restored", directory=file.directory)

    def _write_all(self, file: JournalFile) -> None:
        """One segment that holds everything known takes the place of all."""
        bodies = [encode(kept.record()) for kept in self._kept.values()]
        for response in self._open.values():
            opened = encode(_opened(response))
            response.num_bytes = len(opened)
            bodies.append(opened)
            ended = _ended(response)
            if ended:
                bodies.append(encode(Tokens(ended)))
        file.begin(bodies)
        for kept in self._kept.values():
            kept.segment = file.current
        for response in self._open.values():
            response.segment = file.current

    def _load(self, file: JournalFile, directory: str) -> None:
        """Takes over what an earlier server left."""
        by_number: dict[int, OpenResponse | KeptResponse] = {}
        try:
            for segment in file.read():
                if segment.num_bad and self._log is not None:
                    self._log.warning("journal_cut", segment=segment.number, bytes=segment.num_bad)
                for body in segment.bodies:
                    _apply(decode(body), by_number)
            self._next_number = max(by_number, default=-1) + 1
            self._take_over(by_number)
            self._write_all(file)
        except OSError as error:
            file.close()
            raise unusable(directory, error) from error
        except msgspec.DecodeError as error:
            file.close()
            message = f"journal_dir: {directory} holds unknown records ({error}); give an empty directory"
            raise ConfigError(message, field="journal_dir") from error
        if self._log is not None and by_number:
            self._log.info("journal_read", kept=len(self._kept), interrupted=len(self._open))

    def _take_over(self, by_number: dict[int, OpenResponse | KeptResponse]) -> None:
        if self._keep_s == 0:
            return
        now = time.time()
        ended = [response for response in by_number.values() if isinstance(response, KeptResponse)]
        for kept in sorted(ended, key=lambda kept: kept.finished_at):
            if kept.finished_at + self._keep_s > now:
                self._add_kept(kept)
        for response in by_number.values():
            if isinstance(response, OpenResponse):
                self._open[response.origin.response_id] = response
                self._ids[response.origin.owner, response.origin.request_id] = response.origin.response_id


def _opened(response: OpenResponse) -> Opened:
    sequences = [
        OpenedSequence(len(entry.request.prompt), entry.request.params, entry.tokens)
        for entry in response.entries
    ]
    return Opened(response.number, response.origin, sequences)


def _ended(response: OpenResponse) -> list[SequenceTokens]:
    return [
        SequenceTokens(response.number, entry.index, (), entry.finish_reason)
        for entry in response.entries
        if entry.finish_reason is not None
    ]


def _apply(record: Record, by_number: dict[int, OpenResponse | KeptResponse]) -> None:
    match record:
        case Opened(number, origin, sequences):
            entries = [
                JournalEntry(
                    Request(request_id=f"{origin.response_id}/{index}", prompt=(), params=sequence.params),
                    sequence.token_ids,
                    index=index,
                )
                for index, sequence in enumerate(sequences)
            ]
            by_number[number] = OpenResponse(number, origin, entries)
        case Kept(number, origin, status, finished_at, body):
            by_number[number] = KeptResponse(number, origin, status, finished_at, body)
        case Tokens(added):
            for part in added:
                response = by_number.get(part.number)
                if isinstance(response, OpenResponse):
                    entry = response.entries[part.index]
                    entry.tokens.extend(part.token_ids)
                    entry.finish_reason = part.finish_reason or entry.finish_reason
