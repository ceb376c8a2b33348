"""Losses of an RL update, one value a packed token: policy, value head, entropy, distance to a reference.

``logprobs`` are what the gradient flows through; ``behaviour`` are those of the policy that sampled. All [N].
``packing.reduce`` makes them one number.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bittrue.errors import ConfigError
from bittrue.rl.packing import MAX_LOG_RATIO, Packing
from bittrue.rl.reports import PolicyReport

# clipped: PPO's and GRPO's surrogate, a ratio a token; gspo: the same with a ratio a sequence; reinforce: no
# ratio.
Objective = Literal["clipped", "gspo", "reinforce"]
KLEstimate = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """The ratio may move within [1 - clip_low, 1 + clip_high]. ``clip_dual``: the largest ratio that counts
    where the advantage is negative; None = none."""

    objective: Objective = "clipped"
    clip_low: float = 0.2
    clip_high: float = 0.28
    clip_dual: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.clip_low <= 1.0:
            raise ConfigError(f"clip_low is {self.clip_low}; choose 0 to 1", field="clip_low")
        if not self.clip_high >= 0.0:
            raise ConfigError(f"clip_high is {self.clip_high}; choose 0 or more", field="clip_high")
        if self.clip_dual is not None and not self.clip_dual > 1.0:
            raise ConfigError(f"clip_dual is {self.clip_dual}; choose more than 1", field="clip_dual")


def policy_loss(
    logprobs: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    packing: Packing,
    options: PolicyOptions,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """Loss of each token, [N] f64. ``weights`` [N]: what a correction gave; they get no gradient.

    clipped: -min(r A, clip(r, 1 - low, 1 + high) A), r = exp(new - old). PPO (arXiv 1707.06347) eq. 7 with
    DAPO's two bounds (arXiv 2503.14476, eq. 10); where A < 0, at most -c A: dual clip (arXiv 1912.09729).
    gspo: r = exp(mean over the sequence of new - old), GSPO (arXiv 2507.18071) eq. 5 and 7, for advantages
    that are one number a sequence. reinforce: -A new, Williams 1992.
    """
    kept = packing.keep(advantages)
    if options.objective == "reinforce":
        loss = -kept * packing.keep(logprobs)
    else:
        ratio = _ratio(logprobs, behaviour, packing, options)
        bounded = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
        gain = torch.minimum(ratio * kept, bounded * kept)
        if options.clip_dual is not None:
            gain = torch.where(kept < 0.0, torch.maximum(gain, options.clip_dual * kept), gain)
        loss = -gain
    return loss if weights is None else loss * packing.keep(weights.detach())


@torch.no_grad()
def policy_report(
    logprobs: Tensor, behaviour: Tensor, advantages: Tensor, packing: Packing, options: PolicyOptions
) -> PolicyReport:
    """Where the clip stops the gradient: beyond a bound on the side the advantage pushes to (dual: beyond
    ``clip_dual``, against a negative advantage)."""
    ratio = _ratio(logprobs, behaviour, packing, options)
    kept = packing.keep(advantages)
    chosen = ratio[packing.mask]
    ends = (float(chosen.min()), float(chosen.max())) if len(chosen) else (1.0, 1.0)
    is_dual = (kept < 0.0) & (ratio > (options.clip_dual or float("inf")))
    return PolicyReport(
        ratio_mean=packing.mean(ratio),
        ratio_min=ends[0],
        ratio_max=ends[1],
        clip_low=packing.mean((kept < 0.0) & (ratio < 1.0 - options.clip_low)),
        clip_high=packing.mean((kept > 0.0) & (ratio > 1.0 + options.clip_high)),
        clip_dual=packing.mean(is_dual),
        kl=packing.mean(-packing.log_ratio(logprobs, behaviour)),
    )


def _ratio(logprobs: Tensor, behaviour: Tensor, packing: Packing, options: PolicyOptions) -> Tensor:
    log_ratio = packing.log_ratio(logprobs, behaviour)
    if options.objective == "gspo":
        log_ratio = packing.means(log_ratio)[packing.sequence_ids]
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, packing: Packing, *, clip: float | None = 0.2
) -> Tensor:
    """0.5 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) of each token, [N] f64: PPO's critic as in
    its published code. ``clip`` None: the plain square."""
    values, old, target = packing.keep(values), packing.keep(old_values), packing.keep(returns)
    square = (values - target).square()
    if clip is not None:
        near = old + (values - old).clamp(-clip, clip)
        square = torch.maximum(square, (near - target).square())
    return 0.5 * square


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p of each row, exact over the whole vocabulary: [R] in nats from [R, V]. A logit of -inf is
    a token that cannot be."""
    log_probs = torch.log_softmax(logits, dim=-1)
    finite = log_probs.masked_fill(logits == float("-inf"), 0.0)
    return -(log_probs.exp() * finite).sum(dim=-1)


def reference_kl(
    logprobs: Tensor,
    reference: Tensor,
    packing: Packing,
    *,
    estimate: KLEstimate = "k3",
    behaviour: Tensor | None = None,
) -> Tensor:
    """What each token says about KL(policy || reference), [N] f64, with d = log reference - log policy.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d: Schulman, "Approximating KL divergence". Of these as losses
    only k2's gradient is right on policy (k1's has mean 0). With ``behaviour``, times the ratio of policy to
    behaviour, through which the gradient flows: the unbiased estimate of DeepSeek-V3.2 (section 3.1, eq. 7).
    """
    d = packing.log_ratio(reference, logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    found = {"k1": -d, "k2": 0.5 * d.square(), "k3": torch.expm1(d) - d}[estimate]
    if behaviour is None:
        return found
    ratio = packing.log_ratio(logprobs, behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return found * ratio
