"""Advantages: how much better than expected an answer, or one of its tokens, was.

Scores are f64 [R], one per rollout, NaN where a verifier could not tell: such a rollout is in no mean and
its advantage is 0. Tokens are packed: f64 [N], every sequence's in order and side by side, with the id of
their sequence [N]; ``mask`` says which ones the policy sampled and is trained on. Others have advantage 0
and influence nothing, whatever their values.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bittrue.rl.reports import GroupReport

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

# Added to a standard deviation before dividing by it, as in GRPO's published code.
_EPSILON = 1e-6

DropReason = Literal["all_zero", "all_one", "other_equal", "too_few", "unscored"]
DROP_REASONS: tuple[DropReason, ...] = ("all_zero", "all_one", "other_equal", "too_few", "unscored")

# ---- one number a rollout ----------------------------------------------------------------------------


def grpo(scores: Floats, groups: Ints, *, normalise_std: bool = True) -> Floats:
    """A_i = (r_i - mean r) / (std r + 1e-6) over the rollout's group, std with n - 1.

    DeepSeekMath (arXiv 2402.03300) 4.1.2; without the division, Dr. GRPO (arXiv 2503.20783). A group of equal
    scores has advantage exactly 0.
    """
    advantages = np.zeros(len(scores))
    for members in _members(scores, groups):
        own = scores[members]
        if own.min() == own.max():
            continue
        centred = own - own.mean()
        advantages[members] = centred / (own.std(ddof=1) + _EPSILON) if normalise_std else centred
    return advantages


def leave_one_out(scores: Floats, groups: Ints) -> Floats:
    """A_i = r_i - mean of the others of its group. RLOO (arXiv 2402.14740). One rollout alone has nothing
    to be compared with: 0."""
    advantages = np.zeros(len(scores))
    for members in _members(scores, groups):
        own = scores[members]
        if own.min() < own.max():
            advantages[members] = (own - own.mean()) * (len(own) / (len(own) - 1))
    return advantages


def _members(scores: Floats, groups: Ints) -> list[Ints]:
    """The places of the scored rollouts of each group."""
    scored = np.flatnonzero(~np.isnan(scores))
    order = scored[np.argsort(groups[scored], kind="stable")]
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    return [part for part in np.split(order, starts) if len(part)]


# ---- one number a token ------------------------------------------------------------------------------


def token_rewards(
    scores: Floats, sequence_ids: Ints, mask: Mask, penalties: Floats | None = None, *, beta: float = 0.0
) -> Floats:
    """A sequence's score at its last trainable token, less beta times each token's penalty.

    InstructGPT (arXiv 2203.02155) eq. 2 and REINFORCE++ (arXiv 2501.03262), whose penalty is the k1 estimate
    log pi - log pi_ref. ``scores`` [S]; NaN counts as 0.
    """
    rewards = np.zeros(len(sequence_ids))
    if penalties is not None:
        rewards[mask] = -beta * penalties[mask]
    places = np.flatnonzero(mask)
    is_last = np.diff(sequence_ids[places], append=-1) != 0
    last = places[is_last]
    rewards[last] += np.nan_to_num(scores[sequence_ids[last]], nan=0.0)
    return rewards


def reinforce_pp(rewards: Floats, sequence_ids: Ints, mask: Mask, *, discount: float = 1.0) -> Floats:
    """Discounted rewards to come, whitened over all trainable tokens of the batch. REINFORCE++ (arXiv
    2501.03262), global advantage normalisation: one baseline for all prompts."""
    advantages, _ = gae(rewards, np.zeros(len(rewards)), sequence_ids, mask, discount=discount, decay=1.0)
    return whiten(advantages, mask)


def reinforce_pp_baseline(scores: Floats, groups: Ints, sequence_ids: Ints, mask: Mask) -> Floats:
    """Score less the mean of its group, on every token of the answer, whitened over all trainable tokens of
    the batch. REINFORCE++ w/ baseline (arXiv 2501.03262)."""
    return whiten(grpo(scores, groups, normalise_std=False)[sequence_ids], mask)


def gae(
    rewards: Floats, values: Floats, sequence_ids: Ints, mask: Mask, *, discount: float, decay: float
) -> tuple[Floats, Floats]:
    """Advantages and the returns a value head learns, both [N], of trainable tokens alone.

    A_t = d_t + discount * decay * A_t', d_t = r_t + discount * V_t' - V_t, with t' the sequence's next
    trainable token and V = A = 0 after its last; return_t = A_t + V_t. Schulman et al. (arXiv 1506.02438)
    eq. 11 to 16. Tokens between t and t' (a tool's output) are no steps of the policy: nothing decays there.
    """
    places = np.flatnonzero(mask)
    owners = sequence_ids[places]
    assert np.all(np.diff(owners) >= 0), "packed sequences lie side by side"
    _, starts, counts = np.unique(owners, return_index=True, return_counts=True)
    advantages, returns = np.zeros(len(rewards)), np.zeros(len(rewards))
    longest = int(counts.max(initial=0))
    ahead, value_ahead = np.zeros(len(counts)), np.zeros(len(counts))
    # All sequences at once from their ends: row t is each one's t-th trainable token from behind.
    for t in range(longest):
        live = np.flatnonzero(counts > t)
        at = places[starts[live] + counts[live] - 1 - t]
        surprise = rewards[at] + discount * value_ahead[live] - values[at]
        ahead[live] = surprise + discount * decay * ahead[live]
        value_ahead[live] = values[at]
        advantages[at] = ahead[live]
        returns[at] = ahead[live] + values[at]
    return advantages, returns


def whiten(values: Floats, mask: Mask) -> Floats:
    """(x - mean) / (std + 1e-6) over the masked places, std with n - 1; 0 elsewhere and where all are
    equal."""
    whitened = np.zeros(len(values))
    own = values[mask]
    if len(own) and own.min() < own.max():
        whitened[mask] = (own - own.mean()) / (own.std(ddof=1) + _EPSILON)
    return whitened


# ---- which groups to learn from ----------------------------------------------------------------------


def drop_reasons(
    scores: Floats, groups: Ints, *, min_rollouts: int = 2, worst: float = 0.0, best: float = 1.0
) -> dict[int, DropReason]:
    """The groups that teach nothing, with the reason: DAPO's dynamic sampling (arXiv 2503.14476) eq. 11.

    unscored: no rollout has a score; too_few: fewer than ``min_rollouts`` have one; then those whose scores
    are all the same.
    """
    dropped: dict[int, DropReason] = {int(group): "unscored" for group in np.unique(groups)}
    for members in _members(scores, groups):
        group, own = int(groups[members[0]]), scores[members]
        del dropped[group]
        if len(own) < min_rollouts:
            dropped[group] = "too_few"
        elif own.min() == own.max():
            equal: dict[float, DropReason] = {worst: "all_zero", best: "all_one"}
            dropped[group] = equal.get(float(own[0]), "other_equal")
    return dropped


def group_report(groups: Ints, dropped: dict[int, DropReason]) -> GroupReport:
    """``dropped``: what ``drop_reasons`` gave for these groups."""
    number = len(np.unique(groups))
    drops: dict[str, int] = {reason: sum(r == reason for r in dropped.values()) for reason in DROP_REASONS}
    share = {reason: count / max(number, 1) for reason, count in drops.items()}
    spread = share["all_zero"] + share["all_one"] + share["other_equal"]
    return GroupReport(number, drops, spread, share["all_zero"], share["all_one"])


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that k of the samples drawn without replacement hold a right one: 1 - C(n-c, k) / C(n, k),
    unbiased. Chen et al. (arXiv 2107.03374) eq. 1."""
    assert 0 <= num_right <= num_samples and 1 <= k <= num_samples
    total = math.comb(num_samples, k)
    return (total - math.comb(num_samples - num_right, k)) / total
