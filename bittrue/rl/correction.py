"""Corrections for tokens that another policy sampled than the one trained: weights on their losses.

``trained`` are log-probabilities the trainer computes, ``behaviour`` those the engine sampled from, [N]; the
ratio of a token is exp(trained - behaviour). Weights [N] f64 change what a loss sums, never what it is
divided by: a rejected token teaches nothing, and the others count as before.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bittrue.errors import ConfigError
from bittrue.rl.packing import MAX_LOG_RATIO, Packing
from bittrue.rl.reports import CorrectionReport

# The ratio that is bounded: a token's, the product or the geometric mean of a sequence's.
RatioLevel = Literal["token", "sequence", "geometric"]

# A token the trained policy finds this much less likely than the sampling one comes from something broken.
CATASTROPHIC_RATIO = 1e-4


@dataclass(frozen=True, slots=True)
class Correction:
    """What happens to ratios outside [low, high]: ``truncate`` moves them to the bound, ``mask`` gives weight
    0. ``veto``: a sequence with any token's ratio below it has weight 0; None = none."""

    bound: Literal["truncate", "mask"]
    level: RatioLevel = "token"
    low: float = 0.0
    high: float = 2.0
    veto: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.low <= self.high or self.high <= 0.0:
            raise ConfigError(
                f"a correction keeps ratios of {self.low} to {self.high}; choose 0 <= low <= high, 0 < high",
                field="high",
            )


# By the names they were published under: Yao et al. 2025, "Your efficient RL framework secretly brings you
# off-policy RL training"; Liu et al. 2025, "When speed kills stability"; Ling team, arXiv 2510.18855.
TIS = Correction("truncate", high=2.0)
MIS = Correction("mask", level="sequence", high=2.0)
ICEPOP = Correction("mask", low=0.5, high=5.0)


@torch.no_grad()
def importance_weights(
    trained: Tensor, behaviour: Tensor, packing: Packing, correction: Correction
) -> tuple[Tensor, CorrectionReport]:
    """Weights of the tokens, 0 outside the mask, and what became of the ratios."""
    mask = packing.mask
    log_ratio = packing.log_ratio(trained, behaviour)
    token_ratio = _exp(log_ratio)
    ratio = token_ratio
    if correction.level != "token":
        joined = packing.sums(log_ratio) if correction.level == "sequence" else packing.means(log_ratio)
        ratio = _exp(joined)[packing.sequence_ids]
    is_outside = mask & ((ratio < correction.low) | (ratio > correction.high))
    is_masked = torch.zeros_like(mask)
    weights = ratio.clamp(correction.low, correction.high)
    if correction.bound == "mask":
        is_masked = is_outside
        weights = torch.where(is_masked, 0.0, ratio)
    vetoed = torch.zeros(packing.num_sequences, dtype=torch.bool, device=mask.device)
    if correction.veto is not None:
        vetoed = packing.sums((token_ratio < correction.veto).double()) > 0.0
        is_masked = is_masked | (vetoed[packing.sequence_ids] & mask)
    weights = packing.keep(torch.where(is_masked, 0.0, weights))
    return weights, _report(packing, weights, (ratio, token_ratio), is_outside, (is_masked, vetoed))


@torch.no_grad()
def off_policy_mask(
    trained: Tensor, behaviour: Tensor, advantages: Tensor, packing: Packing, *, max_kl: float = 1e-4
) -> tuple[Tensor, CorrectionReport]:
    """Weight 0 for every token of a sequence whose mean advantage is negative and whose mean of
    log behaviour - log trained exceeds ``max_kl`` nats a token, else 1: off-policy sequence masking of
    DeepSeek-V3.2 (section 3.1)."""
    log_ratio = packing.log_ratio(trained, behaviour)
    is_far = (packing.means(advantages) < 0.0) & (-packing.means(log_ratio) > max_kl)
    is_masked = is_far[packing.sequence_ids] & packing.mask
    weights = packing.keep(torch.where(is_masked, 0.0, 1.0))
    ratio = _exp(log_ratio)
    nothing = torch.zeros_like(packing.mask)
    return weights, _report(packing, weights, (ratio, ratio), nothing, (is_masked, is_far))


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _report(
    packing: Packing,
    weights: Tensor,
    ratios: tuple[Tensor, Tensor],
    outside: Tensor,
    masked: tuple[Tensor, Tensor],
) -> CorrectionReport:
    """``ratios``: what was bounded, and each token's. ``masked``: tokens, and sequences rejected whole."""
    bounded, of_tokens = ratios
    tokens, sequences = masked
    chosen = bounded[packing.mask]
    ends = (float(chosen.min()), float(chosen.max())) if len(chosen) else (1.0, 1.0)
    square_of_sum, sum_of_squares = float(weights.sum()) ** 2, float(weights.square().sum())
    lengths = packing.lengths()
    return CorrectionReport(
        ratio_mean=packing.mean(bounded),
        ratio_min=ends[0],
        ratio_max=ends[1],
        ess=square_of_sum / (max(len(chosen), 1) * sum_of_squares) if sum_of_squares else 0.0,
        clipped=packing.mean(outside & ~tokens),
        masked=packing.mean(tokens),
        vetoed=float(sequences.sum()) / max(int((lengths > 0).sum()), 1),
        catastrophic=packing.mean(of_tokens < CATASTROPHIC_RATIO),
    )
