"""Batches of scored answers: asked as far ahead as the loop allows, taken in the order they were asked.

In that order nothing favours short answers: a batch waits for its last one, whatever came before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bittrue.engine.types import SamplingParams
from bittrue.rl.advantage import drop_reasons
from bittrue.rl.config import RlConfig
from bittrue.rl.learner import scores_of
from bittrue.rl.measures import held_out_values
from bittrue.rl.records import Records, StepBatch
from bittrue.rl.rollout import Inbox, RolloutEngine, Sampler
from bittrue.rl.source import Asked, Source
from bittrue.rl.types import Group, Rollout, Scored


@dataclass(slots=True)
class _Open:
    """A batch under way: what was asked, the groups that have come, by key, and the weights that sampled
    them, by policy version."""

    asked: list[Asked]
    groups: dict[str, Group] = field(default_factory=dict)
    versions: dict[int, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[Asked]:
        return [each for each in self.asked if each.prompt.key not in self.groups]


class Pipeline:
    """``versions``: number of each weight version the engine may have; the loop keeps it."""

    def __init__(
        self,
        config: RlConfig,
        engine: RolloutEngine,
        source: Source,
        records: Records,
        versions: Mapping[str, int],
        *,
        first: int,
    ) -> None:
        """``first``: the step whose batch is the next to take."""
        self._config, self._source, self._records, self._versions = config, source, records, versions
        self._inbox = Inbox(engine)
        self._sampler = self._sampler_of(1.0, config.rollout.group)
        self._open: dict[int, _Open] = {}
        self._arrived: list[Rollout] = []
        self._asked = self._done = first  # batches before are asked for, are taken

    # ---- training ----------------------------------------------------------------------------------------

    def ask(self, last: int) -> None:
        """Asks for the batches up to that of step ``last``, but those on record and under way."""
        end = min(last + 1, self._config.run.steps)
        for step in range(self._asked, end):
            if not self._records.has(step):
                self._begin(step, self._source.of_step(step, self._config.rollout.prompts))
            elif self._config.loop.staleness:  # the run may have ended before they were compared
                self._arrived += self._records.read(step).rollouts
        self._asked = max(self._asked, end)

    def take(self, step: int) -> StepBatch:
        """The batch of a step that was asked, waiting for it: scored and on record."""
        if not self._records.has(step):
            self._close(step)
        self._done = step + 1
        return self._records.read(step)

    def finish(self) -> None:
        """Waits for everything under way, and puts it on record."""
        for step in sorted(self._open):
            self._close(step)

    def poll(self) -> None:
        """Takes in what has come without waiting."""
        self._inbox.poll()
        for step in sorted(self._open):
            self._gather(self._open[step])
            if not self._open[step].missing:
                self._close(step)

    def arrivals(self) -> list[Rollout]:
        """The answers that came whole, or were found on record, since this was last asked: where batches are
        asked ahead; on policy none."""
        found, self._arrived = self._arrived, []
        return found

    @property
    def depth(self) -> int:
        """Groups that have come, or are on record, and wait to be trained on."""
        waiting = sum(len(batch.groups) for batch in self._open.values())
        ahead = range(self._done, self._done + self._config.loop.staleness + 1)
        return waiting + sum(self._records.has(step) for step in ahead) * self._config.rollout.prompts

    def _begin(self, step: int, asked: Sequence[Asked]) -> None:
        batch = self._open.setdefault(step, _Open([]))
        batch.asked += asked
        self._sampler.ask([each.prompt for each in asked], seed=self._config.data.seed + step)

    def _gather(self, batch: _Open) -> None:
        for each in batch.missing:
            if self._sampler.is_done(each.prompt):
                self._take(batch, each)

    def _take(self, batch: _Open, asked: Asked) -> None:
        group = batch.groups[asked.prompt.key] = self._sampler.take(asked.prompt)
        numbers = {int(n) for rollout in group.rollouts for n in rollout.policy_versions()}
        batch.versions |= {n: name for name, n in self._versions.items() if n in numbers}
        if self._config.loop.staleness:
            self._arrived += group.rollouts

    def _close(self, step: int) -> None:
        """Waits for a batch, scores it and writes its record."""
        batch, settings = self._open[step], self._config.rollout
        groups = self._scored(batch)
        for number in range(1, settings.refill + 1):
            lacking = settings.prompts - sum(_teaches(group) for group in groups)
            if lacking <= 0:
                break
            # Of a step that the run does not reach: problems no other step has; of a file, any rows again.
            self._begin(step, self._source.of_step(step + number * self._config.run.steps, lacking))
            groups = self._scored(batch)
        del self._open[step]
        tasks = tuple(each.task for each in batch.asked)
        found = tuple(tuple(group) for group in groups)
        self._records.write(StepBatch(step, tasks, found, dict(sorted(batch.versions.items()))))

    def _scored(self, batch: _Open) -> list[list[Scored]]:
        for each in batch.missing:
            self._take(batch, each)
        return self._source.score([(each, batch.groups[each.prompt.key].rollouts) for each in batch.asked])

    # ---- held out ----------------------------------------------------------------------------------------

    def measure(self, task: str, source: Source) -> dict[str, float]:
        """Shares of held-out prompts that the weights the engine has solve."""
        settings = self._config.run
        asked = source.of_step(0, settings.eval_problems)
        greedy = self._answers(f"greedy/{task}", asked, self._sampler_of(0.0, 1))
        sampled: list[list[Scored]] = []
        if settings.eval_samples:
            groups = self._answers(f"sampled/{task}", asked, self._sampler_of(1.0, settings.eval_samples))
            sampled = source.score(groups)
        return held_out_values(task, [group[0] for group in source.score(greedy)], sampled)

    def _answers(
        self, prefix: str, asked: Sequence[Asked], sampler: Sampler
    ) -> list[tuple[Asked, tuple[Rollout, ...]]]:
        prompts = [replace(each.prompt, key=f"{prefix}/{each.prompt.key}") for each in asked]
        groups = sampler.groups(prompts, seed=self._config.data.seed)
        return [(each, group.rollouts) for each, group in zip(asked, groups, strict=True)]

    def _sampler_of(self, temperature: float, group_size: int) -> Sampler:
        params = SamplingParams(max_tokens=self._config.rollout.max_tokens, temperature=temperature)
        return Sampler(self._inbox, params, group_size=group_size, policy_versions=self._versions)


def _teaches(group: Sequence[Scored]) -> bool:
    scores = scores_of(group)
    return not drop_reasons(scores, np.zeros(len(scores), np.int64))
