"""EngineClient: the server's side of the engine process; starts it, restarts it, fans its tokens out."""

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec

from bittrue.config.run import RunConfig
from bittrue.engine.journal import Journal
from bittrue.engine.launch import EngineProcess
from bittrue.engine.types import Abort, EngineStats, Request, TokenEvent
from bittrue.engine.wire import (
    HEADER_BYTES,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Refused,
    Shutdown,
    StepDone,
    ToEngine,
    body_bytes,
    decode_from_engine,
    error_of,
    frame,
)
from bittrue.errors import BittrueError, EngineDied, InvalidRequest, QueueFull
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics
from bittrue.obs.prefill import PrefillLog

_BACKOFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
# A request that was there at three engine deaths in a row without a token is given up.
_MAX_FRUITLESS_RESTARTS = 2
_READ_BUFFER = 1 << 20  # bytes; a step's frame should never wait for the stream to resume
_CLOSE_TIMEOUT_S = 10.0


class EventChannel:
    """The events of the sequences of one HTTP request, in order of arrival.

    Leaving the ``with`` block aborts the sequences that have not finished.
    """

    __slots__ = ("_client", "_events", "_failure", "_waiter", "unfinished")

    def __init__(self, client: "EngineClient", request_ids: Sequence[str]) -> None:
        self._client = client
        self._events: deque[TokenEvent] = deque()
        self._failure: BittrueError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.unfinished = set(request_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for request_id in self.unfinished:
            self._client.abort(request_id)

    def prefill(self) -> tuple[int, int] | None:
        """(tokens computed, tokens known) of the sequences that prefill right now; None when none does."""
        running = [p for p in self._client.stats.prefills if p.request_id in self.unfinished]
        if not running:
            return None
        return sum(p.num_done for p in running), sum(p.num_total for p in running)

    async def next_events(self, timeout_s: float | None = None) -> list[TokenEvent]:
        """Every event that has arrived, waiting for at least one; empty after ``timeout_s`` of silence.

        Raises the BittrueError that ended a sequence: the other sequences of the request are then aborted.
        """
        if not self._events and self._failure is None:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = None if timeout_s is None else loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        if self._failure is not None:
            raise self._failure
        events = list(self._events)
        self._events.clear()
        for event in events:
            if event.finish_reason is not None:
                self.unfinished.discard(event.request_id)
        return events

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, error: BittrueError) -> None:
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(slots=True)
class _Subscriber:
    """Who hears about one sequence, and when it last did (``time.perf_counter`` seconds)."""

    channel: EventChannel
    opened_s: float
    last_token_s: float | None = None


