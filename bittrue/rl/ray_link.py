"""Engines and verifiers in Ray actors: on the machines of a cluster, started again when they die."""

import importlib
import os
import queue
import select
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from bittrue.config.run import RunConfig
from bittrue.engine.launch import DEFAULT_FACTORY
from bittrue.engine.process import serve
from bittrue.engine.wire import (
    HEADER_BYTES,
    FromEngine,
    Hello,
    Refused,
    ToEngine,
    UpdatePart,
    decode_from_engine,
    decode_to_engine,
    error_of,
    frame,
    refusal,
)
from bittrue.errors import BittrueError, ConfigError, VerifierUnavailable
from bittrue.obs.log import Log
from bittrue.rl.verifiers.health import Health
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.sandbox import Isolation
from bittrue.rl.verifiers.verifier import Answers, Verdict, Verifier

# Calls of one group run one after the other in the order they were made; the groups beside each other.
_IN, _OUT = "in", "out"
_GROUPS = {_IN: 1, _OUT: 1}
_Found = TypeVar("_Found")


class RayLink:
    """A Link to an engine in a Ray actor. Ray is what the caller initialised it to, else one machine.

    ``options``: of the actor, as ``ray.remote`` takes them (num_cpus, resources, scheduling_strategy); the
    checkpoint's directory must be there on every machine where it may run.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        factory: str = DEFAULT_FACTORY,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Returns at once. Raises ConfigError without ray."""
        self._ray, self._config, self._factory = import_ray(), config, factory
        self._host = self._ray.remote(
            **{"num_cpus": 1, **(options or {}), "max_restarts": 0, "concurrency_groups": _GROUPS}
        )(_EngineHost)
        self._bell = _Bell()
        self._pid: int | None = None
        self.is_dead = False
        self._begin("")

    @property
    def pid(self) -> int | None:
        if self._pid is None and not self.is_dead:
            try:
                self._pid = int(self._ray.get(self._call("pid", _IN)))
            except self._ray.exceptions.RayActorError:
                return None
        return self._pid

    def fileno(self) -> int:
        return self._bell.fileno()

    def send(self, message: ToEngine) -> None:
        sent = self._call("take", _IN, frame(message)[HEADER_BYTES:])
        if isinstance(message, UpdatePart):  # one part of the weights at a time lies in the object store
            self._ray.wait([sent])

    def receive(self, timeout_s: float | None) -> list[FromEngine]:
        if self.is_dead or not self._bell.wait(timeout_s):
            return []
        self._bell.clear()
        try:
            bodies, is_over = self._ray.get(self._asked)
        except self._ray.exceptions.RayActorError:
            bodies, is_over = [], True
        if is_over:
            self.is_dead = True
            self._bell.ring()  # `receive` would not wait
        else:
            self._ask()
        return [decode_from_engine(body) for body in bodies]

    def restart(self, verified: str) -> None:
        self._end()
        self._begin(verified)

    def close(self) -> None:
        self._end()
        self._bell.close()
        self.is_dead = True

    def _begin(self, verified: str) -> None:
        hello = Hello(factory=self._factory, run_config=self._config.model_dump_json(), verified=verified)
        self._actor = self._host.remote(frame(hello)[HEADER_BYTES:])
        self._pid, self.is_dead = None, False
        self._ask()

    def _end(self) -> None:
        self._bell.detach()
        if self._ray.is_initialized():
            self._ray.kill(self._actor, no_restart=True)

    def _ask(self) -> None:
        """For what comes next; the bell rings when it is here, or when the actor has died."""
        self._asked = self._call("tell", _OUT)
        self._bell.attach(self._asked.future())

    def _call(self, method: str, group: str, *arguments: Any) -> Any:
        return getattr(self._actor, method).options(concurrency_group=group).remote(*arguments)


