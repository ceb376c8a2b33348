"""Rows of a prompt file as a source, judged by a pool of verifiers."""

import hashlib
from collections.abc import Iterator, Sequence

from bittrue.errors import VerifierUnavailable
from bittrue.rl.prompt_file import Row, digest_of
from bittrue.rl.rollout import Prompt
from bittrue.rl.source import Asked
from bittrue.rl.types import Rollout, Scored
from bittrue.rl.verifiers.health import Health
from bittrue.rl.verifiers.pool import Judging
from bittrue.rl.verifiers.reward_function import RewardFunction
from bittrue.rl.verifiers.verifier import Answers, Verdict, answer_of
from bittrue.text.parser import parse_answer
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.tasks.task import seeded


class Prompts:
    """Prompts of one side of a split, in a fresh order every time through. ``pool`` may be shared with the
    other side, and closes with the first of them."""

    def __init__(
        self, rows: Sequence[Row], pool: Judging, tokenizer: Tokenizer, *, seed: int, repeats: bool
    ) -> None:
        """``repeats``: whether rows are asked again once all have been; else a step has each at most
        once."""
        self._rows, self._pool, self._tokenizer = rows, pool, tokenizer
        self._seed, self._repeats = seed, repeats

    def of_step(self, step: int, count: int) -> list[Asked]:
        """The rows at the places of this step in the endless order, each by a name of its own."""
        count = count if self._repeats else min(count, len(self._rows))
        rows = self._ordered(step * count, count)
        return [
            Asked(Prompt(f"{row.id}-{step}-{place}", row.token_ids), row.task, row)
            for place, row in enumerate(rows)
        ]

    def score(self, pairs: Sequence[tuple[Asked, Sequence[Rollout]]]) -> list[list[Scored]]:
        """The scores of the verifiers, which judge all answers at once. An answer that was cut is unparsable,
        and its verifier is not asked."""
        answers = {
            (i, k): self._answers(_row(asked), rollout)
            for i, (asked, rollouts) in enumerate(pairs)
            for k, rollout in enumerate(rollouts)
            if self._has_ended(rollout)
        }
        jobs = [(_row(pairs[i][0]), found) for (i, _), found in answers.items()]
        verdicts = dict(zip(answers, self._judged(jobs), strict=True))
        return [
            [_scored(_row(asked), rollout, verdicts.get((i, k))) for k, rollout in enumerate(rollouts)]
            for i, (asked, rollouts) in enumerate(pairs)
        ]

    def check_verifiers(self) -> None:
        """Starts each kind of verifier once. Raises VerifierUnavailable where one cannot run here, before
        anything is sampled."""
        first = {row.verifier.kind: row for row in reversed(self._rows)}
        for row in first.values():
            if row.verifier.room != "network":  # whoever is asked there would take it for an answer
                self._check(row, answer_of(""))

    def _judged(self, jobs: Sequence[tuple[Row, Answers]]) -> list[Verdict]:
        """The verdicts on all of them; an error names the row that has no verdict."""
        try:
            return self._pool.judge_all([(row.verifier, answers) for row, answers in jobs])
        except VerifierUnavailable:
            for row, answers in jobs:
                self._check(row, answers)
            raise

    def _check(self, row: Row, answers: Answers) -> None:
        try:
            self._pool.judge_all([(row.verifier, answers)], is_counted=False)
        except VerifierUnavailable as error:
            raise VerifierUnavailable(f"{row.where}: verifier {row.verifier.kind!r}: {error}") from error

    def digest(self) -> str:
        facts = f"prompts\n{self._seed}\n{self._repeats}\n{self._pool.limits}\n{digest_of(self._rows)}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def health(self) -> Health | None:
        return self._pool.health()

    def isolation(self) -> str:
        return self._pool.isolation.describe()

    def close(self) -> None:
        self._pool.close()

    def _ordered(self, first: int, count: int) -> Iterator[Row]:
        """``count`` rows from place ``first`` on of all rows in one order, then in another, and so on."""
        order: list[int] = []
        for place in range(first, first + count):
            epoch, index = divmod(place, len(self._rows))
            if index == 0 or not order:
                order = list(range(len(self._rows)))
                seeded("prompts", self._seed, epoch).shuffle(order)
            yield self._rows[order[index]]

    def _has_ended(self, rollout: Rollout) -> bool:
        """By its end token: else there is nothing whole to judge."""
        return not rollout.is_truncated and rollout.answer_ids.tolist()[-1:] == [self._tokenizer.eos_id]

    def _answers(self, row: Row, rollout: Rollout) -> Answers:
        parsed = parse_answer(
            self._tokenizer,
            rollout.answer_ids.tolist()[:-1],
            request_id=row.id,
            starts_in_reasoning=row.starts_in_reasoning,
            parse_tools=row.has_tools,
        )
        return (parsed,)


def _row(asked: Asked) -> Row:
    assert isinstance(asked.judge, Row), "another source asked this"
    return asked.judge


def _scored(row: Row, rollout: Rollout, verdict: Verdict | None) -> Scored:
    if verdict is None:
        return Scored(rollout, 0.0, "unparsable")
    measured = dict(verdict.sub_scores)
    if isinstance(row.verifier, RewardFunction) and "value" in measured:
        measured[row.verifier.function] = measured.pop("value")  # by which its user knows it
    return Scored(rollout, verdict.score, verdict.outcome, measured)
