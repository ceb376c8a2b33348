"""Tags tell every prefix from every other, checksums every byte, and moves carry both."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cached_runs import CachedRuns

from bittrue.errors import KVCorrupted
from bittrue.kv.canary_units import Part, prefix_hashes
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.kv.moves import CopyPage, LoadPage

TOKENS = st.lists(st.integers(0, 5), max_size=12)


@given(TOKENS, TOKENS)
def test_equal_prefixes_have_equal_tags_and_no_others(one: list[int], other: list[int]) -> None:
    first, second = (prefix_hashes(np.array(tokens, dtype=np.int64)) for tokens in (one, other))
    for i in range(len(one) + 1):
        for j in range(len(other) + 1):
            assert (first[i] == second[j]) == (one[:i] == other[:j])


def test_a_tag_does_not_depend_on_what_follows_or_on_the_length_of_the_call() -> None:
    tokens = np.arange(1000) % 129_280
    assert np.array_equal(prefix_hashes(tokens)[:301], prefix_hashes(tokens[:300]))
    assert len(np.unique(prefix_hashes(np.zeros(100_000, dtype=np.int64)))) == 100_001


@given(st.sampled_from((584, 68, 66, 33, 8)), st.data())
def test_a_change_of_one_byte_changes_the_checksum_of_its_row_alone(width: int, data: st.DataObject) -> None:
    rows = torch.randint(0, 256, (3, 4, width), dtype=torch.uint8)
    part = Part("rows", 0, rows, 4)
    units = np.arange(12)
    before = part.compute(units)
    unit, byte = data.draw(st.integers(0, 11)), data.draw(st.integers(0, width - 1))
    rows[unit // 4, unit % 4, byte] ^= data.draw(st.integers(1, 255))
    assert np.flatnonzero(part.compute(units) != before).tolist() == [unit]


def test_bytes_that_change_places_change_the_checksum() -> None:
    rows = torch.arange(64, dtype=torch.uint8).view(1, 1, 64)
    part = Part("rows", 0, rows, 1)
    before = part.compute(np.array([0]))
    rows[0, 0, [3, 40]] = rows[0, 0, [40, 3]]
    assert part.compute(np.array([0])) != before


def test_many_rows_are_summed_as_each_alone() -> None:
    rows = torch.randint(0, 256, (300, 32, 584), dtype=torch.uint8)
    part = Part("rows", 0, rows, 32)
    units = np.random.default_rng(0).permutation(300 * 32)
    together = part.compute(units)
    assert [int(part.compute(units[i : i + 1])[0]) for i in range(50)] == together[:50].tolist()


def test_a_place_may_be_filled_copied_and_filled_again_in_one_list_of_moves() -> None:
    runs = CachedRuns(1)
    one, other = (runs.store(runs.run(runs.random_tokens(PAGE_TOKENS))) for _ in range(2))
    page, copy = runs.new_page(), runs.new_page()
    blobs = [LoadPage(stored.pages[0], runs.blobs[stored.pages[0]], page) for stored in (one, other)]
    runs.move(blobs[0], CopyPage(page, copy), blobs[1])
    for stored, at in ((one, copy), (other, page)):
        state = runs.load(stored, [*stored.tokens, 1])
        state.pages[0] = at
        runs.step([state], [1])
    assert runs.canary.num_faults == 0


def test_what_was_damaged_before_a_copy_is_found_in_the_copy() -> None:
    runs = CachedRuns(2, mode="log")
    state = runs.run(runs.random_tokens(200))
    _, rows = runs.caches_of("csa_rows")[0]
    rows[state.pages[1], 2] ^= 1
    copy = runs.snapshot(state)
    copy.tokens = [*copy.tokens, 1]
    runs.step([copy], [1])
    assert f'place="page {copy.pages[1]}"' in runs.lines.getvalue() and runs.canary.num_faults == 1


def test_a_copy_over_what_was_loaded_has_the_checksums_of_its_source() -> None:
    runs = CachedRuns(4)
    stored = runs.store(runs.run(runs.random_tokens(PAGE_TOKENS)))
    state = runs.run(runs.random_tokens(PAGE_TOKENS))
    _, rows = runs.caches_of("csa_rows")[0]
    rows[state.pages[0], 2] ^= 1
    page = runs.new_page()
    runs.move(LoadPage(stored.pages[0], runs.blobs[stored.pages[0]], page), CopyPage(state.pages[0], page))
    state.pages[0] = page
    state.tokens.append(1)
    with pytest.raises(KVCorrupted, match=f"content of rows in page {page} "):
        runs.step([state], [1])


def test_a_copy_of_a_loaded_state_is_read_like_the_state() -> None:
    runs = CachedRuns(5)
    stored = runs.store(runs.run(runs.random_tokens(200)))
    copy = runs.snapshot(runs.load(stored, stored.tokens))
    copy.tokens.append(1)
    runs.step([copy], [1])
    assert runs.canary.num_faults == 0


def test_rows_that_a_replay_reads_are_checked_where_it_closes_them() -> None:
    runs = CachedRuns(6)
    tokens = runs.random_tokens(300)
    state = runs.recompute(runs.run(tokens), [*tokens, 1], 290)
    _, keys = runs.caches_of("keys")[0]
    keys[state.pages[2], 7] ^= 1
    assert state.done < 256 + 4 * 7
    with pytest.raises(KVCorrupted, match=f"content of keys in page {state.pages[2]} .* position 287"):
        runs.step([state], [301 - state.done])