class _Bell:
    """A file descriptor that is ready while what was awaited last has come."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # futures end in threads of Ray's
        self._awaited: object = None
        self._is_closed = False

    def fileno(self) -> int:
        return self._fd

    def attach(self, awaited: "Future[Any]") -> None:
        with self._lock:
            self._awaited = awaited
        awaited.add_done_callback(self._ring_for)

    def detach(self) -> None:
        """What was awaited does not matter any more."""
        with self._lock:
            self._awaited = None
        self.clear()

    def ring(self) -> None:
        with self._lock:
            if not self._is_closed:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with self._lock:
            if not self._is_closed and _is_readable(self._fd, 0.0):
                os.eventfd_read(self._fd)

    def wait(self, timeout_s: float | None) -> bool:
        return _is_readable(self._fd, timeout_s)

    def close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._fd)

    def _ring_for(self, awaited: object) -> None:
        with self._lock:
            if awaited is self._awaited and not self._is_closed:
                os.eventfd_write(self._fd, 1)


class _EngineHost:
    """The actor: an engine in a thread of it, with the loop of the engine process."""

    def __init__(self, hello: bytes) -> None:
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._inbox.put(decode_to_engine(hello))
        threading.Thread(target=self._serve, name="engine", daemon=True).start()

    def pid(self) -> int:
        return os.getpid()

    def take(self, body: bytes) -> None:
        self._inbox.put(decode_to_engine(body))

    def tell(self) -> tuple[list[bytes], bool]:
        """The messages that have come, waiting for one; and whether they were the last."""
        messages = [self._outbox.get()]
        while not self._outbox.empty():
            messages.append(self._outbox.get())
        is_over = messages[-1] is None
        return [frame(message)[HEADER_BYTES:] for message in messages if message is not None], is_over

    def _serve(self) -> None:
        try:
            serve(self._inbox, self._outbox.put)
        finally:
            self._outbox.put(None)


class RayPool:
    """The verifiers' Pool in a Ray actor. One that dies is started again and asked again: a verdict is what
    the same check would find once more."""

    def __init__(
        self,
        make: Callable[[], Pool] = Pool,
        *,
        options: Mapping[str, Any] | None = None,
        max_restarts: int = 5,
        log: Log | None = None,
    ) -> None:
        """``make`` builds the pool in the actor (``functools.partial(Pool, num_workers=8)``); ``options`` as
        RayLink's. ``max_restarts``: without a verdict in between. Raises what the pool refuses to start with
        (ConfigError, VerifierUnavailable)."""
        self._ray = import_ray()
        self._make, self._max_restarts = make, max_restarts
        self._log = log if log is not None else Log(sys.stderr, "warning")
        self._host = self._ray.remote(**{"num_cpus": 1, **(options or {}), "max_restarts": 0})(_PoolHost)
        self.restarts = 0
        self.limits: Limits
        self.isolation: Isolation
        self._actor = self._host.remote(make)
        self.limits, self.isolation = self._ask("begin")

    @property
    def pid(self) -> int:
        """Of the actor."""
        return int(self._ask("pid"))

    def judge(self, verifier: Verifier, answers: Answers) -> Verdict:
        return self.judge_all([(verifier, answers)])[0]

    def judge_all(
        self, jobs: Sequence[tuple[Verifier, Answers]], *, is_counted: bool = True
    ) -> list[Verdict]:
        """The verdicts on many answers, in their order. Raises what Pool raises; VerifierUnavailable where
        the actor dies again and again."""
        verdicts: list[Verdict] = self._ask("judge_all", list(jobs), is_counted)
        return verdicts

    def health(self) -> Health:
        """Of the pool since it was last started."""
        health: Health = self._ask("health")
        return health

    def close(self) -> None:
        """Ends the actor and its workers. Safe to repeat."""
        if self._ray.is_initialized():
            self._ray.kill(self._actor, no_restart=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        for _ in range(self._max_restarts + 1):
            try:
                found = self._ray.get(getattr(self._actor, method).remote(*arguments))
            except self._ray.exceptions.RayActorError as error:
                self._log.error("pool_died", error=error)
                self.restarts += 1
                self._ray.kill(self._actor, no_restart=True)
                self._actor = self._host.remote(self._make)
                continue
            if isinstance(found, Refused):
                raise error_of(found)
            return found
        raise VerifierUnavailable(
            f"the actor of the verifiers died {self._max_restarts + 1} times in a row (max_restarts); "
            "the output of its worker says why"
        )


class _PoolHost:
    """The actor: a pool, built by the first call. Errors made on purpose are answers: Ray would wrap them."""

    def __init__(self, make: Callable[[], Pool]) -> None:
        self._make = make
        self._pool: Pool | None = None

    def pid(self) -> int:
        return os.getpid()

    def begin(self) -> tuple[Limits, Isolation] | Refused:
        return self._answered(lambda pool: (pool.limits, pool.isolation))

    def judge_all(
        self, jobs: Sequence[tuple[Verifier, Answers]], is_counted: bool
    ) -> list[Verdict] | Refused:
        return self._answered(lambda pool: pool.judge_all(jobs, is_counted=is_counted))

    def health(self) -> Health | Refused:
        return self._answered(lambda pool: pool.health())

    def _answered(self, ask: Callable[[Pool], _Found]) -> _Found | Refused:
        try:
            if self._pool is None:
                self._pool = self._make()
            return ask(self._pool)
        except BittrueError as error:
            return refusal(None, error)


def import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"ray is not installed ({error}); pip install bittrue[ray]") from error


def _is_readable(fd: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
