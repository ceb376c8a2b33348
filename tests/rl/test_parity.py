import math
import random

import numpy as np
import pytest

from bittrue.errors import ConfigError, ParityBroken
from bittrue.rl.parity import BOUNDS, Parity, check, check_selection, compare_selections, measure

NAN = float("nan")


def parity(recorded: list[float], recomputed: list[float], ids: list[int] | None = None) -> Parity:
    size = len(recorded)
    return measure(
        np.array(recorded, np.float32),
        np.array(recomputed, np.float32),
        np.array(ids or [0] * size, np.int64),
        np.ones(size, bool),
    )


# ---- log-probabilities -------------------------------------------------------------------------------


def test_a_parity_by_hand() -> None:
    # d = 0, -1, 0.5
    found = parity([-1.0, -1.0, -2.0], [-1.0, -2.0, -1.5], [0, 0, 1])
    assert (found.num_tokens, found.differing) == (3, 2)
    assert (found.mean_abs, found.max_abs, found.worst.tolist()) == (0.5, 1.0, [1.0, 0.5])
    assert found.k1 == pytest.approx(0.5 / 3)
    assert found.k3 == pytest.approx((math.exp(-1) - 1 + 1 + math.exp(0.5) - 1 - 0.5) / 3)
    assert found.chi2 == pytest.approx((0 + math.exp(-2) - 1 + math.exp(1) - 1) / 3)
    assert found.beyond_ln2 == pytest.approx(1 / 3)
    assert found.first is not None
    assert (found.first.sequence, found.first.token) == (0, 1)


def test_estimates_have_the_means_they_estimate() -> None:
    """Over a whole vocabulary, weighted as the engine samples: KL(engine || trainer) and chi-square."""
    rng = np.random.default_rng(0)
    p, q = (x / x.sum() for x in rng.random((2, 5)) + 0.2)
    one = [parity([math.log(a)], [math.log(b)]) for a, b in zip(p, q, strict=True)]
    kl = float((p * np.log(p / q)).sum())
    # Log-probabilities are f32 here: off by 2^-24 of about 1 each.
    assert sum(a * x.k1 for a, x in zip(p, one, strict=True)) == pytest.approx(kl, abs=1e-6)
    assert sum(a * x.k3 for a, x in zip(p, one, strict=True)) == pytest.approx(kl, abs=1e-6)
    chi2 = float((q * q / p).sum()) - 1
    assert sum(a * x.chi2 for a, x in zip(p, one, strict=True)) == pytest.approx(chi2, abs=1e-6)


def test_equal_bits_are_exact() -> None:
    found = parity([-1.5, 0.0, -3.25], [-1.5, 0.0, -3.25])
    assert (found.differing, found.mean_abs, found.max_abs, found.k1, found.k3, found.chi2) == (0,) * 6
    assert found.first is None
    check(found, "exact")
    check(parity([], []), "exact")


def test_exact_names_the_first_token_that_differs_by_one_bit() -> None:
    nudged = float(np.nextafter(np.float32(-1.0), np.float32(0)))
    found = parity([-1.0, -2.0, -1.0, -2.0], [-1.0, -2.0, nudged, -2.5], [0, 0, 1, 1])
    with pytest.raises(ParityBroken) as caught:
        check(found, "exact")
    assert (caught.value.sequence, caught.value.token, caught.value.exit_code) == (1, 0, 4)
    text = str(caught.value)
    assert "2 of 4 tokens differ" in text
    assert "sequence 1, token 0: the engine recorded -1.0 (0xbf800000)" in text
    assert f"computes {nudged!r} (0xbf7fffff)" in text


def test_a_zero_of_the_other_sign_is_not_exact() -> None:
    found = parity([0.0], [-0.0])
    assert (found.max_abs, found.differing) == (0, 1)
    with pytest.raises(ParityBroken, match="0x80000000"):
        check(found, "exact")


@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["exact", *BOUNDS])
def test_what_is_no_number_passes_no_mode_even_if_both_have_it(mode: str, bad: float) -> None:
    with pytest.raises(ParityBroken) as caught:
        check(parity([-1.0, bad], [-1.0, bad], [0, 1]), mode)
    assert caught.value.sequence == 1


def test_masked_tokens_are_not_measured() -> None:
    mask = np.array([True, False, True, False])
    given = [np.array(x, np.float32) for x in ([-1, NAN, -2, 0], [-1, 5, -2.5, NAN])]
    found = measure(*given, np.array([0, 0, 1, 1]), mask)
    assert (found.num_tokens, found.max_abs, found.differing) == (2, 0.5, 1)
    assert found.worst.tolist() == [0, 0.5]
    # The place counts tokens of the packed sequence, masked ones too.
    assert found.first is not None
    assert (found.first.sequence, found.first.token) == (1, 0)


