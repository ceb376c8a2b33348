"""A run: publish, sample, score, compare, step; on policy to the bit, or off it by a bounded distance.

sync: a step's answers are sampled by its own weights. pipelined: while the gradient of a step is computed,
the answers of the step ``staleness`` later are sampled; all of them are there before the weights move. async:
the weights move when their batch is learned, whatever is under way; nobody waits for more than that batch.
"""

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittrue.errors import CheckpointError
from bittrue.model.publication import Publisher
from bittrue.obs.log import Log
from bittrue.rl.config import RlConfig
from bittrue.rl.learner import Learner
from bittrue.rl.measures import answer_values, engine_values, outcome_counts, verifier_values
from bittrue.rl.metrics import StepReports, flatten
from bittrue.rl.pipeline import Pipeline
from bittrue.rl.records import Records, StepBatch, prompts_digest
from bittrue.rl.rollout import RolloutEngine
from bittrue.rl.run_files import STEPS_FILE
from bittrue.rl.source import Source
from bittrue.rl.types import Rollout
from bittrue.train.checkpoint import Checkpoints, Snapshot, check_same
from bittrue.train.metrics import MetricsFile, read_metrics


@dataclass(frozen=True, slots=True)
class PolicyParts:
    """What a run is made of. ``model`` is the config.json the policy has, ``held_out`` prompts by task."""

    learner: Learner
    engine: RolloutEngine
    source: Source
    held_out: Mapping[str, Source]
    model: Mapping[str, Any]
    threads: int


