"""From scored answers to new weights: a function of the weights, the batch and the run file alone.

What a step computes is in here and nowhere else, so a recorded step can be run again (law L10).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bittrue.errors import TrainingFailed
from bittrue.model.export import tensor_bytes
from bittrue.rl.advantage import (
    drop_reasons,
    gae,
    group_report,
    grpo,
    leave_one_out,
    reinforce_pp,
    reinforce_pp_baseline,
    token_rewards,
    whiten,
)
from bittrue.rl.config import PER_TOKEN, WHOLE_BATCH, RlConfig
from bittrue.rl.metrics import StepReports, flatten
from bittrue.rl.parity import Parity, check
from bittrue.rl.records import StepBatch
from bittrue.rl.replay import document_of
from bittrue.rl.teachers import DistillObjective, Teacher, lessons
from bittrue.rl.types import Rollout, Scored
from bittrue.rl.update import Lessons, UpdateReport, backward, packing_of, parity_of
from bittrue.rl.value_head import ValueHead
from bittrue.train.optim import Optimiser, clip_gradients, first_bad_gradient
from bittrue.train.run import optim_settings
from bittrue.train.trainer import Trainer

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judges:
    """What else says how good a token is. ``reference``: the first policy, where the run file weighs the
    distance to it."""

    reference: Trainer | None = None
    teachers: Sequence[Teacher] = ()


class Learner:
    """The trained policy with its optimiser. ``gradient``, then ``step``, is one update."""

    def __init__(self, config: RlConfig, trainer: Trainer, judges: Judges) -> None:
        self.trainer = trainer
        self._config, self._judges = config, judges
        settings = optim_settings(config.optim)
        self._optimiser = Optimiser(trainer.masters.named, settings, spread=trainer.crew.map)
        self._options = config.policy.options(config.rollout.max_tokens)
        if config.loop.staleness:  # of older weights: compared when they came, see ``compare``
            self._options = replace(self._options, parity=None)
        self._value_head = None
        if config.policy.advantage == "gae" and not judges.teachers:
            self._value_head = ValueHead(trainer.masters.config.hidden_size, settings)

    # ---- one update --------------------------------------------------------------------------------------

    def gradient(self, batch: StepBatch) -> dict[str, float]:
        """Puts the gradient of the batch beside the weights; its metrics. Nothing to learn leaves no
        gradient. Raises ParityBroken."""
        for leaf in self.trainer.masters.named.values():
            leaf.grad = None
        if self._judges.teachers:
            return self._distil(batch)
        scored = batch.scored
        scores = scores_of(scored)
        groups = np.repeat(np.arange(len(batch.groups)), [len(group) for group in batch.groups])
        dropped = drop_reasons(scores, groups)
        values = flatten(StepReports(groups=group_report(groups, dropped)))
        if self._config.policy.advantage in WHOLE_BATCH:
            kept = np.flatnonzero(~np.isnan(scores))
        else:
            kept = np.array([i for i, group in enumerate(groups) if int(group) not in dropped], np.int64)
        rollouts = [scored[i].rollout for i in kept]
        if not rollouts:
            return values
        taught = self._lessons(rollouts, scores[kept], groups[kept])
        report = backward(self.trainer, rollouts, taught, self._options, value_head=self._value_head)
        return values | self._values(report)

    def step(self, step: int) -> dict[str, float]:
        """Moves the weights by the gradient at hand, at the rate of ``step``; its metrics. Raises
        TrainingFailed."""
        lr = self._config.optim.lr * (1.0 - step / self._config.run.steps)
        named = self.trainer.masters.named
        if all(leaf.grad is None for leaf in named.values()):
            return {"train/lr": lr}
        norm = clip_gradients(named, self._config.optim.clip)
        if not math.isfinite(norm):
            self._fail(step, first_bad_gradient(named) or "norm")
        self._optimiser.step(lr)
        if self._value_head is not None:
            self._value_head.step(self._config.policy.value_lr)
        self.trainer.publish()
        return {"train/lr": lr, "train/grad_norm": norm}

    def _lessons(self, rollouts: Sequence[Rollout], scores: Vector, groups: NDArray[np.int64]) -> Lessons:
        policy = self._config.policy
        lengths = [len(r.answer_ids) for r in rollouts]
        ids, mask = np.repeat(np.arange(len(rollouts)), lengths), np.ones(sum(lengths), np.bool_)
        reference = None
        if self._judges.reference is not None:
            reference = _answer_logprobs(self._judges.reference, rollouts)
        if policy.advantage not in PER_TOKEN:
            if policy.advantage == "reinforce_pp_baseline":
                return Lessons(reinforce_pp_baseline(scores, groups, ids, mask), reference)
            if policy.advantage == "leave_one_out":
                return Lessons(leave_one_out(scores, groups)[ids], reference)
            return Lessons(grpo(scores, groups, normalise_std=policy.advantage == "grpo")[ids], reference)
        penalties, beta = None, 0.0
        if reference is not None and policy.kl_in == "reward":
            behaviour = np.concatenate([r.logprobs for r in rollouts])
            penalties, beta = behaviour.astype(np.float64) - reference, policy.reference_kl
            reference = None
        rewards = token_rewards(scores, ids, mask, penalties, beta=beta)
        if policy.advantage == "reinforce_pp":
            return Lessons(reinforce_pp(rewards, ids, mask, discount=policy.discount), reference)
        assert self._value_head is not None
        with torch.no_grad():
            hidden = self.trainer.hidden([document_of(rollout) for rollout in rollouts])
            values = self._value_head(hidden).double().numpy()
        advantages, returns = gae(
            rewards, values, ids, mask, discount=policy.discount, decay=policy.gae_decay
        )
        return Lessons(whiten(advantages, mask), reference, returns, values)

    def _values(self, report: UpdateReport) -> dict[str, float]:
        is_compared = self._options.parity is not None
        values = flatten(
            StepReports(
                policy=report.policy,
                correction=report.correction,
                sequence_mask=report.sequence_mask,
                parity=report.parity if is_compared else None,
                routing=report.routing if is_compared else None,
                index=report.index if is_compared else None,
            )
        )
        values |= {"train/loss": report.loss, "train/entropy": report.entropy}
        if report.kl is not None:
            values["train/kl"] = report.kl
        if report.value_loss is not None:
            values["train/value_loss"] = report.value_loss
        return values

    def _distil(self, batch: StepBatch) -> dict[str, float]:
        """The student moves towards its teachers on its own answers; rewards play no part."""
        groups = zip(batch.tasks, batch.groups, strict=True)
        pairs = [(task, each.rollout) for task, group in groups for each in group]
        rollouts, tasks = [rollout for _, rollout in pairs], [task for task, _ in pairs]
        documents = [document_of(rollout) for rollout in rollouts]
        taught = lessons(self._judges.teachers, documents, tasks)
        options = self._options
        objective = DistillObjective(taught, packing_of(rollouts), options.reduction, options.length)
        self.trainer.backward(documents, options.weights, objective=objective)
        values = {"train/loss": objective.loss(), "train/teacher_kl": objective.mean()}
        if options.parity is None:
            return values
        behaviour = torch.from_numpy(np.concatenate([r.logprobs for r in rollouts]))
        parity = parity_of(behaviour, objective.recomputed, objective.packing)
        check(parity, options.parity)
        return values | flatten(StepReports(parity=parity))

    def _fail(self, step: int, name: str) -> None:
        raise TrainingFailed(
            f"step {step}: the gradient of {name} is not finite; checkpoints are kept; lower optim.lr",
            step=step,
            term=name,
        )

    # ---- answers of older weights ------------------------------------------------------------------------

    def compare(self, rollouts: Sequence[Rollout], version: int) -> Parity | None:
        """The tokens that today's weights, policy ``version``, sampled, against what the trainer computes for
        them; None where there are none. Raises ParityBroken."""
        own = [r for r in rollouts if any(span.policy_version == version for span in r.spans)]
        if not own:
            return None
        packing = packing_of(own)
        is_own = np.concatenate([r.policy_versions() == version for r in own])
        packing = replace(packing, mask=torch.from_numpy(is_own))
        behaviour = torch.from_numpy(np.concatenate([r.logprobs for r in own]))
        parity = parity_of(behaviour, torch.from_numpy(_answer_logprobs(self.trainer, own)), packing)
        check(parity, self._config.policy.parity)
        return parity

    # ---- what it holds -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, by name, as views."""
        masters = self.trainer.masters
        parts = {"master": masters.named, "bias": masters.biases, "optim": self._optimiser.state()}
        if self._value_head is not None:
            parts["value"] = dict(self._value_head.state())
        return {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a ``state`` of the same model. Raises CheckpointError naming a tensor."""
        self.trainer.masters.load(_part(state, "master"), _part(state, "bias"))
        self.trainer.publish()
        self._optimiser.load_state(_part(state, "optim"))
        if self._value_head is not None:
            self._value_head.load_state(_part(state, "value"))

    def digest(self) -> str:
        """Of every byte of ``state``: the weights, before they are published, and the optimiser."""
        whole = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.state().items()):
            whole.update(name.encode() + b"\0")
            whole.update(tensor_bytes(tensor.detach()).numpy().tobytes())
        return whole.hexdigest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is published."""
        return self.trainer.masters.tensors()


def _part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    start = f"{part}."
    return {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}


def _answer_logprobs(trainer: Trainer, rollouts: Sequence[Rollout]) -> NDArray[np.float32]:
    """What ``trainer`` gives the answers' tokens, one after the other."""
    found = trainer.logprobs([document_of(rollout) for rollout in rollouts])
    own = [row[len(r.prompt_ids) - 1 :] for row, r in zip(found, rollouts, strict=True)]
    return torch.cat(own).numpy()


def scores_of(scored: Sequence[Scored]) -> Vector:
    """NaN where there is none."""
    return np.array([np.nan if each.score is None else each.score for each in scored])
