"""The KV manager: what a sequence holds follows its length, and all of it comes back."""

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bittrue.kv.layout import PAGE_TOKENS, pages_for
from bittrue.kv.manager import KVManager

NUM_PAGES, NUM_SLOTS = 8, 3


def test_pages_cover_the_length_exactly() -> None:
    kv = KVManager(4, 1)
    assert kv.admit("a") == 0
    assert kv.page_ids("a") == ()
    for length, pages in ((1, 1), (127, 1), (128, 1), (129, 2), (384, 3)):
        assert kv.extend("a", length)
        assert len(kv.page_ids("a")) == pages and kv.length("a") == length


def test_an_extension_that_does_not_fit_changes_nothing() -> None:
    kv = KVManager(3, 2)
    kv.admit("a"), kv.admit("b")
    assert kv.extend("a", 2 * PAGE_TOKENS)
    before = kv.page_ids("b"), kv.length("b"), kv.num_free_pages
    assert not kv.extend("b", 2 * PAGE_TOKENS)
    assert (kv.page_ids("b"), kv.length("b"), kv.num_free_pages) == before
    assert kv.reach("b") == PAGE_TOKENS
    assert kv.extend("b", kv.reach("b"))
    kv.check()


def test_a_plan_may_keep_the_page_ids_it_was_given() -> None:
    kv = KVManager(3, 1)
    kv.admit("a")
    kv.extend("a", 1)
    planned = kv.page_ids("a")
    kv.extend("a", 300)
    assert planned == (0,) and kv.page_ids("a") == (0, 1, 2)


def test_release_gives_everything_back() -> None:
    kv = KVManager(3, 1)
    kv.admit("a")
    kv.extend("a", 300)
    assert kv.admit("b") is None
    kv.release("a")
    assert (kv.num_free_pages, kv.num_free_slots) == (3, 1)
    assert kv.admit("b") == 0
    kv.check()


def test_what_can_ever_fit_is_the_whole_pool() -> None:
    kv = KVManager(3, 1)
    assert kv.can_ever_fit(3 * PAGE_TOKENS) and not kv.can_ever_fit(3 * PAGE_TOKENS + 1)
    assert not KVManager(3, 0).can_ever_fit(1)


def test_admitting_or_releasing_twice_is_caught() -> None:
    kv = KVManager(1, 2)
    kv.admit("a")
    with pytest.raises(AssertionError, match="twice"):
        kv.admit("a")
    kv.release("a")
    with pytest.raises(KeyError):
        kv.release("a")


class ManagerMachine(RuleBasedStateMachine):
    """Sequences come, grow and go; ``lengths`` is the truth about the live ones."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = self.make_manager()
        self.lengths: dict[str, int] = {}
        self.num_admitted = 0

    def make_manager(self) -> KVManager:
        return KVManager(NUM_PAGES, NUM_SLOTS)

    @rule()
    def admit(self) -> None:
        seq_id = f"s{self.num_admitted}"
        self.num_admitted += 1
        slot = self.kv.admit(seq_id)
        assert (slot is None) == (len(self.lengths) == NUM_SLOTS)
        if slot is not None:
            self.lengths[seq_id] = 0

    @precondition(lambda self: self.lengths)
    @rule(data=st.data(), by=st.integers(0, 4 * PAGE_TOKENS))
    def extend(self, data: st.DataObject, by: int) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.lengths)))
        length = self.lengths[seq_id] + by
        held = sum(pages_for(n) for n in self.lengths.values())
        fits = held - pages_for(self.lengths[seq_id]) + pages_for(length) <= NUM_PAGES
        assert (length <= self.kv.reach(seq_id)) == fits
        assert self.kv.extend(seq_id, length) == fits
        if fits:
            self.lengths[seq_id] = length

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.lengths)))
        self.kv.release(seq_id)
        del self.lengths[seq_id]

    @invariant()
    def no_page_has_two_owners_and_none_is_lost(self) -> None:
        self.kv.check()
        held = [page for seq_id in self.lengths for page in self.kv.page_ids(seq_id)]
        assert len(held) == len(set(held)) == self.kv.num_held_pages == NUM_PAGES - self.kv.num_free_pages
        for seq_id, length in self.lengths.items():
            assert self.kv.length(seq_id) == length and len(self.kv.page_ids(seq_id)) == pages_for(length)


ManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestManager = ManagerMachine.TestCase


class KeepsAPage(KVManager):
    """A planted fault: a sequence's last page is not taken back."""

    def release(self, seq_id: str) -> None:
        cache = self._sequences[seq_id]
        cache.page_ids = cache.page_ids[:-1]
        super().release(seq_id)


class FaultyManagerMachine(ManagerMachine):
    def make_manager(self) -> KVManager:
        return KeepsAPage(NUM_PAGES, NUM_SLOTS)


def test_the_machine_catches_a_planted_leak() -> None:
    hunt = settings(
        max_examples=200, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate]
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(FaultyManagerMachine, settings=hunt)
