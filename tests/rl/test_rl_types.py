from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bittrue.errors import RolloutInvalid
from bittrue.rl.types import Group, Rollout, Scored, Span


def rollout(**changes: Any) -> Rollout:
    given: dict[str, Any] = {
        "prompt_key": "p",
        "prompt_ids": np.array([1, 2], np.int32),
        "answer_ids": np.array([3, 4, 5], np.int32),
        "logprobs": np.array([-0.5, -1.0, -0.25], np.float32),
        "spans": (Span(7, 1), Span(8, 2)),
        "finish_reason": "stop",
    }
    return Rollout(**{**given, **changes})


def test_each_token_knows_the_version_that_sampled_it() -> None:
    assert rollout().policy_versions().tolist() == [7, 8, 8]
    # The prompt's rows are of older weights than all that was sampled over them.
    assert rollout(spans=(Span(7, 0), Span(8, 3))).policy_versions().tolist() == [8, 8, 8]
    empty = rollout(answer_ids=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32), spans=())
    assert empty.policy_versions().tolist() == []


def test_an_answer_cut_at_its_limit_is_truncated() -> None:
    assert rollout(finish_reason="length").is_truncated
    assert not rollout().is_truncated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": np.zeros(0, np.int32)}, "the prompt is empty"),
        ({"logprobs": np.array([-0.5, -1.0], np.float32)}, "2 log-probabilities for 3 answer tokens"),
        ({"logprobs": np.array([-0.5, -1.0, -1.0])}, r"logprobs is \[3\] float64, not a vector of float32"),
        ({"logprobs": np.array([0.0, np.nan, 0.0], np.float32)}, "of answer token 1 is nan"),
        ({"logprobs": np.array([0.0, -1.0, -np.inf], np.float32)}, "of answer token 2 is -inf"),
        ({"answer_ids": np.zeros((3, 1), np.int32)}, r"answer_ids is \[3, 1\] int32"),
        ({"spans": (Span(7, 2),)}, "its spans cover 2 of 3 answer tokens"),
        ({"spans": (Span(7, 3), Span(8, 0))}, "or one is empty"),
        ({"experts": np.zeros((5, 2, 2), np.uint8)}, "experts of 5 tokens, 4 were computed"),
        ({"index_rows": np.zeros((5, 1, 2), np.uint16)}, "index_rows of 5 tokens"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutInvalid, match=message) as caught:
        rollout(**changes)
    assert caught.value.prompt_key == "p"


def test_records_may_begin_after_a_cached_prefix() -> None:
    assert rollout(experts=np.zeros((2, 2, 2), np.uint8)).experts is not None


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_is_a_number_or_nothing(score: float) -> None:
    with pytest.raises(RolloutInvalid, match="score is"):
        Scored(rollout(), score, "right")
    with pytest.raises(RolloutInvalid, match="length is"):
        Scored(rollout(), 1.0, "right", {"length": score})
    assert Scored(rollout(), None, "timeout").score is None


def test_a_group_answers_one_prompt() -> None:
    assert len(Group("p", (rollout(), rollout())).rollouts) == 2
    with pytest.raises(RolloutInvalid, match="no rollouts"):
        Group("p", ())
    for other in (rollout(prompt_key="q"), replace(rollout(), prompt_ids=np.array([1, 3], np.int32))):
        with pytest.raises(RolloutInvalid, match="rollout 1 answers another prompt"):
            Group("p", (rollout(), other))
