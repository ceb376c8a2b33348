"""The messages between the server process and the engine process, and their frames on a stream socket."""

import struct
from typing import Any

import msgspec

from bittrue import errors
from bittrue.engine.types import Abort, EngineStats, MemoryReport, Request, Running, TokenEvent

_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First message to a new engine process: what to build."""

    factory: str  # "package.module:callable"; called with (model directory, RunConfig, progress=, verified=)
    run_config: str  # RunConfig as JSON
    verified: str = ""  # ``Ready.verified`` of an earlier process on these files


class Ping(msgspec.Struct, frozen=True, kw_only=True, tag="ping"):
    """Asks for a Pong once everything sent before has been taken in."""

    ping_id: int


class Flush(msgspec.Struct, frozen=True, kw_only=True, tag="flush"):
    """Asks the engine to drop every cached prefix, on all tiers; answered by Flushed."""

    flush_id: int


class TensorPiece(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of a tensor of an update (model/weight_update.Payload), from ``offset`` on, of ``num_bytes``."""

    name: str
    digest: str
    dtype: str
    shape: tuple[int, ...]
    is_delta: bool
    num_bytes: int
    offset: int
    data: memoryview  # of the frame it came in


class UpdatePart(msgspec.Struct, frozen=True, kw_only=True, tag="update"):
    """Part ``index`` of new weights. They are applied when the last has come, between two steps; answered by
    one Updated. ``running``: what becomes of sequences under way."""

    update_id: int
    index: int
    is_last: bool
    version: str
    base: str | None
    running: Running
    pieces: list[TensorPiece]


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Close the engine and exit 0."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine is built. Engines of different ``fingerprint`` may not continue each other's sequences.

    ``verified`` stands for the checkpoint's files as they were read and found sound.
    """

    max_context: int
    vocab_size: int
    fingerprint: dict[str, Any]
    stats: EngineStats
    memory: MemoryReport
    verified: str = ""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """An error of errors.py: of one request, or (``request_id`` None) of the start-up."""

    request_id: str | None
    kind: str
    message: str
    fields: dict[str, Any] = {}


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """What one step brought, and the numbers after it."""

    events: list[TokenEvent]
    stats: EngineStats


class Pong(msgspec.Struct, frozen=True, kw_only=True, tag="pong"):
    ping_id: int
    stats: EngineStats


class Flushed(msgspec.Struct, frozen=True, kw_only=True, tag="flushed"):
    """What a Flush dropped: ``pages`` and ``snapshots`` of the device, blobs of each other tier by its name.

    ``error``: why something stayed; None = nothing did.
    """

    flush_id: int
    dropped: dict[str, int] = {}
    error: str | None = None


class Updated(msgspec.Struct, frozen=True, kw_only=True, tag="updated"):
    """The answer to an update: steps before it ran on the old weights, steps behind it on these.

    ``is_changed`` False: they were these already, or with a ``refusal`` they stayed what they were.
    """

    update_id: int
    is_changed: bool
    stats: EngineStats
    refusal: Refused | None = None


ToEngine = Hello | Request | Abort | Ping | Flush | UpdatePart | Shutdown
FromEngine = Ready | Refused | StepDone | Pong | Flushed | Updated


def _plain(value: object) -> object:
    """A fingerprint may hold a kind of str (torch's version is one)."""
    if isinstance(value, str):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not cross the process boundary")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """The message as msgpack behind its length, 4 bytes little-endian."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


def body_bytes(header: bytes | bytearray) -> int:
    """The length a frame's header announces."""
    length: int = _LENGTH.unpack(header)[0]
    return length


def decode_to_engine(body: bytes | bytearray) -> ToEngine:
    message: ToEngine = _TO_ENGINE.decode(body)
    return message


def decode_from_engine(body: bytes) -> FromEngine:
    message: FromEngine = _FROM_ENGINE.decode(body)
    return message


def refusal(request_id: str | None, error: errors.BittrueError) -> Refused:
    """``error`` as a message; its attributes travel along."""
    return Refused(request_id=request_id, kind=type(error).__name__, message=str(error), fields=vars(error))


def error_of(refused: Refused) -> errors.BittrueError:
    """The error a Refused carries, as the class it had on the other side (EngineDied if unknown)."""
    found = getattr(errors, refused.kind, None)
    is_known = isinstance(found, type) and issubclass(found, errors.BittrueError)
    kind: type[errors.BittrueError] = found if is_known else errors.EngineDied  # type: ignore[assignment]
    error = kind.__new__(kind)  # the text is already composed: constructors would compose it again
    error.args = (refused.message,)
    vars(error).update(refused.fields)
    return error
