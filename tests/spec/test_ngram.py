"""Drafts by looking back: the longest suffix, its most recent earlier place, and what it costs to keep up."""

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bittrue.spec import ngram
from bittrue.spec.ngram import MAX_N, MIN_N, NgramIndex, NgramProposer, ngram_hash
from bittrue.spec.proposer import DraftView

NOTHING = torch.empty(0)


def plain(tokens: list[int], wants: int) -> tuple[int, ...]:
    """The definition: look at every place."""
    for n in range(MAX_N, MIN_N - 1, -1):
        for end in range(len(tokens) - 2, n - 2, -1):
            if len(tokens) >= n and tokens[end - n + 1 : end + 1] == tokens[-n:]:
                known = list(tokens)
                for i in range(wants):
                    known.append(known[end + 1 + i])
                return tuple(known[len(tokens) :])
    return ()


def drafts(proposer: NgramProposer, tokens: list[int], wants: int, seq_id: str = "a") -> tuple[int, ...]:
    view = DraftView(seq_id, 0, tokens, len(tokens) - 1, len(tokens) - 1, 0, wants)

    def choose(*args: object) -> list[int]:
        raise AssertionError("nothing is drawn")

    return proposer.after_step(NOTHING, [view], choose)[0]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(1, 9), max_size=8),
    st.integers(1, 7),
    st.sampled_from([4, 16, 2048]),
)
def test_drafts_are_those_of_looking_at_every_place(
    tokens: list[int], growth: list[int], wants: int, bulk: int
) -> None:
    # A small ``bulk`` makes most of what is found lie in the sorted part.
    saved, ngram._BULK = ngram._BULK, bulk  # type: ignore[misc]
    try:
        proposer, count = NgramProposer(), 0
        for more in [*growth, len(tokens)]:
            count = min(len(tokens), count + more)
            assert drafts(proposer, tokens[:count], wants) == plain(tokens[:count], wants)
    finally:
        ngram._BULK = saved  # type: ignore[misc]


def test_a_long_text_that_grows_drafts_as_looking_at_every_place() -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(30) for _ in range(2100)]
    proposer = NgramProposer()
    found = 0
    for _ in range(1200):
        tokens.append(rng.randrange(30) if rng.random() < 0.3 else tokens[-7])
        if rng.random() < 0.1:
            got = drafts(proposer, tokens, 5)
            assert got == plain(tokens, 5)
            found += bool(got)
    assert found > 50


def test_repeated_text_gives_as_many_drafts_as_are_wanted() -> None:
    assert drafts(NgramProposer(), [7, 1, 2, 1, 2], 7) == (1, 2, 1, 2, 1, 2, 1)
    assert drafts(NgramProposer(), [5, 5, 5], 3) == (5, 5, 5)


def test_the_longest_suffix_wins_over_a_more_recent_short_one() -> None:
    assert drafts(NgramProposer(), [1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3], 1) == (9,)


def test_the_most_recent_place_wins_among_equals() -> None:
    assert drafts(NgramProposer(), [1, 2, 7, 1, 2, 8, 1, 2], 1) == (8,)


def test_text_that_never_repeats_is_not_drafted() -> None:
    assert drafts(NgramProposer(), list(range(50)), 4) == ()
    assert drafts(NgramProposer(), [1], 4) == ()


def test_sequences_do_not_see_each_other_and_are_forgotten() -> None:
    proposer = NgramProposer()
    assert drafts(proposer, [1, 2, 3, 1, 2], 1, "a") == (3,)
    assert drafts(proposer, [1, 2], 1, "b") == ()
    proposer.forget("a")
    assert drafts(proposer, [1, 2], 1, "a") == ()  # another text under the same name
    proposer.forget("nobody")


def test_nothing_is_indexed_before_drafts_are_wanted() -> None:
    proposer = NgramProposer()
    assert drafts(proposer, [1, 2, 1, 2], 0) == ()
    assert not proposer._indexes


def test_tokens_that_were_taken_back_are_a_bug() -> None:
    index = NgramIndex()
    index.find([1, 2, 3, 4])
    with pytest.raises(AssertionError, match="taken back"):
        index.find([1, 2])


@given(st.lists(st.integers(0, 2**17), min_size=MAX_N, max_size=20))
def test_one_hash_and_many_agree(tokens: list[int]) -> None:
    index = NgramIndex()
    index._sort(tokens, len(tokens))
    for n in range(MIN_N, MAX_N + 1):
        keys = index._sorted[n].tolist()
        want = sorted(
            (ngram_hash(tokens[i - n + 1 : i + 1]) << ngram._POSITION_BITS) | i
            for i in range(n - 1, len(tokens))
        )
        assert keys == want


def test_a_long_prompt_is_indexed_in_bulk_and_kept_in_24_bytes_a_token() -> None:
    count = 100_000
    ids = np.random.default_rng(0).integers(0, 129_280, count).tolist()
    times = []
    for _ in range(3):
        index, begun = NgramIndex(), time.perf_counter()
        index.find(ids)
        times.append(time.perf_counter() - begun)
    # Seen: 17 ms. One dictionary entry per n-gram would take 200.
    assert min(times) < 0.06, times
    assert sum(keys.nbytes for keys in index._sorted.values()) <= 24 * count
    assert not any(index._latest.values())


def test_the_dictionaries_stay_bounded_as_a_sequence_grows() -> None:
    index, tokens, most = NgramIndex(), [1], 0
    for token in range(9000):
        tokens.append(token)
        index.find(tokens)
        most = max(most, *(len(latest) for latest in index._latest.values()))
        assert most <= max(2048, len(tokens) // 2)
    assert most >= 2047
