import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bittrue.errors import ConfigError
from bittrue.rl.packing import Packing, Reduction, Totals, reduce
from bittrue.rl.policy_loss import (
    KLEstimate,
    PolicyOptions,
    entropy,
    policy_loss,
    policy_report,
    reference_kl,
    value_loss,
)

# f64 sums of a few dozen numbers of order 1, in another order than ours.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
NAN, INF = float("nan"), float("inf")
OBJECTIVES = [
    PolicyOptions(),
    PolicyOptions(clip_dual=1.5),
    PolicyOptions("gspo", clip_low=0.05, clip_high=0.1),
    PolicyOptions("reinforce"),
]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def packing(*lengths: int, mask: Tensor | None = None) -> Packing:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Packing(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, len(lengths))


def case(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Packing]:
    """New and old log-probabilities of sequences, far enough apart that some are clipped; one advantage
    each."""
    draw = torch.Generator().manual_seed(seed)
    packed = packing(*lengths)
    old = -torch.rand(sum(lengths), generator=draw, dtype=torch.float64) * 3
    new = old + 0.4 * torch.randn(sum(lengths), generator=draw, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=draw, dtype=torch.float64)[packed.sequence_ids]
    return new, old, advantages, packed


def gradient(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(of(leaf).sum(), leaf)
    return found


# ---- the policy --------------------------------------------------------------------------------------


def test_the_clipped_surrogate_by_hand() -> None:
    # Ratios 2, 2, 1/2, 1/2, 1.1; bounds 0.8 and 1.28; -min(r A, clip(r) A).
    new = f64(math.log(2), math.log(2), math.log(0.5), math.log(0.5), math.log(1.1))
    args = (new, torch.zeros(5), f64(1, -1, 1, -1, 3), packing(5), PolicyOptions())
    torch.testing.assert_close(policy_loss(*args), f64(-1.28, 2, -0.5, 0.8, -3.3), **CLOSE)
    report = policy_report(*args)
    assert (report.clip_low, report.clip_high, report.clip_dual) == (0.2, 0.2, 0.0)
    assert report.ratio_mean == pytest.approx((2 + 2 + 0.5 + 0.5 + 1.1) / 5)
    assert (report.ratio_min, report.ratio_max) == (pytest.approx(0.5), pytest.approx(2))
    assert report.kl == pytest.approx(-math.log(1.1) / 5)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage() -> None:
    new = f64(math.log(9), math.log(9), math.log(2))
    options = PolicyOptions(clip_dual=3.0)
    args = (new, torch.zeros(3), f64(-1, 1, -1), packing(3), options)
    torch.testing.assert_close(policy_loss(*args), f64(3, -1.28, 2), **CLOSE)
    assert gradient(lambda x: policy_loss(x, *args[1:]), new).tolist() == [0, 0, pytest.approx(2)]
    assert policy_report(*args).clip_dual == pytest.approx(1 / 3)


def test_the_gspo_ratio_by_hand() -> None:
    # log-ratios 0.1, 0.3 -> s = exp(0.2); -0.4 alone -> exp(-0.4), below 0.8.
    options = PolicyOptions("gspo", clip_high=0.5)
    loss = policy_loss(f64(0.1, 0.3, -0.4), torch.zeros(3), f64(2, 2, -1), packing(2, 1), options)
    torch.testing.assert_close(loss, f64(-2 * math.exp(0.2), -2 * math.exp(0.2), 0.8), **CLOSE)


def test_policy_losses_against_a_plain_loop() -> None:
    lengths = [3, 1, 6, 2]
    new, old, advantages, packed = case(*lengths)
    for options in OBJECTIVES:
        expected, start = [], 0
        for length in lengths:
            rows = range(start, start + length)
            log_ratios = [float(new[i] - old[i]) for i in rows]
            for i, log_ratio in zip(rows, log_ratios, strict=True):
                advantage = float(advantages[i])
                if options.objective == "reinforce":
                    expected.append(-advantage * float(new[i]))
                    continue
                mean = sum(log_ratios) / length
                ratio = math.exp(mean if options.objective == "gspo" else log_ratio)
                clipped = min(max(ratio, 1 - options.clip_low), 1 + options.clip_high)
                gain = min(ratio * advantage, clipped * advantage)
                if options.clip_dual and advantage < 0:
                    gain = max(gain, options.clip_dual * advantage)
                expected.append(-gain)
            start += length
        torch.testing.assert_close(
            policy_loss(new, old, advantages, packed, options), f64(*expected), **CLOSE
        )


@pytest.mark.parametrize("options", OBJECTIVES)
def test_gradients_of_the_policy_loss(options: PolicyOptions) -> None:
    new, old, advantages, packed = case(3, 1, 4)
    totals = Totals.of(packed)
    assert torch.autograd.gradcheck(
        lambda x: reduce(policy_loss(x, old, advantages, packed, options), packed, "sequence_mean", totals),
        (new.requires_grad_(),),
    )


def test_on_policy_the_clipped_gradient_is_that_of_reinforce_to_the_bit() -> None:
    new, _, advantages, packed = case(3, 1, 4)
    new = new.float()
    clipped = gradient(lambda x: policy_loss(x, new, advantages, packed, PolicyOptions(clip_dual=3.0)), new)
    plain = gradient(lambda x: policy_loss(x, new, advantages, packed, PolicyOptions("reinforce")), new)
    assert torch.equal(clipped, plain)
    assert torch.equal(plain, -advantages.float())


def test_gspo_is_the_clipped_surrogate_on_answers_of_one_token() -> None:
    new, old, advantages, packed = case(1, 1, 1, 1, 1)
    losses = [policy_loss(new, old, advantages, packed, PolicyOptions(o)) for o in ("gspo", "clipped")]
    assert torch.equal(*losses)


def test_weights_scale_losses_and_get_no_gradient() -> None:
    new, old, advantages, packed = case(2, 3)
    weights = torch.rand(5, dtype=torch.float64).requires_grad_()
    got = policy_loss(new.requires_grad_(), old, advantages, packed, PolicyOptions(), weights=weights)
    plain = policy_loss(new, old, advantages, packed, PolicyOptions())
    assert torch.equal(got, plain * weights.detach())
    got.sum().backward()
    assert weights.grad is None


def test_ratios_of_tokens_that_lost_all_probability_stay_numbers() -> None:
    new, old = f64(0.0, -1e4, -INF), f64(-1e4, 0.0, -1.0)
    for options in OBJECTIVES[:3]:
        args = (old, f64(-1, -1, -1), packing(1, 1, 1), options)
        assert policy_loss(new, *args).isfinite().all()
        assert gradient(lambda x: policy_loss(x, *args), new).tolist() == [0, 0, 0]  # noqa: B023
    report = policy_report(new, *args)
    assert report.ratio_max == pytest.approx(math.exp(20))


@pytest.mark.parametrize("options", OBJECTIVES)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_masked_tokens_influence_nothing(options: PolicyOptions, poison: float) -> None:
    new, old, advantages, packed = case(3, 4, 2)
    mask = torch.tensor([True, False, True, False, True, True, False, True, True])
    kept = [x[mask] for x in (new, old, advantages)]
    small = Packing(packed.sequence_ids[mask], mask[mask], 3)
    dirty = [torch.where(mask, x, poison) for x in (new, old, advantages)]
    wide = Packing(packed.sequence_ids, mask, 3)
    for reduction in ("token_mean", "sequence_mean", "constant_length"):

        def loss(given: list[Tensor], packed: Packing, leaf: Tensor, kind: Reduction = reduction) -> Tensor:
            found = policy_loss(leaf, given[1], given[2], packed, options)
            return reduce(found, packed, kind, Totals.of(packed, length=7))

        assert torch.equal(loss(dirty, wide, dirty[0]), loss(kept, small, kept[0]))
        found = gradient(lambda x: loss(dirty, wide, x), dirty[0])  # noqa: B023
        assert torch.equal(found[mask], gradient(lambda x: loss(kept, small, x), kept[0]))  # noqa: B023
        assert not found[~mask].any()
    assert policy_report(*dirty, wide, options) == policy_report(*kept, small, options)


def test_nan_on_a_trainable_token_is_not_hidden() -> None:
    new, old, advantages, packed = case(2, 2)
    new[1] = NAN
    assert policy_loss(new, old, advantages, packed, PolicyOptions()).isnan().tolist() == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("options", OBJECTIVES)
def test_order_and_neighbours_of_sequences_do_not_change_their_losses(options: PolicyOptions) -> None:
    lengths = [3, 1, 6]
    new, old, advantages, packed = case(*lengths)
    parts = [torch.arange(10)[packed.sequence_ids == s] for s in range(3)]
    together = policy_loss(new, old, advantages, packed, options)
    for order in ([2, 0, 1], [1], [0, 2]):
        rows = torch.cat([parts[s] for s in order])
        other = packing(*[lengths[s] for s in order])
        got = policy_loss(new[rows], old[rows], advantages[rows], other, options)
        assert torch.equal(got, together[rows])


@pytest.mark.parametrize(
    ("given", "field"),
    [({"clip_low": 1.5}, "clip_low"), ({"clip_high": -0.1}, "clip_high"), ({"clip_dual": 1.0}, "clip_dual")],
)
def test_options_out_of_range_are_refused(given: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigError, match=field) as caught:
        PolicyOptions(**given)  # type: ignore[arg-type]
    assert caught.value.field == field


# ---- one number from many ----------------------------------------------------------------------------


def test_reductions_by_hand() -> None:
    # Sequences (1, 3) and (8): sums 4 and 8, means 2 and 8.
    values, packed = f64(1, 3, 8), packing(2, 1)
    totals = Totals.of(packed, length=4)
    assert float(reduce(values, packed, "token_mean", totals)) == 4.0
    assert float(reduce(values, packed, "sequence_mean", totals)) == 5.0
    assert float(reduce(values, packed, "constant_length", totals)) == 1.5


def test_a_sequence_without_trainable_tokens_does_not_count() -> None:
    packed = packing(2, 1, mask=torch.tensor([True, True, False]))
    assert Totals.of(packed) == Totals(2, 1)
    assert float(reduce(f64(1, 3, NAN), packed, "sequence_mean", Totals.of(packed))) == 2.0


def test_dr_grpo_weighs_a_token_whatever_the_lengths() -> None:
    def weight(reduction: Reduction, *lengths: int) -> float:
        packed = packing(*lengths)
        totals = Totals.of(packed, length=8)
        leaf = torch.ones(sum(lengths), dtype=torch.float64)
        return float(gradient(lambda x: reduce(x, packed, reduction, totals), leaf)[0])

    assert {weight("constant_length", *lengths) for lengths in ((1, 1), (7, 2), (1, 8))} == {1 / 16}
    assert weight("sequence_mean", 7, 2) != weight("sequence_mean", 1, 2)
    assert weight("token_mean", 1, 1) != weight("token_mean", 1, 8)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant_length"])
def test_parts_of_a_step_add_up(reduction: Reduction) -> None:
    new, old, advantages, packed = case(3, 1, 6)
    totals = Totals.of(packed, length=6)
    whole = reduce(policy_loss(new, old, advantages, packed, PolicyOptions()), packed, reduction, totals)
    parts = 0.0
    for rows, lengths in ((slice(0, 4), (3, 1)), (slice(4, 10), (6,))):
        loss = policy_loss(new[rows], old[rows], advantages[rows], packing(*lengths), PolicyOptions())
        parts += float(reduce(loss, packing(*lengths), reduction, totals))
    assert parts == pytest.approx(float(whole), abs=1e-14)


def test_an_empty_step_is_0() -> None:
    packed = packing(2, mask=torch.zeros(2, dtype=torch.bool))
    for reduction in ("token_mean", "sequence_mean", "constant_length"):
        assert float(reduce(f64(NAN, 1), packed, reduction, Totals.of(packed))) == 0.0
    report = policy_report(f64(1, 2), f64(1, 2), f64(1, 2), packed, PolicyOptions())
    assert (report.ratio_mean, report.ratio_min, report.ratio_max) == (0.0, 1.0, 1.0)


# ---- value head, entropy, reference ------------------------------------------------------------------


def test_the_value_loss_by_hand() -> None:
    # v 2, old 1, clip 0.2 -> 1.2: against 3 the clipped one is further off, against 0 the plain one.
    loss = value_loss(f64(2, 2, 1.1), f64(1, 1, 1), f64(3, 0, 2), packing(3))
    torch.testing.assert_close(loss, f64(0.5 * 1.8**2, 0.5 * 2**2, 0.5 * 0.9**2), **CLOSE)
    plain = value_loss(
        f64(2, NAN), f64(1, 1), f64(3, 1), packing(2, mask=torch.tensor([True, False])), clip=None
    )
    assert plain.tolist() == [0.5, 0]


def test_gradients_of_the_value_loss() -> None:
    new, old, target, packed = case(3, 4)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, target, packed), (new.requires_grad_(),))


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -INF, -INF]], dtype=torch.float64)
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropy(logits), f64(math.log(4), quarter), **CLOSE)


