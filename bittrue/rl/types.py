"""What a rollout is, from the engine that sampled it to the verifier that scored it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bittrue.engine.types import FinishReason
from bittrue.errors import RolloutInvalid

# What a verifier said; the last two are about the verifier, not about the answer.
Outcome = Literal["right", "wrong", "unparsable", "timeout", "crash"]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive answer tokens sampled by one version of the policy. None, first of several: it computed
    rows of the prompt, which the others read."""

    policy_version: int
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled answer, as the engine reported it.

    ``prompt_ids`` [P] i32, ``answer_ids`` [A] i32, ``logprobs`` [A] f32 of the answer's tokens. ``spans``
    cover the answer in order: several where weights changed under way. ``experts`` [R, learned routers, k]
    and ``index_rows`` [R', CSA layers, k], unsigned ids: what was chosen for the last R and R' of the
    P + A - 1 tokens the engine computed; before them nothing was recorded.
    """

    prompt_key: str
    prompt_ids: NDArray[np.int32]
    answer_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    experts: NDArray[Any] | None = None
    index_rows: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        self._check_vector("prompt_ids", self.prompt_ids, np.int32)
        self._check_vector("answer_ids", self.answer_ids, np.int32)
        self._check_vector("logprobs", self.logprobs, np.float32)
        if len(self.prompt_ids) == 0:
            raise self._invalid("the prompt is empty; begin it with the tokenizer's first token")
        size = len(self.answer_ids)
        if len(self.logprobs) != size:
            raise self._invalid(f"{len(self.logprobs)} log-probabilities for {size} answer tokens")
        wrong = np.flatnonzero(~np.isfinite(self.logprobs))
        if len(wrong):
            value = float(self.logprobs[wrong[0]])
            raise self._invalid(f"the log-probability of answer token {wrong[0]} is {value}")
        covered = sum(span.num_tokens for span in self.spans)
        least = min((span.num_tokens for span in self.spans[1:]), default=1)
        if covered != size or least < 1 or any(span.num_tokens < 0 for span in self.spans):
            raise self._invalid(f"its spans cover {covered} of {size} answer tokens, or one is empty")
        for name, record in (("experts", self.experts), ("index_rows", self.index_rows)):
            if record is not None and len(record) > self.num_tokens - 1:
                raise self._invalid(f"{name} of {len(record)} tokens, {self.num_tokens - 1} were computed")

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"

    def policy_versions(self) -> NDArray[np.int64]:
        """The version that sampled each answer token, [A]."""
        versions = [span.policy_version for span in self.spans]
        return np.repeat(np.array(versions, np.int64), [span.num_tokens for span in self.spans])

    def _check_vector(self, name: str, values: NDArray[Any], dtype: type[np.generic]) -> None:
        if values.ndim != 1 or values.dtype != dtype:
            form = f"{list(values.shape)} {values.dtype}"
            raise self._invalid(f"{name} is {form}, not a vector of {np.dtype(dtype)}")

    def _invalid(self, fact: str) -> RolloutInvalid:
        return RolloutInvalid(f"rollout of prompt {self.prompt_key}: {fact}", prompt_key=self.prompt_key)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A rollout and what its verifier said. ``score`` is None where the verifier could not tell; such a
    rollout is in no baseline and has no advantage."""

    rollout: Rollout
    score: float | None
    outcome: Outcome
    sub_scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {"score": self.score, **self.sub_scores}
        for name, value in given.items():
            if value is not None and not math.isfinite(value):
                key = self.rollout.prompt_key
                raise RolloutInvalid(
                    f"rollout of prompt {key}: {name} is {value}; a verifier gives a number or nothing",
                    prompt_key=key,
                )


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The rollouts of one prompt, which are each other's baseline."""

    prompt_key: str
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        if not self.rollouts:
            raise RolloutInvalid(
                f"group of prompt {self.prompt_key}: no rollouts", prompt_key=self.prompt_key
            )
        prompt = self.rollouts[0].prompt_ids
        for i, rollout in enumerate(self.rollouts):
            if rollout.prompt_key != self.prompt_key or not np.array_equal(rollout.prompt_ids, prompt):
                raise RolloutInvalid(
                    f"group of prompt {self.prompt_key}: rollout {i} answers another prompt "
                    f"({rollout.prompt_key})",
                    prompt_key=self.prompt_key,
                )
