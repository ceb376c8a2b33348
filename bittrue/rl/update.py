"""The gradient of a step on rollouts, taken only where the trainer computes what the engine sampled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bittrue.rl.correction import Correction, importance_weights, off_policy_mask
from bittrue.rl.packing import Packing, Reduction, Totals, reduce
from bittrue.rl.parity import Parity, Selection, check, measure
from bittrue.rl.policy_loss import (
    KLEstimate,
    PolicyOptions,
    entropy,
    policy_loss,
    policy_report,
    reference_kl,
    value_loss,
)
from bittrue.rl.replay import document_of, routes_of, rows_of, selections_of
from bittrue.rl.reports import CorrectionReport, PolicyReport
from bittrue.rl.types import Rollout
from bittrue.rl.value_head import ValueHead
from bittrue.train.loss import LossWeights
from bittrue.train.trainer import Choice, StepStats, Trainer

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How a step is made out of advantages.

    ``correction``: weights of off-policy tokens. With one, the ratio of the policy loss is that of this
    update's policy to the one it began with, which is 1: the distance to the policy that sampled is in the
    weights alone (decoupled PPO, arXiv 2110.00641). ``max_kl``: off-policy sequence masking. ``parity``: the
    mode of ``rl.parity.check``; None = the answers are of older weights, nothing can be compared here.
    ``entropy``: weight of the mean entropy, which is added to the gain. ``reference_kl``: weight of the
    distance to a reference; ``value``: weight of the value head's loss.
    """

    policy: PolicyOptions = PolicyOptions()
    reduction: Reduction = "token_mean"
    correction: Correction | None = None
    max_kl: float | None = None
    parity: str | None = "exact"
    replays_experts: bool = False
    replays_rows: bool = False
    entropy: float = 0.0
    reference_kl: float = 0.0
    kl_estimate: KLEstimate = "k3"
    value: float = 1.0
    length: int = 1
    weights: LossWeights = LossWeights(mtp=0.0, index=0.0, balance=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Lessons:
    """What every answer token is to learn, rollout by rollout, [N] each: its advantage; what the reference
    gives it (f32); the return its value is to become, and the value it had."""

    advantages: Vector
    reference: NDArray[np.float32] | None = None
    returns: Vector | None = None
    old_values: Vector | None = None


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What a step found. ``stats`` are the trainer's, of the rollouts as plain text; ``routing``, ``index``
    compare the record with what this pass chose, where it chose freely and with the weights that sampled."""

    parity: Parity
    policy: PolicyReport
    correction: CorrectionReport | None
    sequence_mask: CorrectionReport | None
    routing: Selection | None
    index: Selection | None
    entropy: float
    kl: float | None
    loss: float
    value_loss: float | None
    stats: StepStats


class PolicyObjective:
    """The policy's loss of a step's answer tokens, and what was computed for each."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        lessons: Lessons,
        options: UpdateOptions,
        value_head: ValueHead | None = None,
    ) -> None:
        self.behaviour = torch.from_numpy(np.concatenate([r.logprobs for r in rollouts]))
        self.packing = packing_of(rollouts)
        self.advantages = torch.from_numpy(lessons.advantages)
        assert self.advantages.shape == self.behaviour.shape, "an advantage for every answer token"
        self.recomputed = torch.full_like(self.behaviour, torch.nan)
        # Of each token, as they went into the loss: policy, entropy, distance to the reference, value.
        self.parts = torch.zeros(4, len(self.behaviour), dtype=torch.float64)
        self.leaves: Sequence[Tensor] = () if value_head is None else value_head.leaves
        self._reference = None if lessons.reference is None else torch.from_numpy(lessons.reference)
        self._returns = None if lessons.returns is None else torch.from_numpy(lessons.returns)
        self._old_values = None if lessons.old_values is None else torch.from_numpy(lessons.old_values)
        self._options, self._value_head = options, value_head
        self._totals = Totals.of(self.packing, length=options.length)

    def __call__(self, logprobs: Tensor, logits: Tensor, hidden: Tensor, first: int) -> Tensor:
        here, options = slice(first, first + len(logprobs)), self._options
        self.recomputed[here] = logprobs.detach()
        ids = self.packing.sequence_ids[here] - self.packing.sequence_ids[first]
        packing = Packing(ids, self.packing.mask[here], int(ids[-1]) + 1)
        behaviour, advantages = self.behaviour[here], self.advantages[here]
        weights, _, _ = corrected(logprobs.detach(), behaviour, advantages, packing, options)
        before = behaviour if options.correction is None else logprobs.detach()
        losses = policy_loss(logprobs, before, advantages, packing, options.policy, weights=weights)
        spread = entropy(logits if options.entropy else logits.detach())
        terms = [(0, losses, 1.0), (1, spread, -options.entropy)]
        if self._reference is not None:
            apart = reference_kl(logprobs, self._reference[here], packing, estimate=options.kl_estimate)
            terms.append((2, apart, options.reference_kl))
        if self._value_head is not None:
            assert self._returns is not None and self._old_values is not None
            values = self._value_head(hidden)
            missed = value_loss(values, self._old_values[here], self._returns[here], packing)
            terms.append((3, missed, options.value))
        total = torch.zeros((), dtype=torch.float64)
        for row, values, weight in terms:
            self.parts[row, here] = values.detach().double()
            if weight:
                total = total + weight * reduce(values, packing, options.reduction, self._totals)
        return total

    def loss(self) -> float:
        """Of the whole step, as it was minimised."""
        options = self._options
        of_value = options.value if self._value_head is not None else 0.0
        weights = (1.0, -options.entropy, options.reference_kl, of_value)
        parts = zip(self.parts, weights, strict=True)
        reduced = [w * reduce(part, self.packing, options.reduction, self._totals) for part, w in parts]
        return float(torch.stack(reduced).sum())

    def mean(self, part: int) -> float:
        return self.packing.mean(self.parts[part])

    def corrections(self) -> tuple[CorrectionReport | None, CorrectionReport | None]:
        """What was done to the weights of the whole step."""
        found = corrected(self.recomputed, self.behaviour, self.advantages, self.packing, self._options)
        return found[1], found[2]

    def policy_report(self) -> PolicyReport:
        options = self._options
        before = self.behaviour if options.correction is None else self.recomputed
        report = policy_report(self.recomputed, before, self.advantages, self.packing, options.policy)
        apart = -self.packing.log_ratio(self.recomputed, self.behaviour)
        return replace(report, kl=self.packing.mean(apart))


