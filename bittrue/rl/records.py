"""The record of a step: all that its update was computed from, beside the weights."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bittrue.engine.types import FinishReason
from bittrue.errors import CheckpointError
from bittrue.rl.types import Outcome, Rollout, Scored, Span

RECORDS_DIRECTORY = "records"
_MAGIC = b"bittrue step 1\n"
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """The answers a step learns from, with their scores, by prompt; ``tasks`` [prompts] names what was
    asked, ``versions`` the weights of every policy version that sampled a token, ``digest`` the record it was
    read from."""

    step: int
    tasks: tuple[str, ...]
    groups: tuple[tuple[Scored, ...], ...]
    versions: Mapping[int, str] = field(default_factory=dict)
    digest: str = ""

    @property
    def scored(self) -> list[Scored]:
        """Every answer, group by group."""
        return [each for group in self.groups for each in group]

    @property
    def rollouts(self) -> list[Rollout]:
        return [each.rollout for each in self.scored]


class _Array(msgspec.Struct, frozen=True, array_like=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    prompt_key: str
    prompt_ids: _Array
    answer_ids: _Array
    logprobs: _Array
    spans: tuple[tuple[int, int], ...]
    finish_reason: FinishReason
    experts: _Array | None
    index_rows: _Array | None
    score: float | None
    outcome: Outcome
    sub_scores: dict[str, float]


class _Step(msgspec.Struct, frozen=True, array_like=True):
    step: int
    tasks: tuple[str, ...]
    groups: tuple[tuple[_Answer, ...], ...]
    versions: dict[int, str] = {}  # msgspec copies it


_DECODER = msgspec.msgpack.Decoder(_Step)


class Records:
    """The records of a run, a file a step. A step that has one is not sampled again."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / RECORDS_DIRECTORY

    def path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}.rec"

    def write(self, batch: StepBatch) -> str:
        """Writes the record of a step at once; its digest. Raises CheckpointError on a full disk."""
        body = msgspec.msgpack.encode(_packed(batch))
        digest = hashlib.blake2b(body, digest_size=_DIGEST_BYTES)
        path = self.path(batch.step)
        staging = path.with_suffix(".new")
        try:
            self._directory.mkdir(exist_ok=True)
            staging.write_bytes(_MAGIC + digest.digest() + zlib.compress(body, 1))
            staging.replace(path)
        except OSError as error:
            staging.unlink(missing_ok=True)
            fact = f"cannot write the record {path}: {error.strerror or error}; checkpoints are kept"
            raise CheckpointError(
                f"{fact}; make room and run the same command again", file=str(path)
            ) from error
        return digest.hexdigest()

    @property
    def is_empty(self) -> bool:
        return not any(self._directory.glob("step-*.rec"))

    def has(self, step: int) -> bool:
        return self.path(step).is_file()

    def digest(self, step: int) -> str:
        """What ``write`` gave. Raises CheckpointError."""
        return self._read(step)[0].hex()

    def read(self, step: int) -> StepBatch:
        """Raises CheckpointError where the record is missing, not what was written, or of another step."""
        digest, body = self._read(step)
        found = _DECODER.decode(body)
        if found.step != step:
            fact = f"{self.path(step)} is the record of step {found.step}"
            raise CheckpointError(f"{fact}; restore the file", file=str(self.path(step)))
        return _unpacked(found, digest.hex())

    def _read(self, step: int) -> tuple[bytes, bytes]:
        path = self.path(step)
        try:
            data = path.read_bytes()
        except OSError as error:
            fact = f"there is no record {path}: {error.strerror}"
            raise CheckpointError(f"{fact}; choose a step of the run", file=str(path)) from error
        begin = len(_MAGIC) + _DIGEST_BYTES
        digest = data[len(_MAGIC) : begin]
        try:
            body = zlib.decompress(data[begin:])
        except zlib.error:
            body = b""
        found = hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()
        if not data.startswith(_MAGIC) or found != digest:
            fact = f"the record {path} is not what was written: its checksum differs"
            raise CheckpointError(f"{fact}; remove it, and the step is sampled again", file=str(path))
        return digest, body


def _packed(batch: StepBatch) -> _Step:
    groups = tuple(tuple(_answer(each) for each in group) for group in batch.groups)
    return _Step(batch.step, batch.tasks, groups, dict(batch.versions))


def _answer(each: Scored) -> _Answer:
    rollout = each.rollout
    return _Answer(
        prompt_key=rollout.prompt_key,
        prompt_ids=_array(rollout.prompt_ids),
        answer_ids=_array(rollout.answer_ids),
        logprobs=_array(rollout.logprobs),
        spans=tuple((span.policy_version, span.num_tokens) for span in rollout.spans),
        finish_reason=rollout.finish_reason,
        experts=None if rollout.experts is None else _array(rollout.experts),
        index_rows=None if rollout.index_rows is None else _array(rollout.index_rows),
        score=each.score,
        outcome=each.outcome,
        sub_scores=dict(each.sub_scores),
    )


def _array(values: NDArray[Any]) -> _Array:
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return _Array(little.dtype.str, values.shape, np.ascontiguousarray(little).tobytes())


def _unpacked(found: _Step, digest: str) -> StepBatch:
    groups = tuple(tuple(_scored(answer) for answer in group) for group in found.groups)
    return StepBatch(found.step, found.tasks, groups, found.versions, digest)


def _scored(answer: _Answer) -> Scored:
    rollout = Rollout(
        prompt_key=answer.prompt_key,
        prompt_ids=_values(answer.prompt_ids),
        answer_ids=_values(answer.answer_ids),
        logprobs=_values(answer.logprobs),
        spans=tuple(Span(version, count) for version, count in answer.spans),
        finish_reason=answer.finish_reason,
        experts=None if answer.experts is None else _values(answer.experts),
        index_rows=None if answer.index_rows is None else _values(answer.index_rows),
    )
    return Scored(rollout, answer.score, answer.outcome, answer.sub_scores)


def _values(array: _Array) -> NDArray[Any]:
    return np.frombuffer(array.data, array.dtype).reshape(array.shape)


def prompts_digest(prompts: Sequence[Sequence[int]]) -> str:
    """Of what was asked, in order: hexadecimal."""
    whole = hashlib.blake2b(digest_size=16)
    for token_ids in prompts:
        ids = np.asarray(token_ids, "<i4")
        whole.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return whole.hexdigest()
