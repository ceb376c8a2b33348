"""How the driver and its workers talk: one JSON object a line, a question on stdin, an answer on stdout.

Needs the standard library only: workers run in environments of their own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

CHUNK = 512  # prompt tokens of one step, for every engine
WARM_STEPS = 2  # decode steps of a turn that are not timed: others have used the caches since the last turn


class Engine(Protocol):
    """One engine with the checkpoint loaded. ``open`` begins sequences; they live until ``close``."""

    def facts(self) -> dict[str, str]:
        """What runs: version, formats."""

    def score(self, token_ids: list[int]) -> dict[str, list[float]]:
        """For every token after the first, given those before it: ``argmax``, the likeliest id, and
        ``logprob``, of the token itself (nats); ours adds ``margin``, from the likeliest to the next."""

    def open(self, prompts: list[list[int]]) -> None:
        """Computes the prompts, all of one length, up to the first token of each."""

    def step(self) -> None:
        """One greedy token for every open sequence."""

    def close(self) -> None:
        """Ends the sequences and frees their memory."""


def serve(load: Callable[[], Engine]) -> None:
    """Answers the driver until its end of the pipe closes. What libraries print goes to stderr."""
    answers = open_answers()
    engine = load()
    answer(answers, engine.facts())
    for line in sys.stdin:
        question = json.loads(line)
        do = question.pop("do")
        if do == "score":
            answer(answers, engine.score(**question))
        elif do == "open":
            start_s = time.perf_counter()
            engine.open(**question)
            answer(answers, {"seconds": time.perf_counter() - start_s})
        elif do == "decode":
            answer(answers, {"seconds": _decode(engine, **question), "peak_bytes": _peak_bytes()})
        elif do == "close":
            engine.close()
            answer(answers, {})
        else:
            raise ValueError(f"the driver asks for {do!r}")


def _decode(engine: Engine, steps: int, seconds: float) -> list[float]:
    """Seconds of each of ``steps`` steps; fewer, but at least 3, when they take longer than ``seconds``."""
    for _ in range(WARM_STEPS):
        engine.step()
    timings: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(timings) < steps and (len(timings) < 3 or time.perf_counter() < end_s):
        start_s = time.perf_counter()
        engine.step()
        timings.append(time.perf_counter() - start_s)
    return timings


def open_answers() -> TextIO:
    """Where answers go. What libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer(stream: TextIO, facts: Mapping[str, Any]) -> None:
    stream.write(json.dumps(facts) + "\n")
    stream.flush()


def _peak_bytes() -> int:
    """The most this process ever had in memory. (ru_maxrss would begin with what the driver had.)"""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Worker:
    """The driver's end of one worker process. ``facts`` is what the worker says of itself once loaded."""

    def __init__(self, name: str, command: Sequence[str], *, threads: int) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        # OpenMP's default, which the peers are tuned for: threads spin for a moment, then sleep.
        environment.pop("OMP_WAIT_POLICY", None)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parent,
        )
        self.facts: dict[str, str] = self._read()

    def ask(self, do: str, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **question}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {self.name} ended with code {self.end()}; see above")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> int:
        """Closes the pipes, which ends the worker, and waits for it: its exit code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        return self._process.returncode
