"""RemoteEngine: an engine in a process of its own, which may die at any moment."""

import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import msgspec

from bittrue.config.run import RunConfig
from bittrue.engine.launch import DEFAULT_FACTORY
from bittrue.engine.link import Link, ProcessLink
from bittrue.engine.types import Abort, EngineStats, Request, Running, TokenEvent
from bittrue.engine.weight_parts import parts_of
from bittrue.engine.wire import FromEngine, Ready, Refused, Shutdown, StepDone, ToEngine, Updated, error_of
from bittrue.errors import BittrueError, EngineDied
from bittrue.model.weight_update import WeightUpdate
from bittrue.obs.log import Log
from bittrue.rl.token_journal import TokenJournal, Unfinished

_BACKOFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
_CLOSE_TIMEOUT_S = 10.0
_RESTORE_ID = 0  # of the update that gives a new process the weights of the one before


@dataclass(slots=True)
class _Asked:
    """An update the engine has not answered yet."""

    update: WeightUpdate
    running: Running
    update_id: int
    answer: Updated | None = None


class RemoteEngine:
    """Engine's ``add``, ``abort``, ``step``, ``update_weights`` over a link; for one thread.

    A process that dies is followed by another: it is given the last weights whole, and every unfinished
    request with the tokens it has. Noise is a function of (seed, position, token), so tokens and
    log-probabilities go on as they would have, and every event is told once. Only this differs: the record
    of choices is of what the last process computed, and where weights were changed ``in_place`` the rows of
    the older ones are gone, so what follows is sampled over rows of the newest.
    """

    def __init__(self, link: Link, *, max_restarts: int = 5, log: Log | None = None) -> None:
        """Waits until the engine is ready. ``max_restarts``: without a token or an answered update between
        them. Raises what the engine refuses to start with (CheckpointError, ConfigError), EngineDied."""
        self._link, self._max_restarts = link, max_restarts
        self._log = log if log is not None else Log(sys.stderr, "warning")
        self.restarts = 0
        self._num_fruitless = 0
        self._dead: BittrueError | None = None
        self._kept: list[TokenEvent] = []  # events that nobody was told of yet
        self._refused: list[BittrueError] = []
        self._asked: _Asked | None = None
        self._num_updates = 0
        self._weights: WeightUpdate | None = None  # what was published last; None = the checkpoint's
        self._ready: Ready | None = None  # the first process' first word
        self._is_loading = True  # the process has not said Ready yet: it is sent nothing
        self._stats = EngineStats()
        self._journal = TokenJournal("")
        try:
            while self._is_loading:
                self._take_in(None)
        except BaseException:
            link.close()
            raise

    @classmethod
    def start(cls, config: RunConfig, *, factory: str = DEFAULT_FACTORY, log: Log | None = None) -> Self:
        """In a process of this machine."""
        log = log if log is not None else Log(sys.stderr, config.log_level)
        return cls(ProcessLink.start(config, factory=factory), max_restarts=config.max_restarts, log=log)

    # ---- what an engine does -----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Gives the engine a request. Raises InvalidRequest for an id in use; what the engine itself refuses
        (InvalidRequest, PromptTooLong, QueueFull) is raised by a later ``step`` or ``poll``."""
        self._check_alive()
        self._journal.open(request)
        self._send(request)

    def abort(self, request_id: str) -> None:
        """Ends a sequence; its last event says ``abort``. Unknown ids are ignored."""
        if self._journal.abort(request_id):
            self._send(Abort(request_id=request_id))

    def has_work(self) -> bool:
        return bool(self._kept or self._refused or len(self._journal))

    def step(self) -> list[TokenEvent]:
        """The events that have come, waiting for a message where there is none but work; a message may bring
        no events. Raises the error of a refused request, EngineDied."""
        if not self._kept and not self._refused and len(self._journal):
            self._take_in(None)
        return self._told()

    def poll(self) -> list[TokenEvent]:
        """The events that have come, without waiting: also while another process loads. Raises as ``step``
        does."""
        self._take_in(0.0)
        return self._told()

    def update_weights(self, update: WeightUpdate, *, running: Running = "retract") -> bool:
        """Makes ``update`` the weights between two steps, and waits for it; events that come before are kept
        for the next ``step``. False where they are these already. Raises PublicationRefused, nothing
        changed."""
        self.begin_update(update, running=running)
        return self.finish_update()

    def begin_update(self, update: WeightUpdate, *, running: Running = "retract") -> None:
        """Sends an update; ``finish_update`` waits for the answer. Raises PublicationRefused for a delta that
        came without its whole: no other process could go on from it."""
        assert self._asked is None, "the update before was not finished"
        self._check_alive()
        update.full()
        if update.version != self._journal.version:
            self._num_updates += 1
            self._asked = _Asked(update, running, self._num_updates)
            self._send_update(self._asked)

    def finish_update(self) -> bool:
        """Whether the update that was begun changed anything."""
        asked = self._asked
        if asked is None:
            return False
        try:
            while asked.answer is None:
                self._take_in(None)
        finally:
            self._asked = None
        if asked.answer.refusal is not None:
            raise error_of(asked.answer.refusal)
        return asked.answer.is_changed

    def stats(self) -> EngineStats:
        """The numbers that came last; those of another process begin again at 0. ``weight_version``: of the
        tokens that come next."""
        return msgspec.structs.replace(self._stats, weight_version=self._journal.version)

    def close(self) -> None:
        """Ends the process: asked first, killed after ten seconds. Safe to repeat."""
        if self._dead is None:
            self._dead = EngineDied("the engine was closed; start another")
            if not self._is_loading:
                self._shut_down()
        self._link.close()

    def _shut_down(self) -> None:
        self._link.send(Shutdown())
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        while not self._link.is_dead and time.monotonic() < deadline_s:
            self._link.receive(max(0.0, deadline_s - time.monotonic()))
        if not self._link.is_dead:
            self._log.warning("engine_killed", pid=self._link.pid, reason="did not close in time")

    # ---- what a process of its own adds ------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return self._link.pid

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the engine as it started."""
        assert self._ready is not None
        return self._ready.fingerprint

    def fileno(self) -> int:
        """Ready to be read when a message has come (``select``)."""
        return self._link.fileno()

    def unfinished(self) -> list[Unfinished]:
        """The journal: what has come of every unfinished request, told or kept. Also of a dead engine."""
        return list(self._journal)

    # ---- messages ----------------------------------------------------------------------------------------

    def _told(self) -> list[TokenEvent]:
        events, self._kept = self._kept, []
        if not events and self._refused:
            raise self._refused.pop(0)
        return events

    def _take_in(self, timeout_s: float | None) -> None:
        """Handles what comes; an engine found dead is started again."""
        self._check_alive()
        for message in self._link.receive(timeout_s):
            self._handle(message)
        if self._link.is_dead:
            self._log.error("engine_died", pid=self._link.pid, unfinished=len(self._journal))
            self._begin_again()

    def _handle(self, message: FromEngine) -> None:
        match message:
            case StepDone():
                self._stats = message.stats
                for event in message.events:
                    self._record(event)
            case Updated():
                self._stats = message.stats
                self._take_answer(message)
            case Refused(request_id=str() as request_id):
                self._journal.close(request_id)
                self._refused.append(error_of(message))
            case Ready():
                self._adopt(message)
            case Refused():
                self._log.error("engine_refused", error=message.message)
                if self._ready is None:
                    raise error_of(message)
            case _:
                self._log.error("engine_message_unexpected", kind=type(message).__name__)

    def _record(self, event: TokenEvent) -> None:
        told = self._journal.record(event)
        if told is not None:
            self._kept.append(told)
        if event.token_ids:
            self._num_fruitless = 0

    def _take_answer(self, message: Updated) -> None:
        if message.update_id == _RESTORE_ID and message.refusal is not None:
            text = error_of(message.refusal)
            self._give_up(EngineDied(f"the restarted engine refuses the weights it had: {text}"))
        asked = self._asked
        if asked is None or message.update_id != asked.update_id:
            return
        asked.answer = message
        self._num_fruitless = 0
        if message.refusal is None:
            self._weights = asked.update.full()
            self._journal.note_update(asked.update.version, asked.running)

    def _send_update(self, asked: _Asked) -> None:
        for part in parts_of(asked.update, update_id=asked.update_id, running=asked.running):
            self._send(part)

    def _send(self, message: ToEngine) -> None:
        """What is not sent now is known here: a process gets all of it when it is ready."""
        if not self._is_loading:
            self._link.send(message)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead

    # ---- processes ---------------------------------------------------------------------------------------

    def _adopt(self, ready: Ready) -> None:
        """A process has loaded: it goes on with the journal."""
        first = self._ready
        if first is not None and ready.fingerprint != first.fingerprint:
            fact = "the restarted engine differs from the one that began (a new checkpoint?)"
            self._give_up(EngineDied(f"{fact}; begin again"))
        self._is_loading, self._stats = False, ready.stats
        self._log.info("engine_ready", pid=self._link.pid, **ready.fingerprint)
        if first is None:
            self._ready = ready
            self._journal = TokenJournal(ready.stats.weight_version)
            return
        self._give_back()
        self._log.warning("engine_restarted", restarts=self.restarts, unfinished=len(self._journal))

    def _begin_again(self) -> None:
        """Starts another process. EngineDied after too many that brought nothing."""
        self._is_loading = True
        while True:
            if self._num_fruitless >= self._max_restarts:
                self._give_up(
                    EngineDied(
                        f"the engine process died without a token, {self._num_fruitless + 1} in a row "
                        "(max_restarts), and is not started again; its output says why"
                    )
                )
            time.sleep(_BACKOFF_S[min(self._num_fruitless, len(_BACKOFF_S) - 1)])
            self._num_fruitless += 1
            self.restarts += 1
            try:
                self._link.restart("" if self._ready is None else self._ready.verified)
                return
            except (BittrueError, OSError) as error:  # OSError: no memory or no place for a process
                self._log.error("engine_restart_failed", error=error)

    def _give_back(self) -> None:
        """Weights, requests, and what was asked and not answered: in the order the process before had it."""
        if self._weights is not None:
            self._send_update(_Asked(self._weights, "retract", _RESTORE_ID))
        for message in self._journal.give_back():
            self._send(message)
        if self._asked is not None and self._asked.answer is None:
            self._send_update(self._asked)

    def _give_up(self, error: EngineDied) -> NoReturn:
        self._dead = error
        self._link.close()
        self._log.error("engine_given_up", error=error)
        raise error
