"""The choice of a token depends on its own logits, parameters, position and seed, and on nothing else."""

import numpy as np
import pytest
import torch

from bittrue.engine.sampler import SampleInput, choose_tokens, sample, token_logprob, truncate
from bittrue.engine.types import SamplingParams
from bittrue.ops.dispatch import select

VOCAB = 97
OPS = select("reference")


def item(
    position: int = 5, allowed: np.ndarray | None = None, forbidden: tuple[int, ...] = (), **params: object
):
    return SampleInput(
        params=SamplingParams(**params),  # type: ignore[arg-type]
        position=position,
        prompt=(1, 2, 3),
        generated=(4, 4, 5),
        forbidden=forbidden,
        allowed=allowed,
    )


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_largest_logit_and_the_smaller_id_of_a_tie() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, [40, 7, 90]] = 2.0
    assert choose_tokens(row, [item(temperature=0.0)], OPS) == [7]


def test_a_token_is_the_same_alone_and_in_any_batch() -> None:
    rows = logits(12)
    items = [item(position=i, seed=i % 3, top_p=[1.0, 0.9][i % 2], top_k=[0, 20][i % 2]) for i in range(12)]
    together = choose_tokens(rows, items, OPS)
    alone = [choose_tokens(rows[i : i + 1], [items[i]], OPS)[0] for i in range(12)]
    assert together == alone
    order = [7, 3, 11, 0]
    assert choose_tokens(rows[order], [items[i] for i in order], OPS) == [together[i] for i in order]


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-38, 1e-12])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    rows = logits(6)
    rows[0] = -rows[0].abs()
    rows[1, 3] = 0.0
    greedy = choose_tokens(rows, [item(temperature=0.0)] * 6, OPS)
    for params in ({}, {"top_p": 0.5}, {"top_k": 5, "min_p": 0.1}, {"logit_bias": {2: -100.0}}):
        assert choose_tokens(rows, [item(temperature=temperature, **params)] * 6, OPS) == greedy


def test_seed_and_position_both_change_the_noise() -> None:
    row = torch.zeros(1, VOCAB)
    by_seed = {choose_tokens(row, [item(seed=s)], OPS)[0] for s in range(40)}
    by_position = {choose_tokens(row, [item(position=p)], OPS)[0] for p in range(40)}
    assert len(by_seed) > 20 and len(by_position) > 20


def test_samples_follow_the_softmax_of_scaled_logits() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    temperature = 0.7
    n = 4000
    items = [item(position=p, seed=11, temperature=temperature) for p in range(n)]
    counts = np.bincount(choose_tokens(row.expand(n, -1).contiguous(), items, OPS), minlength=4)
    expected = torch.softmax(row[0].double() / temperature, 0).numpy() * n
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 16.3  # 99.9 % of chi-square with 3 degrees of freedom


def test_top_k_keeps_the_k_largest_and_breaks_ties_by_id() -> None:
    row = np.array([1.0, 3.0, 2.0, 2.0, 2.0], dtype=np.float32)
    assert np.flatnonzero(np.isfinite(truncate(row, SamplingParams(top_k=3)))).tolist() == [1, 2, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    assert np.flatnonzero(np.isfinite(truncate(row, SamplingParams(top_p=0.75)))).tolist() == [0, 1]
    assert np.flatnonzero(np.isfinite(truncate(row, SamplingParams(top_p=0.9)))).tolist() == [0, 1, 2]


def test_min_p_drops_what_is_far_below_the_likeliest() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    assert np.flatnonzero(np.isfinite(truncate(row, SamplingParams(min_p=0.5)))).tolist() == [0, 1]


def test_penalties_and_bias_move_the_choice() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 4] = 1.0
    assert choose_tokens(row, [item(temperature=0.0)], OPS) == [4]
    assert choose_tokens(row, [item(temperature=0.0, frequency_penalty=0.6)], OPS) != [4]
    assert choose_tokens(row, [item(temperature=0.0, presence_penalty=1.5)], OPS) != [4]
    row[0, 9] = 0.9
    assert choose_tokens(row, [item(temperature=0.0, repetition_penalty=2.0)], OPS) == [9]
    assert choose_tokens(row, [item(temperature=0.0, logit_bias={30: 5.0})], OPS) == [30]


def test_masked_tokens_are_never_chosen() -> None:
    allowed = np.zeros(VOCAB, dtype=bool)
    allowed[[8, 13]] = True
    chosen = {choose_tokens(logits(), [item(seed=s, allowed=allowed)], OPS)[0] for s in range(50)}
    assert chosen <= {8, 13}
    assert choose_tokens(logits(), [item(allowed=allowed, forbidden=(8,))], OPS) == [13]


def test_min_tokens_yields_to_a_grammar_that_allows_only_the_end() -> None:
    allowed = np.zeros(VOCAB, dtype=bool)
    allowed[1] = True
    assert choose_tokens(logits(), [item(allowed=allowed, forbidden=(1,))], OPS) == [1]


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_logprobs_are_the_models_and_ordered_with_ties_by_id(num_top: int) -> None:
    row = torch.zeros(1, VOCAB)
    row[0, [50, 20]] = 2.0
    (output,) = sample(row, [item(temperature=0.5, logprobs=num_top)], OPS)
    expected = torch.log_softmax(row[0].double(), 0)
    assert output.logprob is not None
    assert output.logprob.logprob == pytest.approx(float(expected[output.token_id]), abs=1e-6)
    assert len(output.logprob.top) == num_top
    assert [i for i, _ in output.logprob.top[:2]] == [20, 50][: min(num_top, 2)]


def test_top_logprobs_are_capped_at_the_vocabulary() -> None:
    report = token_logprob(torch.log_softmax(torch.zeros(4), 0), 2, 9)
    assert [i for i, _ in report.top] == [0, 1, 2, 3]