@dataclass(slots=True)
class _Link:
    """One engine process and the streams to it."""

    process: EngineProcess
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def read(self) -> FromEngine | None:
        """None when the process has gone; a message it did not finish writing is dropped."""
        try:
            header = await self.reader.readexactly(HEADER_BYTES)
            return decode_from_engine(await self.reader.readexactly(body_bytes(header)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def write(self, message: ToEngine) -> None:
        if not self.writer.is_closing():
            self.writer.write(frame(message))

    def close(self) -> None:
        self.writer.close()


@dataclass(slots=True)
class EngineClient:
    """Requests in, events out. ``on_dead`` is called once if the engine process cannot be kept alive."""

    config: RunConfig
    log: Log
    metrics: Metrics
    on_dead: Callable[[EngineDied], None] = lambda error: None
    journal: Journal = field(init=False, default_factory=Journal)
    stats: EngineStats = field(init=False, default_factory=EngineStats)
    _ready: Ready | None = field(init=False, default=None)
    _link: _Link | None = field(init=False, default=None)
    _dead: EngineDied | None = field(init=False, default=None)
    _is_closing: bool = field(init=False, default=False)
    _num_fruitless_restarts: int = field(init=False, default=0)
    _subscribers: dict[str, _Subscriber] = field(init=False, default_factory=dict)
    _pings: dict[int, asyncio.Future[EngineStats]] = field(init=False, default_factory=dict)
    _ping_ids: "itertools.count[int]" = field(init=False, default_factory=itertools.count)
    _prefill_log: PrefillLog = field(init=False)
    _supervision: asyncio.Task[None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._prefill_log = PrefillLog(self.log)

    # ---- what the server calls ----

    async def start(self, process: EngineProcess) -> Ready:
        """Waits until ``process`` has built its engine. Raises the BittrueError in its way."""
        self._ready = await self._adopt(process)
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervision")
        return self._ready

    @property
    def ready(self) -> Ready:
        assert self._ready is not None, "start() first"
        return self._ready

    @property
    def is_up(self) -> bool:
        return self._link is not None

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        return None if self._link is None else self._link.process.pid

    def open(self, requests: Sequence[Request]) -> EventChannel:
        """Submits sequences, all or none. Raises QueueFull, InvalidRequest for more than ever fit,
        EngineDied when there is no engine."""
        if self._dead is not None:
            raise self._dead
        limit = self.config.max_running + self.config.max_queue
        if len(requests) > limit:
            raise InvalidRequest(
                f"the request makes {len(requests)} sequences, but this server takes at most {limit} "
                "(max_running + max_queue) at a time; send fewer prompts or a smaller n",
                param="n",
            )
        if len(self.journal) + len(requests) > limit:
            raise QueueFull(
                f"{len(self.journal)} sequences are unfinished and the limit is {limit} "
                f"(max_running + max_queue); {len(requests)} more do not fit now, retry later"
            )
        channel = EventChannel(self, [request.request_id for request in requests])
        now_s = time.perf_counter()
        for request in requests:
            self.journal.open(request)
            self._subscribers[request.request_id] = _Subscriber(channel, now_s)
            self._send(request)
        self._note_unfinished()
        return channel

    def abort(self, request_id: str) -> None:
        """Ends a sequence nobody listens to any more; unknown ids are ignored."""
        if self.journal.close(request_id):
            self._drop(request_id, "abort")
            self._send(Abort(request_id=request_id))

    def fail_all(self, error: BittrueError) -> None:
        """Ends every unfinished sequence with ``error``."""
        for entry in self.journal:
            self._fail(entry.request.request_id, error)
            self._send(Abort(request_id=entry.request.request_id))

    async def fresh_stats(self) -> EngineStats:
        """Numbers from after all that was submitted so far; the last known ones while the engine is down."""
        if self._link is None:
            return self.stats
        ping_id = next(self._ping_ids)
        self._pings[ping_id] = asyncio.get_running_loop().create_future()
        self._send(Ping(ping_id=ping_id))
        return await self._pings[ping_id]

    async def close(self) -> None:
        """Ends the engine process: asked first, killed after ten seconds."""
        self._is_closing = True
        if self._supervision is None or self._link is None:
            if self._supervision is not None:
                self._supervision.cancel()
            return
        process = self._link.process
        self._send(Shutdown())
        try:
            await asyncio.wait_for(process.wait(), _CLOSE_TIMEOUT_S)
        except TimeoutError:
            self.log.warning("engine_killed", pid=process.pid, reason="did not close in time")
            process.kill()
        await self._supervision

    # ---- one engine process ----

    async def _adopt(self, process: EngineProcess) -> Ready:
        link = _Link(process, *await asyncio.open_connection(sock=process.link, limit=_READ_BUFFER))
        try:
            message = await link.read()
        except asyncio.CancelledError:
            process.kill()
            raise
        if not isinstance(message, Ready):
            code = await process.wait()  # first: at the stream's end it would exit without its last words
            link.close()
            if isinstance(message, Refused):
                raise error_of(message)
            raise EngineDied(
                f"the engine process ended with code {code} before it was ready; see its output above"
            )
        self._link = link
        self.stats = message.stats
        self.log.info(
            "engine_ready",
            pid=process.pid,
            max_context=message.max_context,
            pages=message.stats.pages_total,
            slots=message.stats.slots_total,
            **message.fingerprint,
        )
        ledger = message.memory.ledger
        if ledger:
            self.log.info("memory", **ledger, total=sum(ledger.values()))
        return message

    async def _supervise(self) -> None:
        while self._link is not None:
            link = self._link
            await self._dispatch(link)
            self._link = None
            self.stats = msgspec.structs.replace(self.stats, prefills=())
            self._prefill_log.forget_all()
            link.close()
            code = await link.process.wait()
            self._settle_pings()
            if self._is_closing:
                return
            self.log.error("engine_died", pid=link.process.pid, code=code, unfinished=len(self.journal))
            try:
                await self._restart(link.process)
            except EngineDied as error:
                self._give_up(error)
                return

    async def _restart(self, last: EngineProcess) -> None:
        """A new process that goes on with the journal. EngineDied after too many deaths without a token."""
        self._fail_repeat_offenders()
        while not self._is_closing:
            if self._num_fruitless_restarts >= self.config.max_restarts:
                raise EngineDied(
                    f"the engine process died {self._num_fruitless_restarts + 1} times without a token"
                )
            await asyncio.sleep(_BACKOFF_S[min(self._num_fruitless_restarts, len(_BACKOFF_S) - 1)])
            self._num_fruitless_restarts += 1
            self.metrics.count("bittrue_engine_restarts")
            try:
                ready = await self._adopt(last.again(verified=self.ready.verified))
            except (BittrueError, OSError) as error:  # OSError: no memory or no place for a process
                self.log.error("engine_restart_failed", error=error)
                continue
            if ready.fingerprint != self.ready.fingerprint:
                raise EngineDied(
                    "the restarted engine differs from the one that began the streams (a new checkpoint?); "
                    "start the server again"
                )
            for request in self.journal.resumed():
                self._send(request)
            self.log.info("engine_restarted", resumed=len(self.journal))
            return

    def _fail_repeat_offenders(self) -> None:
        for entry in self.journal:
            entry.num_fruitless_restarts += 1
            if entry.num_fruitless_restarts > _MAX_FRUITLESS_RESTARTS:
                deaths = entry.num_fruitless_restarts
                self._fail(
                    entry.request.request_id,
                    EngineDied(
                        f"the engine process died {deaths} times while it ran this request; it was given up"
                    ),
                )

    def _give_up(self, error: EngineDied) -> None:
        self._dead = error
        if self._link is not None:
            self._link.process.kill()
            self._link = None
        for entry in self.journal:
            self._fail(entry.request.request_id, error)
        self.log.error("engine_given_up", error=error)
        self.on_dead(error)

    # ---- its messages ----

    async def _dispatch(self, link: _Link) -> None:
        """Hands out what the process sends until it has gone."""
        while (message := await link.read()) is not None:
            match message:
                case StepDone():
                    self._take_step(message)
                case Refused(request_id=str() as request_id):
                    self._fail(request_id, error_of(message))
                case Pong():
                    self.stats = message.stats
                    waiting = self._pings.pop(message.ping_id, None)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(message.stats)
                case _:
                    self.log.error("engine_message_unexpected", kind=type(message).__name__)

    def _take_step(self, step: StepDone) -> None:
        self.stats = step.stats
        now_s = time.perf_counter()
        for prefill in step.stats.prefills:
            if prefill.request_id in self._subscribers:
                self._prefill_log.note(prefill.request_id, prefill.num_done, prefill.num_total, now_s)
        for event in step.events:
            self._deliver(event, now_s)

    def _deliver(self, event: TokenEvent, now_s: float) -> None:
        seen = self.journal.record(event)
        if seen is None:
            return
        if seen.finish_reason == "error":
            self.journal.close(seen.request_id)
            error = EngineDied(f"the engine could not finish this sequence: {seen.error}")
            self._drop(seen.request_id, "error").channel.fail(error)
            return
        subscriber = self._subscribers[seen.request_id]
        self._observe(subscriber, seen, now_s)
        if seen.finish_reason is not None:
            self._drop(seen.request_id, seen.finish_reason)
            self.metrics.observe("bittrue_request_seconds", now_s - subscriber.opened_s)
        subscriber.channel.put(seen)

    def _observe(self, subscriber: _Subscriber, event: TokenEvent, now_s: float) -> None:
        num_tokens = len(event.token_ids)
        if num_tokens == 0:
            return
        metrics = self.metrics
        self._prefill_log.end(event.request_id, now_s)
        if subscriber.last_token_s is None:
            metrics.observe("bittrue_time_to_first_token_seconds", now_s - subscriber.opened_s)
            if event.queued_s is not None:
                metrics.observe("bittrue_queue_seconds", event.queued_s)
            metrics.count("bittrue_prompt_tokens", event.num_prompt_tokens)
            metrics.count("bittrue_cached_tokens", event.num_cached_tokens)
        else:
            metrics.observe("bittrue_inter_token_seconds", (now_s - subscriber.last_token_s) / num_tokens)
        metrics.count("bittrue_generated_tokens", num_tokens)
        subscriber.last_token_s = now_s
        self._num_fruitless_restarts = 0

    def _fail(self, request_id: str, error: BittrueError) -> None:
        if self.journal.close(request_id):
            self._drop(request_id, "error").channel.fail(error)

    def _drop(self, request_id: str, finish_reason: str) -> _Subscriber:
        self.metrics.count("bittrue_sequences", finish_reason=finish_reason)
        self._note_unfinished()
        self._prefill_log.forget(request_id)
        return self._subscribers.pop(request_id)

    def _note_unfinished(self) -> None:
        self.metrics.set("bittrue_unfinished_sequences", len(self.journal))

    def _settle_pings(self) -> None:
        for waiting in self._pings.values():
            if not waiting.done():
                waiting.set_result(self.stats)
        self._pings.clear()

    def _send(self, message: ToEngine) -> None:
        """While there is no process nothing is sent: the next one gets the whole journal."""
        if self._link is not None:
            with contextlib.suppress(ConnectionError):
                self._link.write(message)
