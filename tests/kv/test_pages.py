"""The page and slot allocators, and a state machine that compares them with a plain list of who has what."""

from collections import Counter
from heapq import heappush

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bittrue.kv.pages import PagePool, SlotPool

NUM_PAGES, NUM_SLOTS = 7, 4


def test_released_pages_are_reusable_lowest_first() -> None:
    pool = PagePool(4)
    assert pool.allocate(3) == (0, 1, 2)
    assert pool.release(1) and pool.release(0)
    assert pool.allocate(3) == (0, 1, 3)


def test_an_allocation_that_does_not_fit_changes_nothing() -> None:
    pool = PagePool(3)
    pool.allocate(2)
    assert pool.allocate(2) is None
    assert (pool.num_free, pool.num_held) == (1, 2)
    assert pool.allocate(0) == ()


def test_a_shared_page_is_free_only_after_its_last_owner() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate(1) or ()
    pool.retain(page)
    assert not pool.release(page)
    assert pool.num_free == 0 and pool.owners(page) == 1
    assert pool.release(page)
    assert pool.num_free == 1 and pool.owners(page) == 0


def test_freeing_twice_is_caught() -> None:
    pages, slots = PagePool(2), SlotPool(2)
    pages.allocate(1)
    pages.release(0)
    with pytest.raises(AssertionError, match="nobody holds"):
        pages.release(0)
    with pytest.raises(AssertionError, match="nobody has"):
        pages.retain(1)
    slot = slots.allocate()
    assert slot == 0
    slots.release(slot)
    with pytest.raises(AssertionError, match="nobody holds"):
        slots.release(slot)


def test_slots_run_out_and_come_back() -> None:
    pool = SlotPool(2)
    assert (pool.allocate(), pool.allocate(), pool.allocate()) == (0, 1, None)
    pool.release(0)
    assert pool.allocate() == 0


def test_a_page_the_tree_keeps_is_cached_until_it_is_dropped() -> None:
    pool = PagePool(2)
    pool.allocate(1)
    pool.keep(0)
    assert pool.num_cached == 0, "a sequence holds it too"
    assert pool.release(0)
    assert (pool.num_free, pool.num_held, pool.num_cached) == (1, 0, 1)
    pool.retain(0)
    assert (pool.num_held, pool.num_cached) == (1, 0)
    pool.drop(0)
    assert pool.release(0) and pool.num_free == 2
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.keep(0)


def test_a_page_is_kept_once() -> None:
    pool = PagePool(1)
    pool.allocate(1)
    pool.keep(0)
    with pytest.raises(AssertionError, match="kept twice"):
        pool.keep(0)


def test_a_snapshot_is_no_slot_to_give_until_it_is_uncached() -> None:
    pool = SlotPool(1)
    slot = pool.allocate()
    assert slot == 0
    pool.cache(slot)
    assert pool.allocate() is None and (pool.num_held, pool.num_cached) == (0, 1)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.release(slot)
    pool.uncache(slot)
    pool.release(slot)
    assert pool.num_free == 1


class PoolMachine(RuleBasedStateMachine):
    """Any calls in any order; ``owned``, ``kept`` and the slots here are the truth about who has what."""

    references = Bundle("references")
    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.pages = self.make_pages()
        self.slot_pool = SlotPool(NUM_SLOTS)
        self.owned: Counter[int] = Counter()
        self.kept: set[int] = set()
        self.held_slots: set[int] = set()
        self.cached_slots: set[int] = set()

    def make_pages(self) -> PagePool:
        return PagePool(NUM_PAGES)

    @rule(target=references, count=st.integers(0, NUM_PAGES))
    def allocate(self, count: int):  # type: ignore[no-untyped-def]
        free = sorted(set(range(NUM_PAGES)) - set(self.owned) - self.kept)
        pages = self.pages.allocate(count)
        assert pages == (tuple(free[:count]) if count <= len(free) else None)
        self.owned.update(pages or ())
        return multiple(*(pages or ()))

    @rule(target=references, page=references)
    def retain(self, page: int) -> int:
        self.pages.retain(page)
        self.owned[page] += 1
        return page

    @rule(page=consumes(references))
    def release(self, page: int) -> None:
        was_last = self.owned[page] == 1
        assert self.pages.release(page) == was_last
        self.owned[page] -= 1
        self.owned += Counter()

    @rule(page=references)
    def keep(self, page: int) -> None:
        if page not in self.kept:
            self.pages.keep(page)
            self.kept.add(page)

    @precondition(lambda self: self.kept)
    @rule(target=references, data=st.data(), again=st.booleans())
    def drop_or_use(self, data: st.DataObject, again: bool):  # type: ignore[no-untyped-def]
        page = data.draw(st.sampled_from(sorted(self.kept)))
        if again:
            return self.retain(page)
        self.pages.drop(page)
        self.kept.remove(page)
        return multiple()

    @rule(target=slots)
    def take_slot(self):  # type: ignore[no-untyped-def]
        slot = self.slot_pool.allocate()
        if len(self.held_slots | self.cached_slots) == NUM_SLOTS:
            assert slot is None
            return multiple()
        assert slot is not None and slot not in self.held_slots | self.cached_slots
        self.held_slots.add(slot)
        return slot

    @rule(slot=consumes(slots))
    def give_slot(self, slot: int) -> None:
        if slot in self.cached_slots:
            self.swap_slot(slot)
        self.slot_pool.release(slot)
        self.held_slots.remove(slot)

    @rule(slot=slots)
    def swap_slot(self, slot: int) -> None:
        """A state becomes a snapshot, or a snapshot the state of somebody."""
        if slot in self.held_slots:
            self.slot_pool.cache(slot)
            self.held_slots.remove(slot)
            self.cached_slots.add(slot)
        else:
            self.slot_pool.uncache(slot)
            self.cached_slots.remove(slot)
            self.held_slots.add(slot)

    @invariant()
    def free_held_and_cached_make_the_total(self) -> None:
        self.pages.check()
        self.slot_pool.check()
        assert self.pages.num_held == len(self.owned)
        assert self.pages.num_cached == len(self.kept - set(self.owned))
        assert self.pages.num_free + self.pages.num_held + self.pages.num_cached == NUM_PAGES
        assert self.slot_pool.num_held == len(self.held_slots)
        assert self.slot_pool.num_cached == len(self.cached_slots)
        assert all(self.pages.owners(page) == self.owned[page] for page in range(NUM_PAGES))
        assert all(self.pages.is_kept(page) == (page in self.kept) for page in range(NUM_PAGES))


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPools = PoolMachine.TestCase


class FreesSharedPages(PagePool):
    """A planted fault: releasing a shared page frees it though an owner is left: a double free."""

    def release(self, page: int) -> bool:
        was_shared = self.owners(page) > 1
        freed = super().release(page)
        if was_shared:
            heappush(self._free, page)
        return freed


class FaultyPoolMachine(PoolMachine):
    def make_pages(self) -> PagePool:
        return FreesSharedPages(NUM_PAGES)


def test_the_machine_catches_a_planted_double_free() -> None:
    hunt = settings(
        max_examples=200, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate]
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(FaultyPoolMachine, settings=hunt)
