"""The window ring holds the last rows of every sequence, each at its position."""

import pytest
import torch
from cache_steps import (
    NUM_SLOTS,
    Part,
    chunkings,
    garbage,
    gather,
    ops_under_test,
    page_tables,
    slot_of,
    step,
    steps_of,
)


def rows_of(length: int, seq: int) -> torch.Tensor:
    """Row of position p of sequence q: its bytes tell both."""
    at = torch.arange(length)
    return torch.stack((at % 251, at // 251, torch.full_like(at, seq)), dim=1).to(torch.uint8)


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("ring", [1, 8, 11])
def test_every_position_lies_at_its_own_slot_however_the_steps_are_cut(ops, ring):
    lengths = (20, 40)
    rows = [rows_of(length, q) for q, length in enumerate(lengths)]
    for cuts in zip(*(chunkings(length, seed=q) for q, length in enumerate(lengths)), strict=True):
        window = garbage(NUM_SLOTS, ring, 3, dtype=torch.uint8)
        for parts in steps_of(cuts):
            ops["store_window"](gather(rows, parts[::-1]), step(parts[::-1], page_tables(2, 1)), window)
        for q, length in enumerate(lengths):
            for p in range(length - ring, length):
                assert torch.equal(window[slot_of(q), p % ring], rows[q][p])
        others = [s for s in range(NUM_SLOTS) if s not in {slot_of(0), slot_of(1)}]
        assert bool((window[others] == 0xFF).all())


@pytest.mark.parametrize("ops", ops_under_test())
def test_a_short_sequence_leaves_the_rest_of_its_ring_alone(ops):
    window = garbage(NUM_SLOTS, 8, 3, dtype=torch.uint8)
    rows = [rows_of(3, 0)]
    ops["store_window"](gather(rows, []), step([], page_tables(1, 1)), window)
    assert bool((window == 0xFF).all())
    ops["store_window"](rows[0], step([Part(0, 0, 3)], page_tables(1, 1)), window)
    assert torch.equal(window[slot_of(0), :3], rows[0])
    assert bool((window[slot_of(0), 3:] == 0xFF).all())
