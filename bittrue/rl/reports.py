"""What the steps of an RL update measured, as plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupReport:
    """How many groups of rollouts can teach something. ``drops`` counts groups by drop reason; the shares
    are of all groups."""

    num_groups: int
    drops: Mapping[str, int]
    zero_spread: float
    all_zero: float
    all_one: float


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """Where a policy loss was clipped. The ratio is that of the objective: of tokens or of sequences. Shares
    are of trainable tokens; ``kl`` in nats a token, k1 of the sampling policy from the trained one."""

    ratio_mean: float
    ratio_min: float
    ratio_max: float
    clip_low: float
    clip_high: float
    clip_dual: float
    kl: float


@dataclass(frozen=True, slots=True)
class CorrectionReport:
    """What a correction for off-policy tokens did. ``ratio_*``: before any bound. ``ess``: effective share
    of the trainable tokens under the final weights. ``clipped``, ``masked``, ``catastrophic``: shares of
    trainable tokens; ``vetoed``: share of sequences."""

    ratio_mean: float
    ratio_min: float
    ratio_max: float
    ess: float
    clipped: float
    masked: float
    vetoed: float
    catastrophic: float