def test_the_gradient_of_entropy_is_exact() -> None:
    # dH/dz_i = -p_i (log p_i + H)
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(entropy, (logits.clone().requires_grad_(),))
    p = torch.softmax(logits, 1)
    expected = -p * (p.log() + entropy(logits)[:, None])
    torch.testing.assert_close(gradient(entropy, logits), expected, **CLOSE)
    masked = torch.tensor([[0.3, -INF, 0.1]], dtype=torch.float64)
    assert gradient(entropy, masked).isfinite().all()


@pytest.mark.parametrize("estimate", ["k1", "k2", "k3"])
def test_reference_kl_by_hand(estimate: KLEstimate) -> None:
    # log policy - log reference = ln 2: k1 ln 2, k2 ln^2 2 / 2, k3 1/2 - 1 + ln 2.
    policy, reference = f64(math.log(0.5), NAN), f64(math.log(0.25), -1)
    packed = packing(2, mask=torch.tensor([True, False]))
    got = reference_kl(policy, reference, packed, estimate=estimate)
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": math.log(2) - 0.5}[estimate]
    torch.testing.assert_close(got, f64(expected, 0), **CLOSE)


@pytest.mark.parametrize("estimate", ["k1", "k3"])
def test_reference_kl_has_the_right_mean(estimate: KLEstimate) -> None:
    """Over the whole vocabulary, weighted by who samples: the policy, or another with the ratio."""
    p, q, b = (
        torch.softmax(torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)), 0)
        for i in range(3)
    )
    kl = float((p * (p / q).log()).sum())
    packed = packing(7)
    on_policy = reference_kl(p.log(), q.log(), packed, estimate=estimate)
    assert float((p * on_policy).sum()) == pytest.approx(kl, abs=1e-12)
    weighted = reference_kl(p.log(), q.log(), packed, estimate=estimate, behaviour=b.log())
    assert float((b * weighted).sum()) == pytest.approx(kl, abs=1e-12)