@pytest.mark.parametrize(
    ("mode", "inside", "outside", "name"),
    [
        ("f32", 9e-6, 1.1e-5, "max_abs"),
        ("bf16", 4.9e-3, 5.1e-3, "mean_abs"),
        ("fp8", 0.09, 0.11, "k3"),  # k3 is about d^2 / 2: 4e-3, 6e-3
        ("fp4", 0.16, 0.18, "k3"),
    ],
)
def test_bounds_of_a_precision(mode: str, inside: float, outside: float, name: str) -> None:
    # Near 0, where f32 holds 1e-5 to better than the gap to the bound.
    check(parity([-0.25, -0.25], [-0.25 + inside, -0.25 - inside]), mode)
    with pytest.raises(ParityBroken, match=f"bounds of {mode}: {name} is .* worst is sequence 1") as caught:
        check(parity([-0.25, -0.25], [-0.25 + outside * 0.99, -0.25 - outside * 1.01], [0, 1]), mode)
    assert caught.value.sequence == 1


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of exact, f32, bf16, fp8, fp4"):
        check(parity([], []), "loose")


def test_far_apart_values_stay_numbers() -> None:
    found = parity([-1000.0, 0.0], [0.0, -1000.0])
    assert math.isfinite(found.k3)
    assert math.isfinite(found.chi2)
    assert found.max_abs == 1000.0


# ---- what was chosen ---------------------------------------------------------------------------------


def choices(tokens: int, *, layers: int = 3, k: int = 2, of: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = [[rng.choice(of, k, replace=False) for _ in range(layers)] for _ in range(tokens)]
    return np.array(ids, np.uint8)


def test_a_selection_by_hand() -> None:
    a = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[1, 2], [3, 4]]])
    b = np.array([[[2, 1], [3, 4]], [[5, 9], [8, 6]], [[1, 2], [4, 3]]])
    found = compare_selections(a, b)
    assert (found.num_tokens, found.first_token) == (3, 1)
    assert (found.flips, found.token_flips) == (pytest.approx(2 / 6), pytest.approx(1 / 3))
    assert found.overlap == pytest.approx((1 + 1 + 0.5 + 0.5 + 1 + 1) / 6)


def test_selections_against_python_sets() -> None:
    rng = random.Random(5)
    rows = []
    for _ in range(200):
        pair = [rng.sample(range(12), rng.randrange(6)) for _ in range(2)]
        rows.append([ids + [-1] * (5 - len(ids)) for ids in pair])
    a, b = (np.array([row[side] for row in rows], np.int32).reshape(50, 4, 5) for side in (0, 1))
    shares = []
    for left, right in rows:
        x, y = set(left) - {-1}, set(right) - {-1}
        shares.append(len(x & y) / max(len(x), len(y)) if x or y else 1.0)
    found = compare_selections(a, b)
    assert found.overlap == pytest.approx(sum(shares) / 200, abs=1e-12)
    assert found.flips == pytest.approx(sum(s < 1 for s in shares) / 200, abs=1e-12)
    tokens = [any(s < 1 for s in shares[i : i + 4]) for i in range(0, 200, 4)]
    assert (found.token_flips, found.first_token) == (pytest.approx(sum(tokens) / 50), tokens.index(True))


def test_order_within_a_set_does_not_matter() -> None:
    ids = choices(30)
    found = compare_selections(ids, ids[:, :, ::-1])
    assert (found.flips, found.token_flips, found.overlap, found.first_token) == (0, 0, 1, -1)
    check_selection(found, "experts", min_overlap=1.0)


def test_few_flips_pass_and_a_shuffled_record_does_not() -> None:
    ids = choices(200)
    few = ids.copy()
    few[7, 1, 0] = 99
    found = compare_selections(ids, few)
    check_selection(found, "experts", min_overlap=0.99)
    assert found.first_token == 7
    shuffled = ids[np.random.default_rng(1).permutation(200)]
    found = compare_selections(shuffled, ids)
    # Two random sets of 2 of 16 share 1/8; of 600 sets the mean is within 3 standard errors of 0.01.
    assert found.overlap == pytest.approx(1 / 8, abs=0.03)
    with pytest.raises(ParityBroken, match="the record of experts overlaps 0.1") as caught:
        check_selection(found, "experts", min_overlap=0.9)
    assert caught.value.token == found.first_token


@pytest.mark.parametrize("by", [1, -1])
def test_a_shifted_record_is_named_as_such_even_where_neighbours_are_alike(by: int) -> None:
    # Index rows of neighbouring tokens share most ids: an overlap alone would pass.
    ids = np.stack([np.arange(t, t + 20) for t in range(100)]).astype(np.uint16)[:, None, :]
    found = compare_selections(np.roll(ids, by, axis=0), ids)
    assert found.overlap > 0.9
    with pytest.raises(ParityBroken, match="is shifted: .* 1.000 when moved by one token"):
        check_selection(found, "index rows", min_overlap=0.8)


def test_records_of_other_shapes_are_refused() -> None:
    with pytest.raises(ParityBroken, match=r"shape \[4, 3, 2\], recomputed ones \[5, 3, 2\]"):
        compare_selections(choices(4), choices(5))


def test_nothing_recorded_is_nothing_flipped() -> None:
    found = compare_selections(choices(0).reshape(0, 3, 2), choices(0).reshape(0, 3, 2))
    assert (found.num_tokens, found.flips, found.overlap, found.first_token) == (0, 0, 1, -1)
