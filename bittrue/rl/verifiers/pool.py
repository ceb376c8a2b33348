"""A pool of workers that judges answers, several at a time, and keeps what it found."""

import hashlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self

from bittrue.errors import ConfigError, VerifierUnavailable
from bittrue.rl.verifiers.frames import Job, Sent, frame
from bittrue.rl.verifiers.health import Health, HealthRecord
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.sandbox import Isolation, IsolationKind, find_isolation
from bittrue.rl.verifiers.verifier import (
    Answers,
    Place,
    Verdict,
    Verifier,
    crashed,
    num_characters,
    unparsable,
)
from bittrue.rl.verifiers.worker_process import Setting, WorkerKilled, WorkerProcess

# What another run of the same check would find again. A timeout or a crash may be the machine's.
_KEPT = ("right", "wrong", "unparsable")
_STARTS = 5  # of a worker, where each before was killed: not by an answer, it had none to judge
_CHANCES = 3  # of an answer whose check was killed: it may be what killed it


@dataclass(slots=True)
class _Slot:
    """The workers that one thread at a time uses: one for each setting, started when it is first needed."""

    workers: dict[Setting, WorkerProcess] = field(default_factory=dict)


class Judging(Protocol):
    """A pool, wherever its workers are."""

    @property
    def limits(self) -> Limits: ...
    @property
    def isolation(self) -> Isolation: ...
    def judge_all(
        self, jobs: Sequence[tuple[Verifier, Answers]], *, is_counted: bool = True
    ) -> list[Verdict]: ...
    def health(self) -> Health: ...
    def close(self) -> None: ...


class Pool:
    """Judges answers, ``num_workers`` at a time.

    Every check ends in one of the five outcomes within the limits, whatever the answer does; raising is for
    what no answer can cause: VerifierUnavailable (a library or the sandbox is missing, a reference cannot be
    read), ConfigError (the pool's own settings). Verdicts are kept by digest of verifier, problem and answer,
    the latest ``cache_entries``; timeouts and crashes are not. A check that something else on this machine
    kills is made again, twice at most. ``python_path``: folders of the user's own
    modules, for reward functions. ``require_sandbox`` refuses to start where only limits could be set.
    """

    def __init__(
        self,
        *,
        num_workers: int = 2,
        limits: Limits | None = None,
        require_sandbox: bool = False,
        isolation: IsolationKind | None = None,
        python_path: Sequence[str] = (),
        cache_entries: int = 65536,
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"{num_workers} workers judge nothing; choose at least 1", field="num_workers")
        self.isolation: Isolation = find_isolation(choose=isolation, require_sandbox=require_sandbox)
        self.limits = limits or Limits()
        self._python_path = tuple(python_path)
        self._record = HealthRecord()
        self._slots: queue.LifoQueue[_Slot] = queue.LifoQueue()  # the last used has the most workers started
        for _ in range(num_workers):
            self._slots.put(_Slot())
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="verifier")
        self._cache: OrderedDict[bytes, Verdict] = OrderedDict()
        self._cache_entries = cache_entries
        self._cache_lock = threading.Lock()

    def judge(self, verifier: Verifier, answers: Answers, *, seconds: float | None = None) -> Verdict:
        """The verdict on one answer, in ``seconds`` instead of the pool's limit."""
        return self.submit(verifier, answers, seconds=seconds).result()

    def judge_all(
        self, jobs: Sequence[tuple[Verifier, Answers]], *, is_counted: bool = True
    ) -> list[Verdict]:
        """The verdicts on many answers, in their order."""
        futures = [self.submit(verifier, answers, is_counted=is_counted) for verifier, answers in jobs]
        return [future.result() for future in futures]

    def submit(
        self,
        verifier: Verifier,
        answers: Answers,
        *,
        seconds: float | None = None,
        is_counted: bool = True,
    ) -> Future[Verdict]:
        """Begins to judge; many at once keep every worker busy. ``is_counted``: in the pool's health."""
        limits = self.limits if seconds is None else replace(self.limits, seconds=seconds)
        judge = self._judge if is_counted else self._judge_new_or_kept
        return self._threads.submit(judge, verifier, answers, limits)

    def health(self) -> Health:
        return self._record.read()

    def close(self) -> None:
        """Lets what was submitted end, then ends the workers. Safe to repeat."""
        self._threads.shutdown(wait=True)
        while not self._slots.empty():
            for worker in self._slots.get().workers.values():
                worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _judge(self, verifier: Verifier, answers: Answers, limits: Limits) -> Verdict:
        begin = time.monotonic()
        verdict = self._judge_new_or_kept(verifier, answers, limits)
        verdict = replace(verdict, seconds=time.monotonic() - begin)
        self._record.add(verifier.kind, verdict)
        return verdict

    def _judge_new_or_kept(self, verifier: Verifier, answers: Answers, limits: Limits) -> Verdict:
        if num_characters(answers) > limits.answer_characters:
            return unparsable(f"longer than {limits.answer_characters} characters")
        if verifier.room == "here":
            return verifier.judge(answers, Place(self.isolation.kind, limits, ""))
        assert isinstance(verifier, Sent), f"{verifier.kind} is not among the verifiers that workers know"
        try:
            body = frame(Job(verifier, answers, limits))
        except UnicodeEncodeError:
            return unparsable("half of a character")
        digest = hashlib.blake2b(body, digest_size=32).digest()
        kept = self._kept(digest)
        if kept is not None:
            return replace(kept, is_cached=True)
        verdict = self._judge_in_worker(verifier, body, limits)
        if verdict.outcome in _KEPT:
            self._keep(digest, verdict)
        return verdict

    def _judge_in_worker(self, verifier: Verifier, body: bytes, limits: Limits) -> Verdict:
        """The verdict, also where a worker is killed by something else on this machine."""
        setting = Setting(verifier.room, verifier.visible)
        starts, chances = _STARTS, _CHANCES
        while True:
            try:
                return self._judge_once(setting, body, limits)
            except WorkerKilled as error:
                if error.was_judging:
                    chances -= 1
                else:
                    starts -= 1
                if chances == 0:
                    return crashed(f"{error}, each of {_CHANCES} times")
                if starts == 0:
                    raise VerifierUnavailable(
                        f"{error}, each of {_STARTS} times; look for what kills processes here, as too "
                        "little memory"
                    ) from error

    def _judge_once(self, setting: Setting, body: bytes, limits: Limits) -> Verdict:
        slot = self._slots.get()
        try:
            worker = slot.workers.get(setting)
            if worker is None or worker.is_over:
                slot.workers[setting] = WorkerProcess(
                    setting, self.isolation.kind, self.limits, self._python_path
                )
                self._record.worker_started(is_restart=worker is not None)
            return slot.workers[setting].judge(body, limits)
        finally:
            self._slots.put(slot)

    def _kept(self, digest: bytes) -> Verdict | None:
        with self._cache_lock:
            if digest in self._cache:
                self._cache.move_to_end(digest)
            return self._cache.get(digest)

    def _keep(self, digest: bytes, verdict: Verdict) -> None:
        with self._cache_lock:
            self._cache[digest] = verdict
            while len(self._cache) > self._cache_entries:
                self._cache.popitem(last=False)
