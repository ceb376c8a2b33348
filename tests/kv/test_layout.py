"""The ledger against the published cache sizes, and its own sums."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bittrue.config.formats import index_key_format, kv_row_format
from bittrue.errors import ConfigError
from bittrue.kv import layout as kv_layout
from bittrue.kv.layout import PAGE_TOKENS, KVBudget, KVLayout, LayerKind, pages_for
from bittrue.ops import contracts

KIND: dict[int, LayerKind] = {0: "window", 4: "csa", 128: "hca"}


@dataclass(frozen=True)
class Shape:
    """The facts the ledger reads, as spec 1.2 gives them (compress_ratios without the draft layer's)."""

    compress_ratios: tuple[int, ...]
    head_dim: int = 512
    rope_dim: int = 64
    index_head_dim: int = 128
    window: int = 128

    @property
    def num_layers(self) -> int:
        return len(self.compress_ratios)

    def layer_kind(self, layer: int) -> LayerKind:
        return KIND[self.compress_ratios[layer]]


FLASH = Shape((0, 0) + (4, 128) * 20 + (4,))
PRO = Shape((128, 128) + (4, 128) * 29 + (4,))
SMALL = Shape((0, 4, 128), head_dim=32, rope_dim=8, index_head_dim=16, window=16)


def published(shape: Shape, max_draft: int = 0) -> KVLayout:
    return KVLayout.of(shape, level="published", act="bf16", max_draft=max_draft)


@pytest.mark.parametrize(
    ("shape", "layers", "page_bytes", "per_token", "rings_mib"),
    [(FLASH, 43, 449_824, 3_514.2, 3.07), (PRO, 61, 644_024, 5_031.4, 4.35)],
)
def test_sizes_are_the_published_ones(
    shape: Shape, layers: int, page_bytes: int, per_token: float, rings_mib: float
) -> None:
    layout = published(shape)
    assert len(layout.layers) == layers
    assert layout.page_bytes == page_bytes
    assert layout.page_bytes / PAGE_TOKENS == pytest.approx(per_token, abs=0.06)
    assert layout.part_bytes("window") / 2**20 == pytest.approx(rings_mib, abs=0.005)


def test_a_million_tokens_cost_what_the_paper_says() -> None:
    for shape, gib in ((FLASH, 3.435), (PRO, 4.918)):
        layout = published(shape)
        million = layout.pool_bytes(pages_for(2**20), 0) + layout.part_bytes("window")
        assert million / 2**30 == pytest.approx(gib, abs=0.0006)
    flash = KVLayout.of(FLASH, level="maths", act="bf16")
    million = flash.pool_bytes(pages_for(2**20), 0) + flash.part_bytes("window")
    assert million / 2**30 == pytest.approx(6.724, abs=0.0006)


def test_hca_state_is_six_kib_a_layer_without_drafts() -> None:
    layout = published(FLASH)
    assert layout.part_bytes("hca_fold") == 20 * 6 * 2**10
    assert layout.part_bytes("hca_pending") == 0
    assert layout.part_bytes("csa") == 21 * 8 * 2 * 2 * 512 * 4
    assert layout.part_bytes("csa_index") == 21 * 8 * 2 * 2 * 128 * 4


def test_rings_grow_with_the_draft_length_and_pages_do_not() -> None:
    base, draft = published(FLASH), published(FLASH, max_draft=3)
    assert draft.page_bytes == base.page_bytes
    ring, frontier, pending = 3 * 584 * 43, 3 * 2 * 2 * (512 + 128) * 4 * 21, 3 * 2 * 512 * 4 * 20
    assert draft.slot_bytes - base.slot_bytes == ring + frontier + pending


def test_parts_have_the_shapes_of_the_cache_contract() -> None:
    layout = KVLayout.of(SMALL, level="maths", act="f32", max_draft=2)
    shapes = [{part.name: part.shape for part in layer.parts} for layer in layout.layers]
    row, key = 32 * 4, 16 * 4
    assert shapes[0] == {"window": (18, row)}
    assert shapes[1] == {
        "window": (18, row),
        "rows": (32, row),
        "keys": (32, key),
        "csa": (10, 2, 64),
        "csa_index": (10, 2, 32),
    }
    assert shapes[2] == {
        "window": (18, row),
        "rows": (1, row),
        "hca_fold": (3, 32),
        "hca_pending": (2, 2, 32),
    }
    for layer in layout.layers:
        assert layer.row_format == kv_row_format("maths", "f32", 32, 8)
        assert layer.key_format == (index_key_format("maths", "f32", 16) if layer.kind == "csa" else None)


def test_constants_are_those_of_the_op_contract() -> None:
    for name in ("PAGE_TOKENS", "CSA_RATIO", "HCA_RATIO"):
        assert getattr(kv_layout, name) == getattr(contracts, name)
    names = {part.name for layer in published(FLASH).layers for part in layer.parts}
    assert names <= set(contracts.LayerCache.__dataclass_fields__)


@given(
    budget=st.integers(0, 40_000_000),
    max_sequences=st.integers(1, 40),
    max_context=st.integers(1, 5_000),
    shape=st.sampled_from([SMALL, FLASH, Shape((0, 0), window=16)]),
)
def test_fit_stays_in_the_budget_and_wastes_less_than_a_unit(
    budget: int, max_sequences: int, max_context: int, shape: Shape
) -> None:
    layout = published(shape)
    if budget < layout.pool_bytes(1, 1):
        with pytest.raises(ConfigError, match=str(layout.pool_bytes(1, 1))) as caught:
            layout.fit(budget, max_sequences=max_sequences, max_context=max_context)
        assert caught.value.field == "kv_memory" and str(budget) in str(caught.value)
        return
    pages, slots = layout.fit(budget, max_sequences=max_sequences, max_context=max_context)
    most_pages = max_sequences * pages_for(max_context)
    assert 1 <= slots <= max_sequences and slots <= pages <= most_pages
    assert layout.pool_bytes(pages, slots) <= budget
    assert pages == most_pages or layout.pool_bytes(pages + 1, slots) > budget
    if slots > 1:
        assert pages >= pages_for(max_context), "a second sequence came before the first had its full context"


def test_memory_short_of_one_full_context_still_serves_many_sequences() -> None:
    layout = published(SMALL)
    million = 2**20
    budget = layout.pool_bytes(pages_for(million) // 2, 0)
    pages, slots = layout.fit(budget, max_sequences=64, max_context=million)
    assert slots > 1
    assert pages * layout.page_bytes >= 0.74 * budget


def test_fit_refuses_sizes_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="max_context"):
        published(SMALL).fit(10**9, max_sequences=1, max_context=0)
    with pytest.raises(ConfigError, match="max_sequences"):
        published(SMALL).fit(10**9, max_sequences=0, max_context=1)
    with pytest.raises(ConfigError, match="max_draft"):
        published(SMALL, max_draft=-1)


@given(
    page_bytes=st.integers(1, 40),
    slot_bytes=st.integers(0, 200),
    max_sequences=st.integers(1, 9),
    num_tokens=st.integers(1, 2000),
)
def test_the_bytes_told_for_a_sequence_are_the_least_from_which_on_it_fits(
    page_bytes: int, slot_bytes: int, max_sequences: int, num_tokens: int
) -> None:
    budget = KVBudget(page_bytes, slot_bytes, max_sequences)
    needed = budget.needed_for(num_tokens)

    def fits(budget_bytes: int) -> bool:
        return budget.fit(budget_bytes, max_context=2000)[0] >= pages_for(num_tokens)

    assert all(fits(num_bytes) for num_bytes in range(needed, 3 * needed + 2000))
    assert needed == page_bytes + slot_bytes or not fits(needed - 1)


def test_a_budget_without_a_page_and_a_slot_is_refused_and_needs_a_sequence() -> None:
    with pytest.raises(ConfigError, match="raise --kv-memory"):
        KVBudget(100, 50, 4).fit(149, max_context=1)
    assert KVBudget(100, 50, 4).fit(150, max_context=1) == (1, 1)
    with pytest.raises(ConfigError, match="max_sequences is 0"):
        KVBudget(100, 50, 0)
