"""A synchronous run: sample, score, compare, step, publish; every step on policy, to the bit."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bittrue.engine.engine import Engine
from bittrue.engine.types import SamplingParams
from bittrue.errors import CheckpointError, TrainingFailed
from bittrue.model.publication import Publisher
from bittrue.obs.log import Log
from bittrue.rl.advantage import drop_reasons, group_report, grpo, leave_one_out
from bittrue.rl.config import RlConfig
from bittrue.rl.metrics import StepReports, flatten
from bittrue.rl.problems import Asked, Problems
from bittrue.rl.rollout import Inbox, Sampler
from bittrue.rl.types import Rollout, Scored
from bittrue.rl.update import UpdateReport, backward
from bittrue.train.checkpoint import Checkpoints, Snapshot, check_same
from bittrue.train.metrics import MetricsFile
from bittrue.train.optim import Optimiser, clip_gradients, first_bad_gradient
from bittrue.train.run import optim_settings
from bittrue.train.trainer import Trainer

_COMPARED = ("identity", "config", "threads")


@dataclass(frozen=True, slots=True)
class PolicyParts:
    """What a run is made of. ``model`` is the config.json the policy has, ``held_out`` problems by task."""

    trainer: Trainer
    engine: Engine
    problems: Problems
    held_out: Mapping[str, Problems]
    model: Mapping[str, Any]
    threads: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rollouts a step learns from, and what was measured of all that were sampled."""

    rollouts: Sequence[Rollout]
    advantages: NDArray[np.float64]  # of every answer token
    values: Mapping[str, float]