def test_the_unbiased_kl_has_the_gradient_of_the_kl_and_plain_k3_has_not() -> None:
    """Means of the estimates' gradients over the vocabulary, against autograd through the exact KL."""
    draws = [
        torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]
    z, q, b = draws[0], torch.log_softmax(draws[1], 0), torch.log_softmax(draws[2], 0)

    def exact(z: Tensor) -> Tensor:
        log_p = torch.log_softmax(z, 0)
        return (log_p.exp() * (log_p - q)).sum()

    def unbiased(z: Tensor) -> Tensor:
        return (b.exp() * reference_kl(torch.log_softmax(z, 0), q, packing(7), behaviour=b)).sum()

    def plain(z: Tensor) -> Tensor:
        p = torch.softmax(z, 0).detach()
        return (p * reference_kl(torch.log_softmax(z, 0), q, packing(7))).sum()

    torch.testing.assert_close(gradient(unbiased, z), gradient(exact, z), **CLOSE)
    assert (gradient(plain, z) - gradient(exact, z)).abs().max() > 0.01


def test_gradients_of_the_reference_kl() -> None:
    new, old, reference, packed = case(3, 2)
    for behaviour in (None, old):
        assert torch.autograd.gradcheck(
            lambda x, b=behaviour: reference_kl(x, reference - 2, packed, behaviour=b),
            (new.clone().requires_grad_(),),
        )


def test_sums_are_in_token_order_whatever_else_is_packed() -> None:
    rng = random.Random(4)
    values = [rng.gauss(0, 1) * 10 ** rng.randrange(-8, 8) for _ in range(50)]
    expected = 0.0
    for value in values:
        expected += value
    packed = packing(3, 50, 2)
    assert float(packed.sums(f64(1, 2, 3, *values, 4, 5))[1]) == expected