def packing_of(rollouts: Sequence[Rollout]) -> Packing:
    """Every answer token of the rollouts, in order; all are learned from."""
    lengths = [len(r.answer_ids) for r in rollouts]
    ids = torch.from_numpy(np.repeat(np.arange(len(rollouts)), lengths))
    return Packing(ids, torch.ones(len(ids), dtype=torch.bool), len(rollouts))


def corrected(
    trained: Tensor, behaviour: Tensor, advantages: Tensor, packing: Packing, options: UpdateOptions
) -> tuple[Tensor | None, CorrectionReport | None, CorrectionReport | None]:
    """Weights of the tokens, and what the correction and the sequence mask did."""
    weights = correction = masked = None
    if options.correction is not None:
        weights, correction = importance_weights(trained, behaviour, packing, options.correction)
    if options.max_kl is not None:
        kept, masked = off_policy_mask(trained, behaviour, advantages, packing, max_kl=options.max_kl)
        weights = kept if weights is None else weights * kept
    return weights, correction, masked


def backward(
    trainer: Trainer,
    rollouts: Sequence[Rollout],
    lessons: Lessons,
    options: UpdateOptions,
    *,
    value_head: ValueHead | None = None,
) -> UpdateReport:
    """Adds the gradient of the policy's loss to the masters'. Raises ParityBroken, before anything could be
    stepped with it, where the log-probabilities of this very pass are not the recorded ones as far as
    ``options.parity`` asks."""
    config = trainer.masters.config
    objective = PolicyObjective(rollouts, lessons, options, value_head)
    stats = trainer.backward(
        [document_of(rollout) for rollout in rollouts],
        options.weights,
        routes=routes_of(config, rollouts) if options.replays_experts else None,
        rows=rows_of(config, rollouts) if options.replays_rows else None,
        objective=objective,
        keeps_choices=options.parity is not None,
    )
    parity = parity_of(objective.behaviour, objective.recomputed, objective.packing)
    routing = index = None
    if options.parity is not None:
        check(parity, options.parity)
        chosen = Choice.joined(stats.choices)
        routing, index = selections_of(config, rollouts, chosen.routes, chosen.rows)
    correction, masked = objective.corrections()
    return UpdateReport(
        parity=parity,
        policy=objective.policy_report(),
        correction=correction,
        sequence_mask=masked,
        routing=None if options.replays_experts else routing,
        index=None if options.replays_rows else index,
        entropy=objective.mean(1),
        kl=None if lessons.reference is None else objective.mean(2),
        loss=objective.loss(),
        value_loss=None if value_head is None else objective.mean(3),
        stats=stats,
    )


def parity_of(recorded: Tensor, recomputed: Tensor, packing: Packing) -> Parity:
    return measure(recorded.numpy(), recomputed.numpy(), packing.sequence_ids.numpy(), packing.mask.numpy())
