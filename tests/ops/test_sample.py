"""log_softmax, and Gumbel noise that is a function of (seed, position, id) and has the right distribution."""

import math

import pytest
import torch

WORD = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & WORD, p0 >> 32 ^ c[3] ^ k[1], p0 & WORD]
        k = [k[0] + 0x9E3779B9 & WORD, k[1] + 0xBB67AE85 & WORD]
    return c


def noise(seed: int, position: int, token: int) -> float:
    counter = [token // 4, position & WORD, position >> 32, 0]
    word = philox(counter, [seed & WORD, seed >> 32])[token % 4]
    return -math.log(-math.log(((word >> 8) + 0.5) / 2**24))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, words):
    assert philox(counter, key) == [int(w, 16) for w in words.split()]


def test_gumbel_noise_is_philox_of_seed_position_and_id(ops):
    """Within one ulp: the logarithms of two mathematics libraries may round differently."""
    seeds = [0, 1, 2**31, 2**32 + 5, 2**63 - 1]
    positions = [0, 7, 2**31, 1_048_575, 2**40 + 3]
    got = ops.gumbel(torch.tensor(seeds), torch.tensor(positions), 23)
    assert got.shape == (5, 23) and got.dtype == torch.float32
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for token in range(23):
            want = noise(seed, position, token)
            assert abs(got[row, token].item() - want) <= 2.0**-23 * abs(want)


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 31, 129])
def test_noise_does_not_depend_on_vocabulary_or_neighbours(ops, vocab):
    seeds, positions = torch.tensor([3, 3, 9]), torch.tensor([5, 6, 5])
    full = ops.gumbel(seeds, positions, 160)
    assert torch.equal(ops.gumbel(seeds, positions, vocab), full[:, :vocab])
    assert torch.equal(ops.gumbel(seeds[1:2].clone(), positions[1:2].clone(), 160), full[1:2])
    assert not torch.equal(full[0], full[1]) and not torch.equal(full[0], full[2])


def test_no_rows_give_no_noise(ops):
    none = torch.zeros(0, dtype=torch.int64)
    assert ops.gumbel(none, none, 10).shape == (0, 10)
    assert ops.log_softmax(torch.zeros(0, 10)).shape == (0, 10)


def test_noise_has_the_moments_of_the_gumbel_distribution(ops):
    values = ops.gumbel(torch.full((20,), 11), torch.arange(20), 10_000).double()
    deviation = math.pi / 6**0.5 / values.numel() ** 0.5
    assert abs(values.mean().item() - 0.5772156649) < 4 * deviation
    assert abs(values.var().item() - math.pi**2 / 6) < 0.03
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_the_largest_logit_with_noise_is_a_draw_from_the_softmax(ops, over):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5])
    draws = 40_000
    varying, fixed = torch.arange(draws) * 7919, torch.full((draws,), 42)
    seeds, positions = (varying, fixed) if over == "seeds" else (fixed, varying)
    counts = (logits + ops.gumbel(seeds, positions, 7)).argmax(-1).bincount(minlength=7).double()
    expected = logits.double().softmax(-1) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # chi-square of 6 degrees, p = 0.001


@pytest.mark.parametrize("vocab", [1, 5, 16, 100, 4099, 129_280])
def test_log_softmax_is_its_formula(ops, vocab):
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 8
    exact = logits.double().log_softmax(-1)
    got = ops.log_softmax(logits)
    # Two roundings, of the normaliser and of the difference, and 2^-20 for the sum of exponentials.
    normaliser = logits.double().logsumexp(-1, keepdim=True)
    assert ((got.double() - exact).abs() <= 2.0**-24 * (normaliser.abs() + exact.abs()) + 2.0**-20).all()
    assert abs(got.double().exp().sum(-1) - 1).max() < 1e-5


def test_huge_and_absent_logits_are_kept_apart(ops):
    got = ops.log_softmax(torch.tensor([[3e38, -3e38, 0.0], [5.0, -math.inf, 5.0], [-1e4, -1e4, -1e4]]))
    assert got[0].tolist() == [0.0, -math.inf, torch.tensor(-3e38).item()]
    assert got[1, 1] == -math.inf
    assert torch.allclose(got[1, [0, 2]], torch.tensor(-math.log(2.0)))
    assert torch.allclose(got[2], torch.tensor(-math.log(3.0)), atol=1e-3)


@pytest.mark.parametrize("vocab", [37, 4096, 9001, 129_280])
@pytest.mark.parametrize("rows", [3, 6])
def test_a_row_has_the_same_bits_alone_and_among_others(ops, rows, vocab):
    """A few rows are cut into parts for the threads, many are taken whole."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
    together = ops.log_softmax(logits)
    assert torch.equal(together, torch.cat([ops.log_softmax(row[None].clone()) for row in logits]))


@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 4095, 4096, 4097, 129_280])
def test_argmax_is_the_first_of_the_largest(ops, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-6, 7, (5, vocab), generator=generator).float()
    logits[4] = -math.inf
    want = torch.from_numpy(logits.numpy().argmax(-1))
    assert torch.equal(ops.argmax(logits), want)
    for place in {0, vocab // 2, vocab - 1}:
        marked = logits.clone()
        marked[:, place] = 9.0
        assert ops.argmax(marked).tolist() == [place] * 5
        marked[:, place:] = math.nan
        assert ops.argmax(marked).tolist() == [place] * 5
    assert ops.argmax(logits[:0]).shape == (0,)


def test_zeros_of_either_sign_are_equal(ops):
    assert ops.argmax(torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]])).tolist() == [1, 1]
