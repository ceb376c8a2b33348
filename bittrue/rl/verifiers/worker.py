"""A worker: loads verifiers once, and judges each answer in a child that ends with it.

    python -P -m bittrue.rl.verifiers.worker OF_PROGRAMS DIRECTORY

The child begins as the worker is: nothing that one answer did to its process is there for the next.
"""

import ctypes
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn, cast

import msgspec

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers.frames import (
    Job,
    Judged,
    Late,
    Started,
    Unavailable,
    frame,
    framed,
    read_frame,
    write_frame,
)
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.sandbox import IsolationKind, Killed
from bittrue.rl.verifiers.verifier import Place, Verdict, crashed, timed_out

_MAX_VERDICT = 1 << 16  # bytes
_SECRET_BYTES = 16
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_DYING_SECONDS, _LOOK_SECONDS = 2.0, 0.002
_KEEPER_SECONDS = 1.0  # a keeper's child ends late programs itself, and may say so
_libc = ctypes.CDLL(None)


class Worker:
    """``of_programs``: what it starts programs in."""

    def __init__(self, of_programs: IsolationKind, directory: str) -> None:
        self._of_programs, self._directory = of_programs, Path(directory)
        self._given = _contents(self._directory)
        # Verifiers print to nobody: the pipes to the pool are kept from them.
        self._requests, self._replies = os.dup(0), os.dup(1)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # programs of the same user may not read what is expected
        os.chdir(directory)

    def serve(self) -> None:
        """Until the pool closes the pipe."""
        while (body := read_frame(self._requests)) is not None:
            job = msgspec.json.decode(body, type=Job)
            try:
                job.verifier.prepare()
            except VerifierUnavailable as error:
                write_frame(self._replies, frame(Unavailable(str(error))))
                continue
            write_frame(self._replies, frame(Started()))
            verdict = self._judge_in_child(job)
            is_clean = not self._has_strays()
            if not is_clean and isinstance(verdict, Verdict) and verdict.outcome != "timeout":
                verdict = crashed("the answer's check left a process behind")
            write_frame(self._replies, frame(Judged(verdict, is_clean and self._empty_directory())))

    def _judge_in_child(self, job: Job) -> Verdict | str:
        """The verdict, or which process was killed by a signal that nobody here sent."""
        own = _KEEPER_SECONDS if job.verifier.room == "keeper" else 0.0
        deadline = time.monotonic() + job.limits.seconds + own
        # What an answer makes its verifier write to every open file does not begin with the secret.
        secret = os.urandom(_SECRET_BYTES)
        answer_read, answer_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(answer_read)
            self._be_child(job, answer_write, secret)
        os.close(answer_write)
        try:
            body = read_frame(answer_read, limit=_MAX_VERDICT, deadline=deadline)
        except Late:
            body = None
        os.close(answer_read)
        if body is not None:  # whatever the child still does, it has had its say
            os.kill(pid, signal.SIGKILL)
        ended = _wait(pid, deadline)
        if ended is None:
            return timed_out(f"no verdict in {job.limits.seconds} s")
        return _ended(*ended, job) if body is None else _said(body, secret)

    def _be_child(self, job: Job, answer: int, secret: bytes) -> NoReturn:
        """Judges, says so and ends, whatever happens."""
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.close(self._requests)
        os.close(self._replies)
        _limit_time(job.limits)
        place = Place(self._of_programs, job.limits, str(self._directory))
        try:
            verdict = job.verifier.judge(job.answers, place)
            write_frame(answer, framed(secret + msgspec.json.encode(verdict)))
        except Killed as error:
            write_frame(answer, framed(secret + msgspec.json.encode(str(error))))
        except BaseException as error:
            verdict = crashed(f"{type(error).__name__}: {error}")
            write_frame(answer, framed(secret + msgspec.json.encode(verdict)))
            raise
        finally:
            os._exit(0)

    def _has_strays(self) -> bool:
        """Whether a process of the answer's lives on. Orphans are the worker's children, whichever session or
        group they went to; those that are dying get a moment."""
        deadline = time.monotonic() + _DYING_SECONDS
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                if time.monotonic() > deadline:
                    return True
                time.sleep(_LOOK_SECONDS)

    def _empty_directory(self) -> bool:
        """Removes what was not there when the worker began; False where something stays."""
        folders, given = self._given
        try:
            for path in [path for folder in folders for path in folder.iterdir()]:
                if path not in given:
                    _remove(path)
        except OSError:
            return False
        return True


def _contents(directory: Path) -> tuple[list[Path], set[Path]]:
    """The folders of a directory, itself first, and all that is in them; what is mounted in it, as a visible
    path in /tmp is, counts and is not entered."""
    folders, found = [directory], set()
    for folder in folders:
        for path in folder.iterdir():
            found.add(path)
            if path.is_dir() and not path.is_symlink() and not path.is_mount():
                folders.append(path)
    return folders, found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _wait(pid: int, deadline: float) -> tuple[int, float] | None:
    """Status and processor seconds of a child that ends by the deadline; one that does not is killed, and
    None."""
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return status, usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(_LOOK_SECONDS)


def _said(body: bytes, secret: bytes) -> Verdict | str:
    if not body.startswith(secret):
        return crashed("a verdict that the verifier did not give")
    try:
        return msgspec.json.decode(body[len(secret) :], type=Verdict | str)
    except msgspec.DecodeError as error:
        return crashed(f"no verdict: {error}")


def _ended(status: int, seconds: float, job: Job) -> Verdict | str:
    """The verdict on a child that ended without one after ``seconds`` of the processor, or who killed it."""
    if not os.WIFSIGNALED(status):
        return crashed(f"ended with status {os.WEXITSTATUS(status)} and no verdict")
    number = signal.Signals(os.WTERMSIG(status))
    # A keeper's child runs our own code, which ends at the first signal; the seconds are its programs'.
    is_late = seconds >= job.limits.cpu_seconds and job.verifier.room != "keeper"
    if number == signal.SIGXCPU or (number == signal.SIGKILL and is_late):
        return timed_out(f"ended by {number.name}")
    return f"the check was ended by {number.name}"


def _limit_time(limits: Limits) -> None:
    """Of this process from now on: a signal that says why, and a second later one that cannot be ignored."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + limits.cpu_seconds, used + limits.cpu_seconds + 1))


def main(arguments: list[str]) -> None:
    of_programs, directory = arguments
    Worker(cast(IsolationKind, of_programs), directory).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
