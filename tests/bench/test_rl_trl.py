"""Steps of both sides are timed in turn: blocks in the order told, one side standing still in the other's."""

import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEER_S = 0.05
VALUES = {
    "perf/rollout_seconds": 0.25,
    "perf/train_seconds": 0.5,
    "perf/sync_seconds": 0.125,
    "rollout/response_length/mean": 8.0,
    "reward/mean": 0.5,
    "rollout/frac_reward_zero_std": 0.25,
}


class SlowPeer:
    """Answers as the worker does, takes its time, and notes how many blocks of ours had ended."""

    def __init__(self) -> None:
        self.turns: Any = None
        self.ours_ended: list[int] = []

    def ask(self, do: str, *, count: int) -> dict[str, Any]:
        assert do == "steps"
        time.sleep(PEER_S)
        self.ours_ended.append(len(self.turns.blocks["bittrue"]))
        return {"steps": [{"seconds": 4.0, "rollout_seconds": 1.0, "train_seconds": 3.0}] * count}


@pytest.mark.parametrize(("rounds", "ours_ended"), [(3, [1, 1, 3]), (4, [1, 1, 3, 3])])
def test_blocks_alternate_and_the_peers_time_is_not_ours(
    rounds: int, ours_ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rl_trl import Plan, Turns

    peer = SlowPeer()
    turns = peer.turns = Turns(Plan(rounds=rounds, steps=2), peer)
    for _ in range(turns.plan.total):
        turns.tell(VALUES)
    assert peer.ours_ended == ours_ended  # ours, peer, peer, ours, ours, peer, ...
    ours, theirs = turns.blocks["bittrue"], turns.blocks["trl"]
    assert [len(block) for block in (*ours, *theirs)] == [2] * (2 * rounds)
    assert max(step["seconds"] for block in ours for step in block) < PEER_S
    assert ours[0][0]["answer_length"] == 8.0 and ours[0][0]["taught"] == 0.75


def test_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rl_trl import our_step, summed_up

    def block(seconds: float) -> list[dict[str, float]]:
        return [dict(our_step(seconds, VALUES)), dict(our_step(3 * seconds, VALUES))]

    blocks = {"bittrue": [block(1.0), block(2.0), block(1.0)], "trl": [block(3.0), block(4.0), block(6.0)]}
    found = {m.name: m for m in summed_up(blocks, {"bittrue": {}, "trl": {"experts": "eager", "passes": 1}})}
    ratio = found["step, TRL over bittrue"]
    assert (ratio.low, ratio.median, ratio.high, ratio.repeats) == (2.0, 3.0, 6.0, 3)
    assert found["rollout, TRL over bittrue"].median == 1.0
