"""What a step's answers, its engine and its verifiers did, by metric name."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bittrue.engine.types import EngineStats
from bittrue.rl.advantage import pass_at_k
from bittrue.rl.records import StepBatch
from bittrue.rl.types import Scored
from bittrue.rl.verifiers.health import Health


def answer_values(batch: StepBatch, version: int) -> dict[str, float]:
    """``version``: the policy's number that is trained with these answers."""
    scored = batch.scored
    lengths = np.array([len(each.rollout.answer_ids) for each in scored], np.float64)
    ended = np.array([not each.rollout.is_truncated for each in scored])
    versions = np.concatenate([each.rollout.policy_versions() for each in scored])
    outcomes = [each.outcome for each in scored]
    values = _score_values(scored) | {
        f"reward/pass@{len(batch.groups[0])}": _solved(batch),
        "rollout/response_length/mean": float(lengths.mean()),
        "rollout/response_length/max": float(lengths.max()),
        "rollout/truncated_ratio": float(1.0 - ended.mean()),
        "rollout/weight_version/min": float(versions.min()),
        "rollout/weight_version/mean": float(versions.mean()),
        "rollout/weight_version/mixed_ratio": float(
            np.mean([len(each.rollout.spans) > 1 for each in scored])
        ),
        "rollout/staleness/mean": float(version - versions.mean()),
        "rollout/staleness/max": float(version - versions.min()),
    }
    if ended.any():
        values["rollout/response_length/terminated_mean"] = float(lengths[ended].mean())
    return values | {f"verifier/{name}": float(outcomes.count(name)) for name in sorted(set(outcomes))}


def _score_values(scored: Sequence[Scored]) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    scores = [each.score for each in scored if each.score is not None]
    for each in scored:
        for name, value in each.sub_scores.items():
            parts.setdefault(name, []).append(value)
    values = {}
    for prefix, found in (("reward", scores), *((f"reward/{name}", own) for name, own in parts.items())):
        if found:
            values[f"{prefix}/mean"] = float(np.mean(found))
            values[f"{prefix}/std"] = float(np.std(found))
    return values


def _solved(batch: StepBatch) -> float:
    """Share of prompts that one of the answers solves."""
    return float(np.mean([any(each.outcome == "right" for each in group) for group in batch.groups]))


def engine_values(before: EngineStats, after: EngineStats) -> dict[str, float]:
    """What the engine did between two moments."""
    looked_up = after.cache.lookup_tokens - before.cache.lookup_tokens
    hits = sum(after.cache.hit_tokens.values()) - sum(before.cache.hit_tokens.values())
    values = {"rollout/preemptions": float(after.num_preempted_total - before.num_preempted_total)}
    if looked_up > 0:
        values["rollout/prefix_hit_rate"] = hits / looked_up
    passes = sum(after.drafts.drafted_at[:1]) - sum(before.drafts.drafted_at[:1])
    accepted = sum(after.drafts.accepted_at) - sum(before.drafts.accepted_at)
    if passes > 0:
        values["rollout/spec_accept_length"] = 1.0 + accepted / passes
    return values


def verifier_values(health: Health | None) -> dict[str, float]:
    """Latencies of the latest verifications."""
    if health is None or health.total.p50_seconds is None or health.total.p99_seconds is None:
        return {}
    return {
        "verifier/seconds/p50": health.total.p50_seconds,
        "verifier/seconds/p99": health.total.p99_seconds,
        "verifier/restarts": float(health.restarts),
    }


def held_out_values(
    task: str, greedy: Sequence[Scored], sampled: Sequence[Sequence[Scored]]
) -> dict[str, float]:
    """Shares of held-out prompts solved: greedily, and by samples, of which each prompt has as many."""
    values = {f"eval/{task}/greedy": float(np.mean([each.outcome == "right" for each in greedy]))}
    if not sampled:
        return values
    number = len(sampled[0])
    right = [sum(each.outcome == "right" for each in group) for group in sampled]
    for k in sorted({1, 1 << int(math.log2(number))}):
        values[f"eval/{task}/pass@{k}"] = float(np.mean([pass_at_k(number, n, k) for n in right]))
    return values


def outcome_counts(scored: Sequence[Scored]) -> Mapping[str, int]:
    names = [each.outcome for each in scored]
    return {name: names.count(name) for name in sorted(set(names))}