class PolicyRun:
    """One run in one directory. ``begin`` finds where it stands, ``go`` takes it on."""

    def __init__(self, config: RlConfig, directory: Path, parts: PolicyParts, log: Log) -> None:
        self._config, self._parts, self._log = config, parts, log
        self._directory = directory
        self._checkpoints = checkpoints_of(config, directory)
        self._records = Records(directory)
        self._publisher = Publisher()
        # Weights that tokens under way may be of, and the number each has: of the step it was made for. One
        # name may have had several, where a step taught nothing; then the last counts.
        self._versions: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._version = ""
        self._ahead: list[Rollout] = []  # on record, with tokens of weights that are still to come
        self.step = 0
        self._saved = -1

    # ---- what a run does ---------------------------------------------------------------------------------

    def begin(self, metrics: MetricsFile) -> None:
        """Goes on from the newest good checkpoint, or writes the first. Raises CheckpointError where the
        checkpoints are another run's, or lost."""
        self._checkpoints.clean()
        found = self._checkpoints.newest(warn=lambda fact: self._log.warning("checkpoint", problem=fact))
        if found is None:
            if not metrics.is_empty or not self._records.is_empty:
                what = "records" if metrics.is_empty else "metrics"
                fact = f"there are {what} of a run, but no checkpoint; choose another run directory"
                raise CheckpointError(f"{metrics.path.parent}: {fact}", file=str(metrics.path))
            self.save(metrics)
            return
        self._restore(found)
        metrics.cut(self.step)
        self._log.info("resumed", step=self.step, checkpoint=found.path)

    def go(
        self,
        metrics: MetricsFile,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        tell: Callable[[Mapping[str, float]], None] = lambda values: None,
    ) -> bool:
        """Trains to the last step, or until ``should_stop``; a checkpoint is written at the end of either.
        Whether the last step was reached. Raises ParityBroken, TrainingFailed."""
        settings, parts = self._config.run, self._parts
        with MetricsFile(self._directory / STEPS_FILE) as steps:
            steps.cut(self.step)
            self._names = {line["step"]: line["weights_before"] for line in read_metrics(steps.path)}
            self._publish()
            pipeline = Pipeline(
                self._config, parts.engine, parts.source, self._records, self._versions, first=self.step
            )
            while self.step < settings.steps and not should_stop():
                values, facts = self._one_step(pipeline)
                metrics.append({"step": self.step - 1, **values})
                steps.append(facts)
                tell(values)
                if self.step % settings.checkpoint_every == 0:
                    steps.sync()
                    self.save(metrics)
            steps.sync()
        if self.step != self._saved:
            self.save(metrics)
        is_finished = self.step >= settings.steps
        if is_finished and settings.eval_every:
            metrics.append({"step": self.step, **self._evaluate(pipeline)})
        return is_finished

    def save(self, metrics: MetricsFile) -> Path:
        """Writes a checkpoint of this moment."""
        metrics.sync()
        path = self._checkpoints.save(self.step, self._parts.learner.state(), self._facts())
        self._saved = self.step
        return path

    # ---- one step ----------------------------------------------------------------------------------------

    def _one_step(self, pipeline: Pipeline) -> tuple[dict[str, float], dict[str, Any]]:
        loop, learner = self._config.loop, self._parts.learner
        begun_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        clock = _Clock()
        pipeline.ask(self.step + loop.staleness)
        values = self._evaluate(pipeline) if self._is_due() else {}
        clock.lap("eval")
        before, restarts = self._parts.engine.stats(), self._restarts()
        depth = pipeline.depth
        batch = pipeline.take(self.step)
        self._check_versions(batch)
        clock.lap("rollout")
        values |= {"rollout/queue_depth": float(depth), **answer_values(batch, self.step)}
        values |= learner.gradient(batch)
        clock.lap("train")
        if loop.kind == "pipelined":
            pipeline.finish()
        elif loop.kind == "async":
            pipeline.poll()
        clock.lap("rollout")
        if self._restarts() == restarts:  # another process counts from 0
            values |= engine_values(before, self._parts.engine.stats())
        values |= verifier_values(self._parts.source.health())
        values |= self._compare(pipeline)
        values |= learner.step(self.step)
        clock.lap("train")
        facts = self._facts_of(batch, begun_at)
        self.step += 1
        values["perf/sync_bytes"] = float(self._publish())
        clock.lap("sync")
        facts |= {"weights_after": self._version, "masters_after": learner.digest(), "seconds": clock.total()}
        num_tokens = sum(len(rollout.answer_ids) for rollout in batch.rollouts)
        values |= clock.values() | {"perf/tokens_per_second": num_tokens / clock.total()}
        return values, facts

    def _is_due(self) -> bool:
        every = self._config.run.eval_every
        return every > 0 and self.step % every == 0

    def _publish(self) -> int:
        """Gives the engine the weights of this step; the bytes that took."""
        learner, loop = self._parts.learner, self._config.loop
        update = self._publisher.update(dict(learner.tensors()), is_delta=bool(self._version))
        self._versions[update.version] = self.step
        self._names[self.step] = self._version = update.version
        oldest = self.step - loop.staleness  # what was asked before is taken
        for name in [name for name, number in self._versions.items() if number < oldest]:
            del self._versions[name]
        self._names = {number: name for number, name in self._names.items() if number >= oldest}
        self._parts.engine.update_weights(update, running=loop.running)
        return update.num_bytes

    def _compare(self, pipeline: Pipeline) -> dict[str, float]:
        """What came since the weights changed, while they have not changed again: on policy the gradient's
        own pass compares it."""
        loop = self._config.loop
        if not loop.staleness:
            return {}
        came = self._ahead + pipeline.arrivals()
        self._ahead = [r for r in came if any(span.policy_version > self.step for span in r.spans)]
        if loop.running == "in_place":  # an answer that went on over rows of older weights is of no version
            came = [rollout for rollout in came if len(rollout.spans) == 1]
        return flatten(StepReports(parity=self._parts.learner.compare(came, self.step)))

    def _check_versions(self, batch: StepBatch) -> None:
        """Raises CheckpointError where answers are of weights that this run has not had, or of too old
        ones: their record is of another course of it."""
        oldest = self.step - self._config.loop.staleness
        for number in {int(n) for rollout in batch.rollouts for n in rollout.policy_versions()}:
            name = batch.versions.get(number)
            if not oldest <= number <= self.step or name is None or name != self._names.get(number):
                path = self._records.path(self.step)
                fact = f"{path} has answers of weights {name} as version {number}, which this run had not"
                raise CheckpointError(
                    f"{fact}; remove the records of step {self.step} and later, and they are sampled again",
                    file=str(path),
                )

    def _facts_of(self, batch: StepBatch, begun_at: str) -> dict[str, Any]:
        """The line of steps.jsonl, but for what the update makes."""
        return {
            "step": self.step,
            "begun_at": begun_at,
            "weights_before": self._version,
            "prompts": prompts_digest([group[0].rollout.prompt_ids.tolist() for group in batch.groups]),
            "record": batch.digest,
            "outcomes": outcome_counts(batch.scored),
            "versions": {name: number for number, name in batch.versions.items()},
            "engine_restarts": self._restarts(),
        }

    def _restarts(self) -> int:
        """Of engines in processes of their own, in this sitting."""
        return int(getattr(self._parts.engine, "restarts", 0))

    def _evaluate(self, pipeline: Pipeline) -> dict[str, float]:
        """What the weights the engine has can do on held-out prompts."""
        values: dict[str, float] = {}
        for name, source in self._parts.held_out.items():
            values |= pipeline.measure(name, source)
        return values

    # ---- going on ----------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return {
            "identity": self._config.identity(),
            "config": dict(self._parts.model),
            "threads": self._parts.threads,
            "source": self._parts.source.digest(),
        }

    def _restore(self, found: Snapshot) -> None:
        check_snapshot(found, self._facts())
        self._parts.learner.load_state(found.tensors)
        self.step = self._saved = found.step


class _Clock:
    """Seconds of a step by what they went into."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What went by since the last lap was ``name``."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def values(self) -> dict[str, float]:
        return {f"perf/{name}_seconds": seconds for name, seconds in self._laps.items()}

    def total(self) -> float:
        """Without what was spent on measuring."""
        return sum(seconds for name, seconds in self._laps.items() if name != "eval")


def checkpoints_of(config: RlConfig, directory: Path) -> Checkpoints:
    """Those of a run. The first stays: every step can be run again from it and the records."""
    return Checkpoints(directory, every=config.run.checkpoint_every, keep=config.run.keep, keeps_first=True)


def check_snapshot(found: Snapshot, present: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a checkpoint is of another run than one with the ``present`` facts."""
    other = "choose another directory, or the run file and the prompts it was begun with"
    for name in present:
        if name not in found.facts:
            raise CheckpointError(f"{found.path} lacks {name!r}; {other}", file=str(found.path))
        saved, now = found.facts[name], present[name]
        remedy = f"set run.threads = {saved}" if name == "threads" else other
        if not isinstance(saved, Mapping):
            saved, now = {name: saved}, {name: now}
        check_same(found.path, saved, now, what=name, remedy=remedy)
