from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bittrue.errors import ConfigError
from bittrue.rl.correction import (
    ICEPOP,
    MIS,
    TIS,
    Correction,
    RatioLevel,
    importance_weights,
    off_policy_mask,
)
from bittrue.rl.packing import Packing, Totals, reduce
from bittrue.rl.policy_loss import PolicyOptions, policy_loss

# exp and log of f64 numbers of order 1, and sums of a few of them.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
NAN, INF = float("nan"), float("inf")
LEVELS: tuple[RatioLevel, ...] = ("token", "sequence", "geometric")


def packing(*lengths: int) -> Packing:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Packing(ids, torch.ones_like(ids, dtype=torch.bool), len(lengths))


def logs(*ratios: float) -> tuple[Tensor, Tensor]:
    """Trained and behaviour log-probabilities with these ratios."""
    behaviour = torch.full((len(ratios),), -1.0, dtype=torch.float64)
    return behaviour + torch.tensor(ratios, dtype=torch.float64).log(), behaviour


def weights_of(correction: Correction, packed: Packing, *ratios: float) -> list[float]:
    weights, _ = importance_weights(*logs(*ratios), packed, correction)
    return [pytest.approx(w, abs=1e-12) for w in weights.tolist()]


def test_published_corrections_by_hand() -> None:
    ratios = (0.1, 1.0, 3.0, 0.6, 8.0, 1.0)
    packed = packing(3, 3)  # products 0.3 and 4.8
    assert weights_of(TIS, packed, *ratios) == [0.1, 1, 2, 0.6, 2, 1]
    assert weights_of(ICEPOP, packed, *ratios) == [0, 1, 3, 0.6, 0, 1]
    assert weights_of(MIS, packed, *ratios) == [0.3, 0.3, 0.3, 0, 0, 0]


def test_levels_by_hand() -> None:
    packed = packing(2, 1)  # products 8, 1/2; geometric means sqrt(8), 1/2
    wide = Correction("truncate", low=0.6, high=2.5)
    assert weights_of(wide, packed, 2, 4, 0.5) == [2, 2.5, 0.6]
    assert weights_of(replace(wide, level="sequence"), packed, 2, 4, 0.5) == [2.5, 2.5, 0.6]
    assert weights_of(replace(wide, level="geometric", high=9), packed, 2, 4, 0.5) == [8**0.5, 8**0.5, 0.6]


def test_a_veto_rejects_the_whole_sequence() -> None:
    correction = Correction("truncate", high=2.0, veto=1e-3)
    weights, report = importance_weights(*logs(1, 5e-4, 1, 3, 1), packing(3, 2), correction)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0, 0, 2, 1], dtype=torch.float64), **CLOSE)
    assert (report.vetoed, report.masked, report.clipped) == (0.5, pytest.approx(0.6), pytest.approx(0.2))


def test_the_report_by_hand() -> None:
    weights, report = importance_weights(*logs(0.5, 1, 4, 5e-5), packing(2, 2), TIS)
    assert report.ratio_mean == pytest.approx((5.5 + 5e-5) / 4)
    assert (report.ratio_min, report.ratio_max) == (pytest.approx(5e-5), pytest.approx(4))
    # weights 1/2, 1, 2, 5e-5
    total, squares = 3.5 + 5e-5, 0.25 + 1 + 4 + 25e-10
    assert report.ess == pytest.approx(total**2 / (4 * squares))
    assert (report.clipped, report.masked, report.vetoed, report.catastrophic) == (0.25, 0, 0, 0.25)


@pytest.mark.parametrize("level", LEVELS)
def test_without_a_cap_truncation_is_plain_importance_sampling(level: RatioLevel) -> None:
    """The expectation of f under one policy, from all tokens of another."""
    p, q = (
        torch.softmax(torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(i)), 0)
        for i in (0, 1)
    )
    correction = Correction("truncate", level=level, high=INF)
    weights, report = importance_weights(p.log(), q.log(), packing(1, 1, 1, 1, 1, 1), correction)
    f = torch.arange(6, dtype=torch.float64)
    assert float((q * weights * f).sum()) == pytest.approx(float((p * f).sum()), abs=1e-12)
    assert (report.clipped, report.masked) == (0, 0)


