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
from bittrue.engine.journal_records import Origin
from bittrue.engine.launch import EngineProcess
from bittrue.engine.probation import Probation
from bittrue.engine.types import Abort, EngineStats, Request, TokenEvent
from bittrue.engine.wire import (
    HEADER_BYTES,
    Flush,
    Flushed,
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
from bittrue.errors import (
    BittrueError,
    EngineDied,
    InvalidRequest,
    NotFlushed,
    PoisonRequest,
    QueueFull,
    RequestFailed,
)
from bittrue.obs.log import Log
from bittrue.obs.metrics import Metrics
from bittrue.obs.prefill import PrefillLog

_BACKOFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
_READ_BUFFER = 1 << 20  # bytes; a step's frame should never wait for the stream to resume
_CLOSE_TIMEOUT_S = 10.0
_HOUSE_S = 2.0  # how often what has expired is let go


class EventChannel:
    """The events of the sequences of one HTTP request, in order of arrival.

    Leaving the ``with`` block aborts the sequences that have not finished.
    """

    __slots__ = ("_client", "_events", "_failure", "_has_restarted", "_waiter", "is_open", "unfinished")

    def __init__(self, client: "EngineClient", request_ids: Sequence[str]) -> None:
        self._client = client
        self._events: deque[TokenEvent] = deque()
        self._failure: BittrueError | None = None
        self._has_restarted = False
        self._waiter: asyncio.Future[None] | None = None
        self.unfinished = set(request_ids)
        self.is_open = False  # whoever reads can tell of a restart before the next event

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
        """Every event that has arrived, waiting for at least one; empty after ``timeout_s`` of silence, and
        after a restart of the engine where the channel is open.

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

    def note_restart(self) -> None:
        self._has_restarted = True
        if self.is_open:
            self._wake()

    def take_restart(self) -> bool:
        """Whether the engine was restarted since the last time."""
        has_restarted, self._has_restarted = self._has_restarted, False
        return has_restarted

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
    journal: Journal = field(init=False)
    stats: EngineStats = field(init=False, default_factory=EngineStats)
    _ready: Ready | None = field(init=False, default=None)
    _link: _Link | None = field(init=False, default=None)
    _dead: EngineDied | None = field(init=False, default=None)
    _is_closing: bool = field(init=False, default=False)
    _num_fruitless_restarts: int = field(init=False, default=0)
    _num_poisons: int = field(init=False, default=0)  # given up since the last token
    _probation: Probation = field(init=False, default_factory=Probation)
    _subscribers: dict[str, _Subscriber] = field(init=False, default_factory=dict)
    _pings: dict[int, asyncio.Future[EngineStats]] = field(init=False, default_factory=dict)
    _leaving: dict[int, str] = field(init=False, default_factory=dict)  # ping id -> aborted before it
    _flushes: dict[int, asyncio.Future[Flushed]] = field(init=False, default_factory=dict)
    _ids: "itertools.count[int]" = field(init=False, default_factory=itertools.count)  # of pings, flushes
    _prefill_log: PrefillLog = field(init=False)
    _supervision: asyncio.Task[None] | None = field(init=False, default=None)
    _housekeeping: asyncio.Task[None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Raises ConfigError for a journal_dir that cannot be used."""
        self.journal = Journal(
            directory=self.config.journal_dir,
            keep_s=self.config.keep_responses_s,
            log=self.log,
            metrics=self.metrics,
        )
        self._prefill_log = PrefillLog(self.log)

    # ---- what the server calls ----

    async def start(self, process: EngineProcess) -> Ready:
        """Waits until ``process`` has built its engine. Raises the BittrueError in its way."""
        self._ready = await self._adopt(process)
        self._give(self._probation.started())
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervision")
        self._housekeeping = asyncio.create_task(self._keep_house(), name="journal housekeeping")
        return self._ready

    @property
    def ready(self) -> Ready:
        assert self._ready is not None, "start() first"
        return self._ready

    @property
    def is_up(self) -> bool:
        return self._link is not None

    @property
    def dead(self) -> EngineDied | None:
        """Why there will be no engine any more; None while there is one or will be."""
        return self._dead

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        return None if self._link is None else self._link.process.pid

    def open(self, requests: Sequence[Request], origin: Origin | None = None) -> EventChannel:
        """Submits the sequences of one response, all or none. Raises QueueFull, InvalidRequest for more than
        ever fit, EngineDied when there is no engine."""
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
        self.journal.open(requests, origin)
        for request in requests:
            self._subscribers[request.request_id] = _Subscriber(channel, now_s)
            self._give(self._probation.submit(request.request_id))
        self._note_unfinished()
        return channel

    def abort(self, request_id: str) -> None:
        """Ends a sequence nobody listens to any more; unknown ids are ignored."""
        if self.journal.close(request_id):
            self._drop(request_id, "abort")
            self._take_back(request_id)

    def fail_all(self, error: BittrueError) -> None:
        """Ends every unfinished sequence with ``error``."""
        for entry in self.journal:
            request_id = entry.request.request_id
            if self.journal.close(request_id):
                self._drop(request_id, "error").channel.fail(error)
                self._take_back(request_id)

    async def fresh_stats(self) -> EngineStats:
        """Numbers from after all that was submitted so far; the last known ones while the engine is down."""
        if self._link is None:
            return self.stats
        ping_id = next(self._ids)
        self._pings[ping_id] = asyncio.get_running_loop().create_future()
        self._send(Ping(ping_id=ping_id))
        return await self._pings[ping_id]

    async def flush(self) -> Flushed:
        """Drops every cached prefix on all tiers. Raises NotFlushed when something stayed, EngineDied when
        there is no engine to say so."""
        if self._link is None:
            raise self._dead or EngineDied("the engine process is being restarted; flush again once it is up")
        flush_id = next(self._ids)
        waiting = self._flushes[flush_id] = asyncio.get_running_loop().create_future()
        self._send(Flush(flush_id=flush_id))
        flushed: Flushed = await waiting
        if flushed.error is not None:
            raise NotFlushed(flushed.error)
        return flushed

    async def close(self) -> None:
        """Ends the engine process: asked first, killed after ten seconds."""
        self._is_closing = True
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        try:
            await self._end_process()
        finally:
            self.journal.shut()

    async def _end_process(self) -> None:
        if self._supervision is None or self._link is None:
            if self._supervision is not None:  # between two processes, or behind the last
                self._supervision.cancel()
                await asyncio.gather(self._supervision, return_exceptions=True)
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
            link.close()
            await process.wait()
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
        self.metrics.update_engine(self.stats)  # the last of the one before
        self.metrics.engine_changed()
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
            self._probation.cut()
            self.stats = msgspec.structs.replace(self.stats, prefills=())
            self._prefill_log.forget_all()
            link.close()
            code = await link.process.wait()
            self._settle_calls()
            if self._is_closing:
                return
            self.log.error("engine_died", pid=link.process.pid, code=code, unfinished=len(self.journal))
            self._blame(code)
            try:
                await self._restart(link.process)
            except EngineDied as error:
                self._give_up(error)
                return

    async def _restart(self, last: EngineProcess) -> None:
        """A new process that goes on with the journal. EngineDied after too many deaths without a token."""
        while not self._is_closing:
            if self._num_fruitless_restarts >= self.config.max_restarts:
                raise EngineDied(
                    f"the engine process died without a token, {self._num_fruitless_restarts + 1} in a row "
                    "(--max-restarts), and is not started again; its output says why"
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
            self._give(self._probation.started())
            for channel in {id(s.channel): s.channel for s in self._subscribers.values()}.values():
                channel.note_restart()
            self.log.info("engine_restarted", unfinished=len(self.journal))
            return

    def _blame(self, exit_code: int) -> None:
        """Ends the request the engine died of, if that is known now."""
        is_last = self._num_fruitless_restarts >= self.config.max_restarts
        request_id = self._probation.died(exit_code, is_last=is_last)
        if request_id is None:
            return
        self.log.error("request_given_up", id=request_id, code=exit_code)
        self.metrics.count("bittrue_poison_requests")
        self._fail(
            request_id,
            PoisonRequest(
                f"the engine process died each time it ran this request, the last time of nothing else "
                f"(exit code {exit_code}); it was given up, do not send it again"
            ),
        )
        self._num_poisons += 1
        # An engine that dies of everything looks the same: then the restarts count.
        if self._num_poisons <= self.config.max_restarts:
            self._num_fruitless_restarts = 0

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
                    self._answer_ping(message)
                case Flushed():
                    flushing = self._flushes.pop(message.flush_id, None)
                    if flushing is not None and not flushing.done():
                        flushing.set_result(message)
                case _:
                    self.log.error("engine_message_unexpected", kind=type(message).__name__)

    def _answer_ping(self, pong: Pong) -> None:
        left = self._leaving.pop(pong.ping_id, None)
        if left is not None:
            self._probation.left(left)
        waiting = self._pings.pop(pong.ping_id, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(pong.stats)

    def _take_step(self, step: StepDone) -> None:
        self.stats = step.stats
        now_s = time.perf_counter()
        for prefill in step.stats.prefills:
            if prefill.request_id in self._subscribers:
                self._prefill_log.note(prefill.request_id, prefill.num_done, prefill.num_total, now_s)
        for event in step.events:
            self._deliver(event, now_s)
        # Those who wait for the events run after this: what they tell a client is written before.
        self.journal.flush()

    def _deliver(self, event: TokenEvent, now_s: float) -> None:
        seen = self.journal.record(event)
        if seen is None:
            return
        if seen.finish_reason == "error":
            error = RequestFailed(f"the engine could not finish this sequence: {seen.error}")
            self._drop(seen.request_id, "error").channel.fail(error)
            self._give(self._probation.ended(seen.request_id))
            return
        subscriber = self._subscribers[seen.request_id]
        self._observe(subscriber, seen, now_s)
        if seen.finish_reason is not None:
            self._drop(seen.request_id, seen.finish_reason)
            self.metrics.observe("bittrue_request_seconds", now_s - subscriber.opened_s)
            self._give(self._probation.ended(seen.request_id))
        elif seen.token_ids:
            self._give(self._probation.lives(seen.request_id))
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
        self._num_fruitless_restarts = self._num_poisons = 0

    def _fail(self, request_id: str, error: BittrueError) -> None:
        """The engine has let go of it, or died of it."""
        if self.journal.close(request_id):
            self._drop(request_id, "error").channel.fail(error)
            self._give(self._probation.ended(request_id))

    def _drop(self, request_id: str, finish_reason: str) -> _Subscriber:
        self.metrics.count("bittrue_sequences", finish_reason=finish_reason)
        self._note_unfinished()
        self._prefill_log.forget(request_id)
        return self._subscribers.pop(request_id)

    def _note_unfinished(self) -> None:
        self.metrics.set("bittrue_unfinished_sequences", len(self.journal))

    def _settle_calls(self) -> None:
        """The process has gone: nobody else will answer."""
        for waiting in self._pings.values():
            if not waiting.done():
                waiting.set_result(self.stats)
        for flushing in self._flushes.values():
            if not flushing.done():
                message = "the engine process ended before it had flushed; flush again once it is up"
                flushing.set_exception(EngineDied(message))
        self._pings.clear()
        self._flushes.clear()
        self._leaving.clear()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSE_S)
            self.journal.keep_house()

    def _give(self, request_ids: Sequence[str]) -> None:
        """Hands sequences to the engine, with what they have so far."""
        for request_id in request_ids:
            self._send(self.journal[request_id].resumed())

    def _take_back(self, request_id: str) -> None:
        """Ends a sequence in the engine; until the pong it may still run there."""
        self._give(self._probation.aborted(request_id))
        if self._link is not None:
            ping_id = next(self._ids)
            self._leaving[ping_id] = request_id
            self._send(Abort(request_id=request_id))
            self._send(Ping(ping_id=ping_id))

    def _send(self, message: ToEngine) -> None:
        """While there is no process nothing is sent."""
        if self._link is not None:
            with contextlib.suppress(ConnectionError):
                self._link.write(message)
