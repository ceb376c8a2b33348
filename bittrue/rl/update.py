"""The gradient of a step on rollouts, taken only where the trainer computes what the engine sampled."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bittrue.rl.correction import Correction, importance_weights
from bittrue.rl.packing import Packing, Reduction, Totals, reduce
from bittrue.rl.parity import Parity, check, measure
from bittrue.rl.policy_loss import PolicyOptions, entropy, policy_loss, policy_report
from bittrue.rl.replay import document_of, routes_of, rows_of
from bittrue.rl.reports import PolicyReport
from bittrue.rl.types import Rollout
from bittrue.train.loss import LossWeights
from bittrue.train.trainer import StepStats, Trainer


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How a step is made out of advantages. ``parity``: the mode of ``rl.parity.check``. ``entropy``: weight
    of the mean entropy, which is added to the gain."""

    policy: PolicyOptions = PolicyOptions()
    reduction: Reduction = "token_mean"
    correction: Correction | None = None
    parity: str = "exact"
    replays_experts: bool = False
    replays_rows: bool = False
    entropy: float = 0.0
    length: int = 1
    weights: LossWeights = LossWeights(mtp=0.0, index=0.0, balance=0.0)


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What a step found. ``stats`` are the trainer's, of the rollouts as plain text."""

    parity: Parity
    policy: PolicyReport
    entropy: float
    stats: StepStats


class PolicyObjective:
    """The policy's loss of a step's answer tokens, and what was computed for each."""

    def __init__(
        self, rollouts: Sequence[Rollout], advantages: NDArray[np.float64], options: UpdateOptions
    ) -> None:
        """``advantages`` [N]: of every answer token, rollout by rollout."""
        self.behaviour = torch.from_numpy(np.concatenate([r.logprobs for r in rollouts]))
        lengths = [len(r.answer_ids) for r in rollouts]
        self.sequence_ids = torch.from_numpy(np.repeat(np.arange(len(rollouts)), lengths))
        self.advantages = torch.from_numpy(advantages)
        assert self.advantages.shape == self.behaviour.shape, "an advantage for every answer token"
        self.mask = torch.ones_like(self.behaviour, dtype=torch.bool)
        self.recomputed = torch.full_like(self.behaviour, torch.nan)
        self.entropies = torch.zeros_like(self.behaviour, dtype=torch.float64)
        self._options = options
        self.leaves: Sequence[Tensor] = ()
        self.packing = Packing(self.sequence_ids, self.mask, len(rollouts))
        self._totals = Totals.of(self.packing, length=options.length)

    def __call__(self, logprobs: Tensor, logits: Tensor, hidden: Tensor, first: int) -> Tensor:
        here, options = slice(first, first + len(logprobs)), self._options
        self.recomputed[here] = logprobs.detach()
        ids = self.sequence_ids[here] - self.sequence_ids[first]
        packing = Packing(ids, self.mask[here], int(ids[-1]) + 1)
        behaviour = self.behaviour[here]
        weights = None
        if options.correction is not None:
            weights, _ = importance_weights(logprobs.detach(), behaviour, packing, options.correction)
        losses = policy_loss(
            logprobs, behaviour, self.advantages[here], packing, options.policy, weights=weights
        )
        loss = reduce(losses, packing, options.reduction, self._totals)
        spread = entropy(logits if options.entropy else logits.detach())
        self.entropies[here] = spread.detach().double()
        if options.entropy:
            loss = loss - options.entropy * reduce(spread, packing, options.reduction, self._totals)
        return loss


def backward(
    trainer: Trainer, rollouts: Sequence[Rollout], advantages: NDArray[np.float64], options: UpdateOptions
) -> UpdateReport:
    """Adds the gradient of the policy's loss to the masters'. Raises ParityBroken, before anything could be
    stepped with it, where the log-probabilities of this very pass are not the recorded ones as far as
    ``options.parity`` asks."""
    config = trainer.masters.config
    objective = PolicyObjective(rollouts, advantages, options)
    stats = trainer.backward(
        [document_of(rollout) for rollout in rollouts],
        options.weights,
        routes=routes_of(config, rollouts) if options.replays_experts else None,
        rows=rows_of(config, rollouts) if options.replays_rows else None,
        objective=objective,
    )
    parity = measure(
        objective.behaviour.numpy(),
        objective.recomputed.numpy(),
        objective.sequence_ids.numpy(),
        objective.mask.numpy(),
    )
    check(parity, options.parity)
    report = policy_report(
        objective.recomputed, objective.behaviour, objective.advantages, objective.packing, options.policy
    )
    return UpdateReport(parity, report, objective.packing.mean(objective.entropies), stats)
