"""The one table of RL metric names: what TensorBoard and the JSONL of a run call the numbers of a step."""

from dataclasses import dataclass
from typing import Literal

from bittrue.rl.parity import Parity, Selection
from bittrue.rl.reports import CorrectionReport, GroupReport, PolicyReport

Part = Literal["groups", "policy", "correction", "sequence_mask", "parity", "routing", "index"]


@dataclass(frozen=True, slots=True)
class StepReports:
    """What one step measured; None where it was not. ``routing`` and ``index`` compare experts and index
    rows; ``sequence_mask`` is that of off-policy sequence masking."""

    groups: GroupReport | None = None
    policy: PolicyReport | None = None
    correction: CorrectionReport | None = None
    sequence_mask: CorrectionReport | None = None
    parity: Parity | None = None
    routing: Selection | None = None
    index: Selection | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One row: the name, its meaning, and where ``flatten`` finds it; None: the loop knows it. A part in
    braces stands for any name, as that of a reward function."""

    name: str
    meaning: str
    source: tuple[Part, str] | None = None


METRICS = (
    # Scores and groups.
    Metric("reward/mean", "Mean score of the step's scored rollouts."),
    Metric("reward/std", "Standard deviation of the scores."),
    Metric("reward/{function}/mean", "Mean of one reward function or sub-score."),
    Metric("reward/{function}/std", "Its standard deviation."),
    Metric("reward/pass@{k}", "Share of prompts solved by one of k answers, unbiased, complete groups only."),
    Metric("rollout/num_groups", "Groups judged, dropped ones included.", ("groups", "num_groups")),
    Metric("rollout/frac_reward_zero_std", "Share of groups with equal scores.", ("groups", "zero_spread")),
    Metric("rollout/frac_all_zero", "Share of groups with only the worst score.", ("groups", "all_zero")),
    Metric("rollout/frac_all_one", "Share of groups with only the best score.", ("groups", "all_one")),
    Metric("rollout/dropped/{reason}", "Groups dropped, by reason.", ("groups", "drops")),
    # Answers.
    Metric("rollout/response_length/mean", "Tokens of an answer, mean."),
    Metric("rollout/response_length/max", "Tokens of the longest answer."),
    Metric("rollout/response_length/terminated_mean", "Tokens of answers that ended by themselves, mean."),
    Metric("rollout/truncated_ratio", "Share of answers cut at their limit."),
    Metric("rollout/weight_version/min", "Oldest policy version that sampled a token of the step."),
    Metric("rollout/weight_version/mean", "Mean policy version of the step's tokens."),
    Metric("rollout/weight_version/mixed_ratio", "Share of answers sampled by more than one version."),
    Metric("rollout/staleness/mean", "Versions between sampling and training, mean over tokens."),
    Metric("rollout/staleness/max", "The most of them."),
    Metric("rollout/preemptions", "Sequences the engine put off for want of memory."),
    Metric("rollout/queue_depth", "Groups sampled that wait to be trained on."),
    Metric("rollout/prefix_hit_rate", "Share of prompt tokens taken from the prefix cache."),
    Metric("rollout/spec_accept_length", "Tokens a speculative step yields, mean."),
    # Verifiers.
    Metric("verifier/{outcome}", "Answers with this outcome: right, wrong, unparsable, timeout, crash."),
    Metric("verifier/seconds/p50", "Median time of a verification."),
    Metric("verifier/seconds/p99", "99th percentile of it."),
    Metric("verifier/restarts", "Workers started in the place of one that died, since the start."),
    # The update.
    Metric("train/loss", "Policy loss with all its terms."),
    Metric("train/value_loss", "Loss of the value head."),
    Metric("train/entropy", "Entropy of the policy at trainable tokens, nats, mean."),
    Metric("train/kl", "KL of the policy to the reference, nats a token."),
    Metric("train/teacher_kl", "Weighted KL of the student to its teachers, whole vocabulary, nats a token."),
    Metric("train/grad_norm", "Norm of the gradient before clipping."),
    Metric("train/lr", "Learning rate."),
    Metric(
        "train/ppo_kl", "KL of the sampling policy to the trained one, k1, nats a token.", ("policy", "kl")
    ),
    Metric("train/ratio/mean", "Ratio of the policy loss, mean.", ("policy", "ratio_mean")),
    Metric("train/ratio/min", "Its smallest.", ("policy", "ratio_min")),
    Metric("train/ratio/max", "Its largest.", ("policy", "ratio_max")),
    Metric("train/clip_ratio/low", "Share of tokens clipped at the lower bound.", ("policy", "clip_low")),
    Metric("train/clip_ratio/high", "Share of tokens clipped at the upper bound.", ("policy", "clip_high")),
    Metric("train/clip_ratio/dual", "Share of tokens at the dual clip.", ("policy", "clip_dual")),
    # Corrections.
    Metric(
        "is/ratio/mean", "Trainer over engine probability before bounds, mean.", ("correction", "ratio_mean")
    ),
    Metric("is/ratio/min", "Its smallest.", ("correction", "ratio_min")),
    Metric("is/ratio/max", "Its largest.", ("correction", "ratio_max")),
    Metric("is/ess_ratio", "Effective share of the tokens under the weights.", ("correction", "ess")),
    Metric("is/clipped", "Share of tokens whose weight was truncated.", ("correction", "clipped")),
    Metric("is/masked", "Share of tokens with weight 0.", ("correction", "masked")),
    Metric("is/vetoed", "Share of sequences rejected for one token.", ("correction", "vetoed")),
    Metric("is/catastrophic", "Share of tokens with a ratio below 1e-4.", ("correction", "catastrophic")),
    Metric(
        "opsm/masked", "Share of tokens off-policy sequence masking rejects.", ("sequence_mask", "masked")
    ),
    Metric("opsm/sequences", "Share of sequences it rejects.", ("sequence_mask", "vetoed")),
    # Trainer against engine, before the gradient.
    Metric("parity/num_tokens", "Tokens compared.", ("parity", "num_tokens")),
    Metric("parity/differing", "Tokens whose log-probability differs in any bit.", ("parity", "differing")),
    Metric(
        "parity/logprob_abs_diff/mean", "|difference| of log-probabilities, mean.", ("parity", "mean_abs")
    ),
    Metric("parity/logprob_abs_diff/max", "Its largest.", ("parity", "max_abs")),
    Metric("parity/k1", "KL of engine to trainer, k1, nats a token.", ("parity", "k1")),
    Metric("parity/k3", "KL of engine to trainer, k3, nats a token.", ("parity", "k3")),
    Metric("parity/chi2", "Chi-square of engine and trainer, a token.", ("parity", "chi2")),
    Metric(
        "parity/frac_beyond_ln2", "Share of tokens off by more than a factor of 2.", ("parity", "beyond_ln2")
    ),
    Metric("parity/router_flips", "Share of token and layer routed otherwise.", ("routing", "flips")),
    Metric(
        "parity/router_token_flips", "Share of tokens routed otherwise anywhere.", ("routing", "token_flips")
    ),
    Metric("parity/router_overlap", "Share of experts chosen by both.", ("routing", "overlap")),
    Metric("parity/index_flips", "Share of token and layer that read other rows.", ("index", "flips")),
    Metric(
        "parity/index_token_flips", "Share of tokens that read others anywhere.", ("index", "token_flips")
    ),
    Metric("parity/index_overlap", "Share of rows chosen by both.", ("index", "overlap")),
    # Held out, and cost.
    Metric("eval/{task}/greedy", "Held-out share solved, greedy."),
    Metric("eval/{task}/pass@1", "Held-out share solved, sampled."),
    Metric("eval/{task}/pass@{k}", "Held-out share of prompts solved by one of k samples, unbiased."),
    Metric("perf/tokens_per_second", "Answer tokens a second of the whole step."),
    Metric("perf/rollout_seconds", "Time of sampling and scoring."),
    Metric("perf/train_seconds", "Time of the update."),
    Metric("perf/eval_seconds", "Time of held-out measurements before it."),
    Metric("perf/sync_seconds", "Time of publishing weights."),
    Metric("perf/sync_bytes", "Bytes published."),
)


def flatten(reports: StepReports) -> dict[str, float]:
    """The numbers of the reports that are there, by metric name."""
    found: dict[str, float] = {}
    for metric in METRICS:
        if metric.source is None:
            continue
        part, field = metric.source
        report = getattr(reports, part)
        if report is None:
            continue
        value = getattr(report, field)
        if part == "groups" and field == "drops":
            found.update({metric.name.format(reason=reason): float(n) for reason, n in value.items()})
        else:
            found[metric.name] = float(value)
    return found