class PolicyRun:
    """One run in one directory. ``begin`` finds where it stands, ``go`` takes it on."""

    def __init__(self, config: RlConfig, directory: Path, parts: PolicyParts, log: Log) -> None:
        self._config, self._parts, self._log = config, parts, log
        self._checkpoints = Checkpoints(directory, every=config.run.checkpoint_every, keep=config.run.keep)
        trainer = parts.trainer
        settings = optim_settings(config.optim)
        self._optimiser = Optimiser(trainer.masters.named, settings, spread=trainer.crew.map)
        self._publisher = Publisher()
        self._versions: dict[str, int] = {}
        self.step = 0
        self._saved = -1

    # ---- what a run does ---------------------------------------------------------------------------------

    def begin(self, metrics: MetricsFile) -> None:
        """Goes on from the newest good checkpoint, or writes the first. Raises CheckpointError where the
        checkpoints are another run's."""
        self._checkpoints.clean()
        found = self._checkpoints.newest(warn=lambda fact: self._log.warning("checkpoint", problem=fact))
        if found is None:
            if not metrics.is_empty:
                fact = "there are metrics of a run, but no checkpoint; choose another run directory"
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
        settings = self._config.run
        while self.step < settings.steps and not should_stop():
            values = self._one_step()
            metrics.append({"step": self.step - 1, **values})
            tell(values)
            if self.step % settings.checkpoint_every == 0:
                self.save(metrics)
        if self.step != self._saved:
            self.save(metrics)
        return self.step >= settings.steps

    def save(self, metrics: MetricsFile) -> Path:
        """Writes a checkpoint of this moment."""
        metrics.sync()
        masters = self._parts.trainer.masters
        parts = {"master": masters.named, "bias": masters.biases, "optim": self._optimiser.state()}
        tensors = {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}
        facts = {
            "identity": self._config.identity(),
            "config": dict(self._parts.model),
            "threads": self._parts.threads,
        }
        path = self._checkpoints.save(self.step, tensors, facts)
        self._saved = self.step
        return path

    # ---- one step ----------------------------------------------------------------------------------------

    def _one_step(self) -> dict[str, float]:
        begun_s = time.perf_counter()
        num_bytes = self._publish()
        published_s = time.perf_counter()
        values: dict[str, float] = {}
        every = self._config.run.eval_every
        if every and self.step % every == 0:
            values |= self.evaluate()
        sampling_s = time.perf_counter()
        batch = self._sample()
        sampled_s = time.perf_counter()
        lr = self._config.optim.lr * (1.0 - self.step / self._config.run.steps)
        if len(batch.rollouts):
            values |= self._update(batch, lr)
        self.step += 1
        ended_s = time.perf_counter()
        return values | {
            **batch.values,
            "train/lr": lr,
            "perf/sync_seconds": published_s - begun_s,
            "perf/sync_bytes": float(num_bytes),
            "perf/rollout_seconds": sampled_s - sampling_s,
            "perf/train_seconds": ended_s - sampled_s,
        }

    def _publish(self) -> int:
        """Gives the engine the weights of this step; the bytes that took."""
        update = self._publisher.update(
            dict(self._parts.trainer.masters.tensors()), is_delta=bool(self._versions)
        )
        self._parts.engine.update_weights(update)
        self._versions = {update.version: self.step}
        return update.num_bytes

    def _sample(self) -> _Batch:
        """Groups of rollouts with their scores; those that teach nothing are left out."""
        data, rollout = self._config.data, self._config.rollout
        asked = self._parts.problems.of_step(self.step, rollout.prompts)
        params = SamplingParams(max_tokens=rollout.max_tokens, temperature=1.0)
        sampler = Sampler(
            Inbox(self._parts.engine), params, group_size=rollout.group, policy_versions=self._versions
        )
        found = sampler.groups([each.prompt for each in asked], seed=data.seed + self.step)
        scored = [
            each
            for problem, group in zip(asked, found, strict=True)
            for each in self._parts.problems.score(problem, group.rollouts)
        ]
        scores = np.array([np.nan if each.score is None else each.score for each in scored])
        groups = np.repeat(np.arange(len(asked)), rollout.group)
        dropped = drop_reasons(scores, groups)
        advantages = self._advantages(scores, groups)
        kept = [i for i, group in enumerate(groups) if int(group) not in dropped]
        lengths = [len(scored[i].rollout.answer_ids) for i in kept]
        return _Batch(
            [scored[i].rollout for i in kept],
            np.repeat(advantages[kept], lengths),
            {**flatten(StepReports(groups=group_report(groups, dropped))), **_answer_values(scored, scores)},
        )

    def _advantages(self, scores: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
        kind = self._config.policy.advantage
        if kind == "leave_one_out":
            return leave_one_out(scores, groups)
        return grpo(scores, groups, normalise_std=kind == "grpo")

    def _update(self, batch: _Batch, lr: float) -> dict[str, float]:
        trainer = self._parts.trainer
        named = trainer.masters.named
        for leaf in named.values():
            leaf.grad = None
        options = self._config.policy.options(self._config.rollout.max_tokens)
        report = backward(trainer, batch.rollouts, batch.advantages, options)
        norm = clip_gradients(named, self._config.optim.clip)
        if not math.isfinite(norm):
            self._fail(first_bad_gradient(named) or "norm")
        self._optimiser.step(lr)
        trainer.publish()
        return {**_report_values(report), "train/grad_norm": norm, "train/entropy": report.entropy}

    def _fail(self, name: str) -> None:
        raise TrainingFailed(
            f"step {self.step}: the gradient of {name} is not finite; checkpoints are kept; lower optim.lr",
            step=self.step,
            term=name,
        )

    # ---- held out ----------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Share of held-out problems answered right by the weights the engine has, greedily, by task."""
        found = {}
        for name, problems in self._parts.held_out.items():
            asked = problems.of_step(0, self._config.run.eval_problems)
            found[f"eval/{name}/greedy"] = self._share(problems, asked)
        return found

    def _share(self, problems: Problems, asked: Sequence[Asked]) -> float:
        params = SamplingParams(max_tokens=self._config.rollout.max_tokens, temperature=0.0)
        answers = self._parts.engine.generate([each.prompt.token_ids for each in asked], params)
        right = sum(problems.is_right(each.problem, ids) for each, ids in zip(asked, answers, strict=True))
        return right / len(asked)

    # ---- going on ----------------------------------------------------------------------------------------

    def _restore(self, found: Snapshot) -> None:
        other = "choose another directory, or the run file it was begun with"
        now = {
            "identity": self._config.identity(),
            "config": dict(self._parts.model),
            "threads": {"threads": self._parts.threads},
        }
        for name in _COMPARED:
            if name not in found.facts:
                raise CheckpointError(f"{found.path} lacks {name!r}; {other}", file=str(found.path))
            saved = found.facts[name] if name != "threads" else {"threads": found.facts[name]}
            check_same(found.path, saved, now[name], what=name, remedy=other)
        self._parts.trainer.masters.load(found.part("master"), found.part("bias"))
        self._parts.trainer.publish()
        self._optimiser.load_state(found.part("optim"))
        self.step = self._saved = found.step


def _report_values(report: UpdateReport) -> dict[str, float]:
    return flatten(StepReports(policy=report.policy, parity=report.parity))


def _answer_values(scored: Sequence[Scored], scores: NDArray[np.float64]) -> dict[str, float]:
    lengths = np.array([len(each.rollout.answer_ids) for each in scored])
    outcomes = [each.outcome for each in scored]
    values = {
        "reward/mean": float(np.nanmean(scores)),
        "reward/std": float(np.nanstd(scores)),
        "rollout/response_length/mean": float(lengths.mean()),
        "rollout/response_length/max": float(lengths.max()),
        "rollout/truncated_ratio": float(np.mean([each.rollout.is_truncated for each in scored])),
    }
    return values | {f"verifier/{name}": float(outcomes.count(name)) for name in sorted(set(outcomes))}
