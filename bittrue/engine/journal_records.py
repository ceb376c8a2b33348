"""The records of the journal's file; docs/journal.md describes them byte for byte."""

import msgspec

from bittrue.engine.types import FinishReason, SamplingParams


class Origin(msgspec.Struct, frozen=True, array_like=True):
    """The HTTP request a response answers. ``owner``: digest of the API key that alone may fetch it; "" =
    any."""

    response_id: str
    request_id: str  # of the X-Request-Id header
    owner: str
    endpoint: str
    created: int  # Unix seconds


class OpenedSequence(msgspec.Struct, frozen=True, array_like=True):
    """One sequence of a response. The prompt itself is not written: only a running server computes again."""

    num_prompt_tokens: int
    params: SamplingParams
    token_ids: list[int]  # so far


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="opened"):
    """A response was begun, or goes on in this segment with what it has so far."""

    number: int  # names the response in Tokens
    origin: Origin
    sequences: list[OpenedSequence]


class SequenceTokens(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to the ``index``-th sequence of a response."""

    number: int
    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """What one step added to all sequences."""

    added: list[SequenceTokens]


class Kept(msgspec.Struct, frozen=True, array_like=True, tag="kept"):
    """A response has ended. ``body`` is what a fetch gets, with HTTP status ``status``."""

    number: int
    origin: Origin
    status: int
    finished_at: float  # Unix seconds
    body: bytes


Record = Opened | Tokens | Kept

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Record)


def encode(record: Record) -> bytes:
    return _ENCODER.encode(record)


def decode(body: bytes | memoryview) -> Record:
    """Raises msgspec.DecodeError on what is no record."""
    record: Record = _DECODER.decode(body)
    return record
