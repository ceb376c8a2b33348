"""Rewards for controls: random, or another answer's. What they teach is no skill."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bittrue.rl.source import Asked, Source
from bittrue.rl.types import Rollout, Scored
from bittrue.rl.verifiers.health import Health
from bittrue.train.tasks.task import seeded

Reward = Literal["verifier", "random", "shuffled"]
TRUE_SCORE = "verifier"  # the sub-score that keeps what the answer's own verifier said


@dataclass(frozen=True, slots=True)
class _AskedAt:
    """What the source asked, and in which step."""

    step: int
    asked: Asked


class Control:
    """A source whose prompts are another's and whose scores are not. Judging costs what it did, and every
    rollout keeps its true score as a sub-score, so that a control shows what it did to the skill."""

    def __init__(self, source: Source, reward: Literal["random", "shuffled"], *, seed: int) -> None:
        """``random``: 0 or 1, a function of seed, step, prompt and answer alone. ``shuffled``: the scores of
        a step in an order that seed and step give."""
        self._source, self._reward, self._seed = source, reward, seed

    def of_step(self, step: int, count: int) -> list[Asked]:
        return [replace(asked, judge=_AskedAt(step, asked)) for asked in self._source.of_step(step, count)]

    def score(self, pairs: Sequence[tuple[Asked, Sequence[Rollout]]]) -> list[list[Scored]]:
        if not pairs:
            return []
        inner = [(_asked_at(asked), rollouts) for asked, rollouts in pairs]
        groups = self._source.score([(each.asked, rollouts) for each, rollouts in inner])
        step = inner[0][0].step
        scored = [each for group in groups for each in group]
        given = self._shuffled(scored, step) if self._reward == "shuffled" else self._random(scored, step)
        return _regrouped(given, map(len, groups))

    def digest(self) -> str:
        facts = f"{self._reward}\n{self._seed}\n{self._source.digest()}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def health(self) -> Health | None:
        return self._source.health()

    def isolation(self) -> str:
        return self._source.isolation()

    def close(self) -> None:
        self._source.close()

    def _random(self, scored: Sequence[Scored], step: int) -> list[Scored]:
        return [_with_score_of(each, self._coin(each.rollout, step)) for each in scored]

    def _coin(self, rollout: Rollout, step: int) -> Scored:
        digest = hashlib.blake2b(f"{self._seed}\n{step}\n{len(rollout.prompt_ids)}\n".encode(), digest_size=8)
        digest.update(rollout.prompt_ids.astype("<i4").tobytes())
        digest.update(rollout.answer_ids.astype("<i4").tobytes())
        is_lucky = bool(digest.digest()[0] & 1)
        return Scored(rollout, float(is_lucky), "right" if is_lucky else "wrong")

    def _shuffled(self, scored: Sequence[Scored], step: int) -> list[Scored]:
        order = list(range(len(scored)))
        seeded("shuffled rewards", self._seed, step).shuffle(order)
        return [_with_score_of(each, scored[place]) for each, place in zip(scored, order, strict=True)]


def _asked_at(asked: Asked) -> _AskedAt:
    assert isinstance(asked.judge, _AskedAt), "another source asked this"
    return asked.judge


def _with_score_of(own: Scored, other: Scored) -> Scored:
    """The rollout of ``own`` with the score of ``other``."""
    known = {} if own.score is None else {TRUE_SCORE: own.score}
    return Scored(own.rollout, other.score, other.outcome, {**own.sub_scores, **known})


def _regrouped(scored: Sequence[Scored], sizes: Iterable[int]) -> list[list[Scored]]:
    rest = iter(scored)
    return [[next(rest) for _ in range(size)] for size in sizes]
