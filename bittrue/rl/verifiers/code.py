"""Programs as answers: run in a sandbox, their results compared outside it."""

import ast
import math
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, ClassVar, Literal

import msgspec

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers import harness
from bittrue.rl.verifiers.json_text import same_json, strict_json
from bittrue.rl.verifiers.python_source import python_source
from bittrue.rl.verifiers.sandbox import Killed, end, start
from bittrue.rl.verifiers.verifier import (
    Answers,
    Checker,
    Place,
    Room,
    Verdict,
    crashed,
    final_text,
    right,
    timed_out,
    unparsable,
    wrong,
)

MAX_OUTPUT = 1 << 20  # bytes of one run
_XCPU, _KILL = 128 + 24, 128 + 9  # over the processor time: first SIGXCPU, then SIGKILL
_How = Literal["ended", "late", "flooded"]


class Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call of the function and what it must return, as JSON values: a tuple is a list."""

    expected: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run of the program and what it must print, but for white space at the ends of lines."""

    stdin: str
    stdout: str


class FunctionTests(Checker, frozen=True, tag="function_tests"):
    """Right is a program whose ``function`` returns what each call expects. The calls are made in one process
    in order; the first that raises ends them. Floats are equal within ``relative_tolerance``."""

    room: ClassVar[Room] = "keeper"
    function: str
    calls: tuple[Call, ...]
    relative_tolerance: float = 0.0

    def prepare(self) -> None:
        if not self.calls:
            raise VerifierUnavailable("a test of no calls proves nothing")

    def judge(self, answers: Answers, place: Place) -> Verdict:
        source = python_source(final_text(answers) or "")
        if source is None:
            return unparsable("no Python")
        calls = [{"args": call.args, "kwargs": call.kwargs} for call in self.calls]
        told = {"source": source, "function": self.function, "calls": calls}
        ended = run_program(told, b"", place, place.limits.seconds)
        returned = [_record(line) for line in ended.output.split(b"\n")[:-1]]
        passed = 0
        for call, record in zip(self.calls, returned, strict=False):
            passed += "value" in record and _equal(record["value"], call.expected, self.relative_tolerance)
        measured = {"passed": passed / len(self.calls)}
        if ended.is_late:
            return timed_out("the program did not end", measured)
        error = next((str(record["error"]) for record in returned if "error" in record), None)
        if error is not None:
            return wrong(error, measured)
        if len(returned) != len(self.calls):
            _check_not_killed(ended)
            fact = f"{len(returned)} of {len(self.calls)} results, then status {ended.status}"
            return crashed(fact, measured)
        return right(measured) if passed == len(self.calls) else wrong("another result", measured)


