import itertools
import math
import random
import statistics

import numpy as np
import pytest

from bittrue.rl.advantage import (
    Floats,
    Ints,
    drop_reasons,
    gae,
    group_report,
    grpo,
    leave_one_out,
    pass_at_k,
    reinforce_pp,
    reinforce_pp_baseline,
    token_rewards,
    whiten,
)

NAN = float("nan")
# f64 sums of a few dozen numbers of order 1, in another order than ours.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def floats(*values: float) -> Floats:
    return np.array(values, np.float64)


def ints(*values: int) -> Ints:
    return np.array(values, np.int64)


# ---- one number a rollout ----------------------------------------------------------------------------


def test_grpo_by_hand() -> None:
    # 1, 0, 0, 0: mean 1/4, sum of squares 3/4, std sqrt(3/4 / 3) = 1/2.
    got = grpo(floats(1, 0, 0, 0), ints(0, 0, 0, 0))
    np.testing.assert_allclose(got, floats(0.75, -0.25, -0.25, -0.25) / (0.5 + 1e-6), **CLOSE)
    plain = grpo(floats(1, 0, 0, 0), ints(0, 0, 0, 0), normalise_std=False)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_leave_one_out_by_hand() -> None:
    # 3 - (1 + 2)/2, 1 - (3 + 2)/2, 2 - (3 + 1)/2
    np.testing.assert_allclose(leave_one_out(floats(3, 1, 2), ints(5, 5, 5)), floats(1.5, -1.5, 0), **CLOSE)


def test_group_advantages_against_a_plain_loop() -> None:
    rng = random.Random(0)
    scores = [rng.random() for _ in range(30)]
    groups = [rng.randrange(5) for _ in range(30)]
    for i, (score, group) in enumerate(zip(scores, groups, strict=True)):
        others = [s for j, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == group and j != i]
        own = [*others, score]
        expected = (score - statistics.mean(own)) / (statistics.stdev(own) + 1e-6)
        assert grpo(np.array(scores), np.array(groups))[i] == pytest.approx(expected, abs=1e-12)
        expected = score - statistics.mean(others)
        assert leave_one_out(np.array(scores), np.array(groups))[i] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("estimate", [grpo, leave_one_out])
def test_equal_scores_and_single_rollouts_teach_nothing(estimate) -> None:  # type: ignore[no-untyped-def]
    # 0.1 three times has a mean that is not 0.1 in f64.
    assert estimate(floats(0.1, 0.1, 0.1, 5.0), ints(0, 0, 0, 1)).tolist() == [0, 0, 0, 0]
    assert estimate(floats(), ints()).tolist() == []


@pytest.mark.parametrize("estimate", [grpo, leave_one_out])
def test_an_unscored_rollout_changes_nothing(estimate) -> None:  # type: ignore[no-untyped-def]
    alone = estimate(floats(1, 0, 0), ints(0, 0, 0))
    assert estimate(floats(1, NAN, 0, 0), ints(0, 0, 0, 0)).tolist() == [alone[0], 0, *alone[1:]]
    assert estimate(floats(NAN, NAN), ints(0, 0)).tolist() == [0, 0]


@pytest.mark.parametrize("estimate", [grpo, leave_one_out])
def test_groups_do_not_see_each_other(estimate) -> None:  # type: ignore[no-untyped-def]
    scores, groups = floats(1, 0, 0.5, 0.25, 1, 0), ints(2, 0, 2, 0, 0, 2)
    together = estimate(scores, groups)
    for group in (0, 2):
        members = groups == group
        assert estimate(scores[members], groups[members]).tolist() == together[members].tolist()


# ---- one number a token ------------------------------------------------------------------------------


def test_the_score_falls_on_the_last_trainable_token() -> None:
    ids, mask = ints(0, 0, 0, 1, 1, 2), np.array([True, True, False, True, True, False])
    assert token_rewards(floats(2, 3, 9), ids, mask).tolist() == [0, 2, 0, 0, 3, 0]
    assert token_rewards(floats(2), ints(0, 0), np.ones(2, bool)).tolist() == [0, 2]
    penalties = floats(1, 2, NAN, 3, 4, NAN)
    got = token_rewards(floats(2, NAN, 9), ids, mask, penalties, beta=0.5)
    assert got.tolist() == [-0.5, 1, 0, -1.5, -2, 0]


def test_gae_by_hand() -> None:
    # discount 1/2, decay 1/2. Last: d = 1 - 1/2. Before: d = 0 + 1/2 * 1/2 - 1 = -3/4; A = d + 1/4 * 1/2.
    advantages, returns = gae(
        floats(0, 1), floats(1, 0.5), ints(0, 0), np.ones(2, bool), discount=0.5, decay=0.5
    )
    assert advantages.tolist() == [-0.625, 0.5]
    assert returns.tolist() == [0.375, 1.0]


