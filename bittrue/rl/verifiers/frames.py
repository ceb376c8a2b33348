"""Messages between a pool and its workers, and their frames on a pipe."""

import os
import select
import struct
import time
from typing import TypeAlias

import msgspec

from bittrue.rl.verifiers.code import FunctionTests, ProgramTests
from bittrue.rl.verifiers.exact import Choice, Exact
from bittrue.rl.verifiers.http import Http
from bittrue.rl.verifiers.json_schema import JsonSchema
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.mathematics import Mathematics
from bittrue.rl.verifiers.reasoning_gym import ReasoningGym
from bittrue.rl.verifiers.reward_function import RewardFunction
from bittrue.rl.verifiers.tool_calls import ToolCalls
from bittrue.rl.verifiers.verifier import Answers, Verdict

Sent: TypeAlias = (
    Exact
    | Choice
    | Mathematics
    | FunctionTests
    | ProgramTests
    | JsonSchema
    | ToolCalls
    | ReasoningGym
    | RewardFunction
    | Http
)
_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size
_CHUNK = 65536


class Job(msgspec.Struct, frozen=True):
    """To a worker: one answer and who judges it."""

    verifier: Sent
    answers: Answers
    limits: Limits


class Started(msgspec.Struct, frozen=True, tag="started"):
    """From a worker: the verifier is loaded, its time begins."""


class Unavailable(msgspec.Struct, frozen=True, tag="unavailable"):
    """From a worker: this verifier cannot run here, whatever the answer."""

    message: str


class Judged(msgspec.Struct, frozen=True, tag="judged"):
    """From a worker: the verdict, or the text why there is none: a process of the check was killed. Not
    ``is_clean``: something of the answer's is left, end the worker."""

    verdict: Verdict | str
    is_clean: bool


FromWorker: TypeAlias = Started | Unavailable | Judged


class Late(Exception):
    """Nothing whole came, or was taken, in time."""


def frame(message: object) -> bytes:
    return framed(msgspec.json.encode(message))


def framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def read_frame(handle: int, *, limit: int | None = None, deadline: float | None = None) -> bytes | None:
    """The next frame's body; None where the stream ends, or announces more than ``limit`` bytes. Raises Late
    at ``deadline``, of the monotonic clock."""
    header = _read(handle, HEADER_BYTES, deadline)
    if header is None:
        return None
    (size,) = _LENGTH.unpack(header)
    return None if limit is not None and size > limit else _read(handle, size, deadline)


def write_frame(handle: int, body: bytes, *, deadline: float | None = None) -> None:
    """Writes what ``frame`` made. Raises Late, and OSError where nobody reads any more."""
    rest = memoryview(body)
    while rest:
        if deadline is not None:
            _wait([], [handle], deadline)
        rest = rest[os.write(handle, rest[:_CHUNK]) :]


def _read(handle: int, size: int, deadline: float | None) -> bytes | None:
    found = bytearray()
    while len(found) < size:
        if deadline is not None:
            _wait([handle], [], deadline)
        chunk = os.read(handle, min(_CHUNK, size - len(found)))
        if not chunk:
            return None
        found += chunk
    return bytes(found)


def _wait(readers: list[int], writers: list[int], deadline: float) -> None:
    poll = select.poll()
    for handle in readers:
        poll.register(handle, select.POLLIN)
    for handle in writers:
        poll.register(handle, select.POLLOUT)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise Late