@pytest.mark.parametrize(
    "correction", [TIS, MIS, ICEPOP, Correction("truncate", level="geometric", veto=1e-4)]
)
def test_on_policy_every_weight_is_1_to_the_bit(correction: Correction) -> None:
    logprobs = -torch.rand(6)
    weights, report = importance_weights(logprobs, logprobs.clone(), packing(2, 4), correction)
    assert weights.tolist() == [1.0] * 6
    assert (report.ess, report.clipped, report.masked, report.vetoed, report.catastrophic) == (1, 0, 0, 0, 0)
    assert (report.ratio_mean, report.ratio_min, report.ratio_max) == (1, 1, 1)


def test_a_rejected_token_leaves_the_weight_of_others() -> None:
    trained, behaviour = logs(1, 100, 1)
    packed, advantages = packing(2, 1), torch.ones(3)
    weights, _ = importance_weights(trained, behaviour, packed, ICEPOP)
    leaf = trained.clone().requires_grad_()
    loss = policy_loss(leaf, behaviour, advantages, packed, PolicyOptions("reinforce"), weights=weights)
    reduce(loss, packed, "token_mean", Totals.of(packed)).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.tensor([-1.0, 0, -1], dtype=torch.float64) / 3, **CLOSE)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("level", LEVELS)
def test_masked_tokens_have_no_weight_and_influence_none(level: RatioLevel, poison: float) -> None:
    correction = Correction("mask", level=level, low=0.1, high=3.0, veto=0.2)
    trained, behaviour = logs(2, 1, 0.5, 0.15, 1)
    mask = torch.tensor([True, False, True, False, True])
    packed = packing(3, 2)
    wide = Packing(packed.sequence_ids, mask, 2)
    dirty = [torch.where(mask, x, poison) for x in (trained, behaviour)]
    got, report = importance_weights(dirty[0], dirty[1], wide, correction)
    small = Packing(packed.sequence_ids[mask], mask[mask], 2)
    expected, small_report = importance_weights(trained[mask], behaviour[mask], small, correction)
    assert torch.equal(got[mask], expected)
    assert got[~mask].tolist() == [0, 0]
    assert report == small_report
    far, far_report = off_policy_mask(*dirty, torch.where(mask, -1.0, poison), wide, max_kl=0.1)
    near, near_report = off_policy_mask(trained[mask], behaviour[mask], -torch.ones(3), small, max_kl=0.1)
    assert torch.equal(far[mask], near)
    assert far_report == near_report


@pytest.mark.parametrize("level", LEVELS)
def test_neighbours_of_a_sequence_do_not_change_its_weights(level: RatioLevel) -> None:
    correction = Correction("mask", level=level, low=0.3, high=4.0, veto=0.25)
    ratios = torch.tensor([2, 0.5, 1, 0.2, 3, 1.1, 0.9], dtype=torch.float64)
    lengths = [2, 2, 3]
    parts = torch.arange(7).split(lengths)
    together, _ = importance_weights(*logs(*ratios.tolist()), packing(*lengths), correction)
    for order in ([2, 0, 1], [1], [0, 2]):
        rows = torch.cat([parts[s] for s in order])
        packed = packing(*[lengths[s] for s in order])
        got, _ = importance_weights(*logs(*ratios[rows].tolist()), packed, correction)
        assert torch.equal(got, together[rows])


def test_off_policy_masking_rejects_only_far_sequences_that_did_badly() -> None:
    # Mean KL: ln 2 / 2 = 0.347 twice, 0, and one that became likelier.
    trained, behaviour = logs(0.5, 1, 0.5, 1, 1, 1, 3, 3)
    advantages = torch.tensor([-1.0, -1, 1, 1, -1, -1, -1, -1])
    weights, report = off_policy_mask(trained, behaviour, advantages, packing(2, 2, 2, 2), max_kl=0.3)
    assert weights.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert (report.masked, report.vetoed, report.clipped, report.ess) == (0.25, 0.25, 0, 0.75)
    weights, _ = off_policy_mask(trained, behaviour, advantages, packing(2, 2, 2, 2), max_kl=0.35)
    assert weights.tolist() == [1] * 8


def test_everything_rejected_is_reported_as_nothing_left() -> None:
    weights, report = importance_weights(*logs(9, 9), packing(1, 1), ICEPOP)
    assert weights.tolist() == [0, 0]
    assert (report.ess, report.masked, report.clipped) == (0, 1, 0)


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"keeps ratios of 3\.0 to 2\.0"):
        Correction("mask", low=3.0)
