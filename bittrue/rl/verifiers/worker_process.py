"""One worker as its pool sees it: started, asked, and killed with everything it began."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers.frames import (
    FromWorker,
    Judged,
    Late,
    Started,
    Unavailable,
    read_frame,
    write_frame,
)
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.sandbox import IsolationKind, Killed, end, killed_by, start
from bittrue.rl.verifiers.verifier import Room, Verdict, crashed, timed_out

_MAX_REPLY = 1 << 17  # bytes
_MAX_LOG = 2000  # characters of what a worker said before it died
_KILL_ROUNDS = 20
_DYING_SECONDS = 2.0  # for a worker whose pipe is closed to be found dead


class WorkerKilled(Killed):
    """A worker, or what it began, was killed by a signal that nobody here sent. ``was_judging``: this
    answer, which may have sent it."""

    def __init__(self, message: str, *, was_judging: bool) -> None:
        super().__init__(message)
        self.was_judging = was_judging


@dataclass(frozen=True, slots=True)
class Setting:
    """What a worker needs to be right for a job: its room and the paths it sees."""

    room: Room
    visible: tuple[str, ...]


class WorkerProcess:
    """A started worker. ``judge`` from one thread at a time; once ``is_over`` it judges no more."""

    def __init__(
        self, setting: Setting, isolation: IsolationKind, limits: Limits, python_path: Sequence[str]
    ) -> None:
        # The keeper runs this package's own code alone, and starts a sandbox for each program.
        own: IsolationKind = "limits" if setting.room == "keeper" else isolation
        self._own = own
        self._directory = tempfile.mkdtemp(prefix="bittrue-verifier-") if own == "limits" else None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.is_over = False
        self._said = ""  # on its standard error, once it is over
        directory = self._directory or "/tmp"
        module = "bittrue.rl.verifiers.worker"
        try:
            self._process = start(
                [sys.executable, "-P", "-s", "-B", "-m", module, isolation, directory],
                own,
                limits,
                directory=self._directory or "/",
                has_network=setting.room == "network",
                is_long_lived=True,
                extra=setting.visible,
                python_path=python_path,
                stderr=self._log,
            )
        except VerifierUnavailable:
            self._tidy()
            raise
        except Killed as error:
            self._tidy()
            raise WorkerKilled(str(error), was_judging=False) from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)

    def judge(self, body: bytes, limits: Limits) -> Verdict:
        """The verdict on the job that ``body`` frames. Raises VerifierUnavailable, WorkerKilled; in every
        other case of a worker that does not answer the worker is killed, and the verdict says timeout or
        crash."""
        self._begin(body, time.monotonic() + limits.start_seconds)
        begin = time.monotonic()
        try:
            second = self._receive(begin + limits.seconds + limits.grace_seconds)
        except Late:
            self.kill()
            return timed_out("the worker did not answer in time")
        if not isinstance(second, Judged):
            self._end(was_judging=True)
            return crashed("the worker died")
        if not second.is_clean:
            self.kill()
        if isinstance(second.verdict, str):
            raise WorkerKilled(second.verdict, was_judging=True)
        return second.verdict

    def _begin(self, body: bytes, deadline: float) -> None:
        """Hands the job over and waits until its verifier is loaded."""
        try:
            write_frame(self._requests, body, deadline=deadline)
            first = self._receive(deadline)
        except Late as error:
            self.kill()
            raise VerifierUnavailable(f"a worker does not start in time: {self._said}") from error
        except OSError:  # it ended before it read
            first = None
        if isinstance(first, Unavailable):
            raise VerifierUnavailable(first.message)
        if not isinstance(first, Started):
            self._end(was_judging=False)
            raise VerifierUnavailable(f"a worker died while it loaded a verifier: {self._said}")

    def _end(self, *, was_judging: bool) -> None:
        """Ends a worker that said nothing more; raises WorkerKilled where a signal had ended it already."""
        status = 0
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(_DYING_SECONDS)
        self.kill()
        if killed_by(status):
            raise WorkerKilled(f"a worker was ended by {killed_by(status)}", was_judging=was_judging)

    def kill(self) -> None:
        """Ends the worker and every process it began, at once."""
        if self.is_over:
            return
        self.is_over = True
        if self._own == "limits":
            _kill_family(self._process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        end(self._process)
        self._log.seek(0)
        self._said = self._log.read()[-_MAX_LOG:].decode(errors="replace").strip()
        self._tidy()

    def _receive(self, deadline: float) -> FromWorker | None:
        body = read_frame(self._replies, limit=_MAX_REPLY, deadline=deadline)
        try:
            return None if body is None else msgspec.json.decode(body, type=FromWorker)
        except msgspec.DecodeError:
            return None

    def _tidy(self) -> None:
        self._log.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _kill_family(pid: int) -> None:
    """Kills every descendant of a worker that has no process namespace. What forks faster than it is found
    gets away: only a namespace is certain."""
    for _ in range(_KILL_ROUNDS):
        family = descendants(pid)
        if not family:
            return
        for each in family:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Every living process below ``pid``, whatever its group or session."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with suppress(OSError):
                # pid (name, which may hold anything) state ppid ...
                state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    children.setdefault(int(parent), []).append(int(path.name))
    found, open_pids = [], [pid]
    while open_pids:
        below = children.get(open_pids.pop(), [])
        found += below
        open_pids += below
    return found