def test_gae_against_the_sum_of_its_definition() -> None:
    rng = random.Random(1)
    lengths, discount, decay = [1, 5, 3], 0.9, 0.8
    ids = np.repeat(np.arange(3), lengths)
    rewards, values = (np.array([rng.gauss(0, 1) for _ in ids]) for _ in range(2))
    got, returns = gae(rewards, values, ids, np.ones(len(ids), bool), discount=discount, decay=decay)
    start = 0
    for length in lengths:
        r, v = rewards[start : start + length], [*values[start : start + length], 0.0]
        surprise = [r[t] + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((discount * decay) ** (u - t) * surprise[u] for u in range(t, length))
            assert got[start + t] == pytest.approx(expected, abs=1e-12)
            assert returns[start + t] == pytest.approx(expected + v[t], abs=1e-12)
        start += length


def test_observed_tokens_carry_no_decay_and_influence_nothing() -> None:
    plain = gae(floats(0, 0, 1), floats(1, 2, 3), ints(0, 0, 0), np.ones(3, bool), discount=0.9, decay=0.7)
    mask = np.array([True, False, True, False, True, False])
    rewards, values = floats(0, NAN, 0, 7, 1, NAN), floats(1, NAN, 2, 9, 3, 9)
    got = gae(rewards, values, ints(0, 0, 0, 0, 0, 0), mask, discount=0.9, decay=0.7)
    for found, expected in zip(got, plain, strict=True):
        assert found[mask].tolist() == expected.tolist()
        assert found[~mask].tolist() == [0, 0, 0]


def test_order_and_neighbours_of_sequences_do_not_change_gae() -> None:
    rng = np.random.default_rng(2)
    parts = [(rng.normal(size=n), rng.normal(size=n)) for n in (4, 1, 6)]
    alone = [
        gae(r, v, np.zeros(len(r), np.int64), np.ones(len(r), bool), discount=1.0, decay=0.95)[0]
        for r, v in parts
    ]
    for order in itertools.permutations(range(3)):
        rewards = np.concatenate([parts[i][0] for i in order])
        values = np.concatenate([parts[i][1] for i in order])
        ids = np.repeat(np.arange(3), [len(parts[i][0]) for i in order])
        got, _ = gae(rewards, values, ids, np.ones(len(ids), bool), discount=1.0, decay=0.95)
        assert got.tolist() == np.concatenate([alone[i] for i in order]).tolist()


def test_whitened_values_have_mean_0_and_spread_1() -> None:
    # 1, 2, 3: mean 2, std 1.
    mask = np.array([True, True, False, True])
    np.testing.assert_allclose(whiten(floats(1, 2, NAN, 3), mask), floats(-1, 0, 0, 1) / (1 + 1e-6), **CLOSE)
    assert whiten(floats(0.1, 0.1, 0.1), np.ones(3, bool)).tolist() == [0, 0, 0]
    assert whiten(floats(4, 5), np.array([True, False])).tolist() == [0, 0]


def test_reinforce_pp_whitens_returns_over_the_batch() -> None:
    # Returns of two sequences, discount 1: 2, 2 (score 2, two tokens) and 5.
    ids, mask = ints(0, 0, 1), np.ones(3, bool)
    rewards = token_rewards(floats(2, 5), ids, mask)
    expected = (floats(2, 2, 5) - 3) / (math.sqrt(3) + 1e-6)
    np.testing.assert_allclose(reinforce_pp(rewards, ids, mask), expected, **CLOSE)


def test_reinforce_pp_with_penalties_sums_those_to_come() -> None:
    ids, mask = ints(0, 0, 0), np.ones(3, bool)
    rewards = token_rewards(floats(1), ids, mask, floats(3, 2, 1), beta=0.1)
    returns = floats(1 - 0.1 * 6, 1 - 0.1 * 3, 1 - 0.1 * 1)
    np.testing.assert_allclose(reinforce_pp(rewards, ids, mask), whiten(returns, mask), **CLOSE)


def test_reinforce_pp_baseline_subtracts_the_group_then_whitens_tokens() -> None:
    # Group 0: 1, 0 -> 1/2, -1/2; group 1: 4, 4 -> 0. Lengths 2, 1, 1, 1: values 1/2, 1/2, -1/2, 0, 0.
    ids = ints(0, 0, 1, 2, 3)
    values = [0.5, 0.5, -0.5, 0.0, 0.0]
    expected = (np.array(values) - statistics.mean(values)) / (statistics.stdev(values) + 1e-6)
    got = reinforce_pp_baseline(floats(1, 0, 4, 4), ints(0, 0, 1, 1), ids, np.ones(5, bool))
    np.testing.assert_allclose(got, expected, **CLOSE)


# ---- which groups to learn from ----------------------------------------------------------------------


def test_groups_without_spread_are_dropped_with_their_reason() -> None:
    scores = floats(0, 0, 1, 1, 0.5, 0.5, 1, NAN, NAN, NAN, 1, 0, 0, NAN)
    groups = ints(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)
    dropped = drop_reasons(scores, groups)
    assert dropped == {
        0: "all_zero",
        1: "all_one",
        2: "other_equal",
        3: "too_few",
        4: "unscored",
        6: "too_few",
    }
    report = group_report(groups, dropped)
    assert report.drops == {"all_zero": 1, "all_one": 1, "other_equal": 1, "too_few": 2, "unscored": 1}
    assert (report.num_groups, report.zero_spread) == (7, pytest.approx(3 / 7))
    assert (report.all_zero, report.all_one) == (pytest.approx(1 / 7), pytest.approx(1 / 7))


def test_worst_and_best_may_be_other_numbers() -> None:
    dropped = drop_reasons(floats(-1, -1, 0, 0), ints(0, 0, 1, 1), worst=-1.0)
    assert dropped == {0: "all_zero", 1: "other_equal"}


def test_a_kept_group_has_advantages_and_a_dropped_one_has_none() -> None:
    rng = np.random.default_rng(3)
    scores, groups = rng.integers(0, 2, 200).astype(float), np.repeat(np.arange(50), 4)
    dropped = drop_reasons(scores, groups)
    assert 0 < len(dropped) < 50
    advantages = grpo(scores, groups)
    for group in range(50):
        assert advantages[groups == group].any() == (group not in dropped)


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 3), (5, 0, 2), (5, 5, 1), (4, 1, 4), (7, 5, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int, k: int) -> None:
    draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_1_is_the_share_of_right_answers_at_any_size() -> None:
    assert pass_at_k(10_000, 1234, 1) == 0.1234