class ProgramTests(Checker, frozen=True, tag="program_tests"):
    """Right is a program that prints what each run expects and ends with status 0. Each run is a process of
    its own, of at most ``run_seconds``; the first that does not end so is the last."""

    room: ClassVar[Room] = "keeper"
    runs: tuple[Run, ...]
    run_seconds: float | None = None

    def prepare(self) -> None:
        if not self.runs:
            raise VerifierUnavailable("a test of no runs proves nothing")

    def judge(self, answers: Answers, place: Place) -> Verdict:
        source = python_source(final_text(answers) or "")
        if source is None:
            return unparsable("no Python")
        passed = 0
        told = {"source": source, "calls": None}
        deadline = time.monotonic() + place.limits.seconds
        for run in self.runs:
            left = deadline - time.monotonic()
            seconds = left if self.run_seconds is None else min(left, self.run_seconds)
            ended = run_program(told, run.stdin.encode(), place, seconds)
            passed += ended.status == 0 and _lines(ended.output) == _lines(run.stdout.encode())
            measured = {"passed": passed / len(self.runs)}
            if ended.is_late:
                return timed_out("the program did not end", measured)
            if ended.status != 0:
                _check_not_killed(ended)
                return crashed(f"the program ended with status {ended.status}", measured)
        return right(measured) if passed == len(self.runs) else wrong("another output", measured)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended. ``status``: of the process, 128 + the signal's number where one killed it.
    ``is_killed``: by a signal that none of its limits sends."""

    output: bytes
    status: int
    is_late: bool
    is_killed: bool


def run_program(told: dict[str, Any], stdin: bytes, place: Place, seconds: float) -> Ended:
    """Runs the harness in the sandbox until it ends, is late or has said too much."""
    body = msgspec.json.encode(told)
    command = [sys.executable, "-I", "-B", harness.__file__]
    before = _children_seconds()
    process = start(command, place.isolation, place.limits, directory=place.directory)
    try:
        output, how = _converse(process, b"%d\n%b%b" % (len(body), body, stdin), seconds)
    finally:
        status = end(process)
    status = status if status >= 0 else 128 - status
    is_over_time = status == _XCPU or _children_seconds() - before >= place.limits.cpu_seconds
    is_late = how == "late" or (how == "ended" and status in (_XCPU, _KILL) and is_over_time)
    return Ended(output, status, is_late, how == "ended" and status == _KILL and not is_late)


def _check_not_killed(ended: Ended) -> None:
    if ended.is_killed:
        raise Killed("a program was ended by SIGKILL")


def _children_seconds() -> float:
    """Processor time of every process that ended and was waited for, with those that it waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _converse(process: subprocess.Popen[bytes], text: bytes, seconds: float) -> tuple[bytes, _How]:
    """Writes and reads until the program ends, is late or has said too much."""
    assert process.stdin is not None and process.stdout is not None
    source, target = process.stdout.fileno(), process.stdin.fileno()
    os.set_blocking(target, False)
    rest, output, deadline = memoryview(text), b"", time.monotonic() + seconds
    while len(output) <= MAX_OUTPUT:
        left = max(0.0, deadline - time.monotonic())
        readable, writable, _ = select.select([source], [target] if rest else [], [], left)
        if not readable and not writable:
            return output, "late"
        if writable:
            rest = _written(process.stdin, rest)
        if readable:
            chunk = os.read(source, 65536)
            if not chunk:
                return output, _ending(process, deadline)
            output += chunk
    return output, "flooded"


def _written(target: IO[bytes], rest: memoryview) -> memoryview:
    """What is left to write; a program need not read its input."""
    try:
        rest = rest[os.write(target.fileno(), rest[:65536]) :]
    except BrokenPipeError:
        rest = rest[:0]
    if not rest:
        target.close()
    return rest


def _ending(process: subprocess.Popen[bytes], deadline: float) -> _How:
    """Whether a program that closed its output ends by the deadline."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "late"
    return "ended"


def _record(line: bytes) -> dict[str, Any]:
    """One result as the sandbox wrote it, which may be anything."""
    try:
        found = strict_json(line.decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _equal(value: Any, expected: Any, tolerance: float) -> bool:
    if tolerance and isinstance(expected, float) and type(value) in (int, float):
        return math.isclose(value, expected, rel_tol=tolerance)
    if tolerance and isinstance(expected, list) and isinstance(value, list):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(_equal(v, e, tolerance) for v, e in pairs)
    return same_json(value, expected)


def _lines(output: bytes) -> list[bytes]:
    return [line.rstrip() for line in output.rstrip().split(b"\n")]


def calls_of(asserts: Sequence[str]) -> tuple[str, tuple[Call, ...]]:
    """The function and the calls of tests written ``assert f(1, 2) == 3``. Raises ValueError for any other
    test: it would have to run beside the program that it judges."""
    function, calls = "", []
    for text in asserts:
        match ast.parse(text).body:
            case [ast.Assert(ast.Compare(ast.Call(ast.Name(name)) as call, [ast.Eq()], [expected]))]:
                pass
            case _:
                raise ValueError(f"not of the form assert f(...) == value: {text!r}")
        if function not in ("", name):
            raise ValueError(f"tests of two functions, {function} and {name}")
        function = name
        args = tuple(ast.literal_eval(argument) for argument in call.args)
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        calls.append(_as_json(Call(ast.literal_eval(expected), args, kwargs)))
    return function, tuple(calls)


def _as_json(call: Call) -> Call:
    """The call as a JSON document holds it: tuples are lists, keys are text."""
    return msgspec.json.decode(msgspec.json.encode(call), type=Call)
