"""The KV manager: what a sequence holds follows its length, and what it computed is found again."""

from collections.abc import Sequence

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
from kv.symbolic_tiers import SymbolicTiers

from bittrue.kv.identity import STATE_HEAD
from bittrue.kv.layout import PAGE_TOKENS, pages_for
from bittrue.kv.manager import Admission, CachePolicy, KVManager
from bittrue.kv.moves import ClearSlot, CopyPage, CopySlot, LoadPage, LoadState, Move, SavePage, SaveState

NUM_PAGES, NUM_SLOTS = 8, 3
SPACE = b"space"
# A replay takes 16 tokens, or those of the open page and 8.
POLICY = CachePolicy(snapshot_every=0, num_layers=2, window=9)


def run_of(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


class Cached:
    """A manager, and whole lives of sequences in it."""

    def __init__(self, pages: int = 16, slots: int = 6, tiers: SymbolicTiers | None = None) -> None:
        self.tiers = tiers
        self.kv = KVManager(pages, slots, POLICY, tiers)

    def admit(self, name: str, tokens: Sequence[int], limit: int | None = None) -> Admission:
        limit = len(tokens) - 1 if limit is None else limit
        assert self.kv.is_ready(name, tokens, SPACE, limit)
        admission = self.kv.admit(name, tokens, SPACE, limit=limit, ahead=1000)
        assert admission is not None
        self.kv.check()
        return admission

    def run(self, name: str, tokens: Sequence[int]) -> Admission:
        """Computes all of ``tokens`` and ends."""
        admission = self.admit(name, tokens)
        assert self.kv.extend(name, len(tokens))
        self.end(name, tokens)
        return admission

    def end(self, name: str, tokens: Sequence[int]) -> None:
        self.kv.release(name, tokens, len(tokens))
        for move in self.kv.take_moves():
            if self.tiers is not None and isinstance(move, SavePage):
                self.tiers.save(move.space, move.name, "page")
            elif self.tiers is not None and isinstance(move, SaveState):
                head = STATE_HEAD.pack(move.position, move.fold)
                self.tiers.save(move.space, move.name, "state", head)
        self.kv.check()

    def moves(self, *kinds: type[Move]) -> list[Move]:
        return [move for move in self.kv.take_moves() if isinstance(move, kinds)]


# ---- memory ----------------------------------------------------------------------------------------------


def test_pages_cover_the_length_exactly() -> None:
    kv = KVManager(4, 1)
    assert kv.admit("a") == Admission(slot=0)
    assert kv.page_ids("a") == (0,), "the page of its next token"
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
    planned = kv.page_ids("a")
    kv.extend("a", 300)
    assert planned == (0,) and kv.page_ids("a") == (0, 1, 2)


def test_pages_of_rejected_drafts_come_back() -> None:
    kv = KVManager(3, 1)
    kv.admit("a")
    kv.extend("a", 130)
    kv.shrink("a", 128)
    assert kv.page_ids("a") == (0,) and kv.length("a") == 128 and kv.num_free_pages == 2
    kv.check()


def test_release_gives_everything_back() -> None:
    kv = KVManager(3, 1)
    kv.admit("a")
    kv.extend("a", 300)
    assert kv.admit("b") is None
    kv.release("a")
    assert (kv.num_free_pages, kv.num_free_slots) == (3, 1)
    assert kv.admit("b") == Admission(slot=0)
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


# ---- hits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 100, 127, 128, 129, 300])
def test_a_hit_is_exact_to_the_token_and_short_prompts_hit(length: int) -> None:
    cached = Cached()
    cached.run("a", run_of(length))
    hit = cached.admit("b", [*run_of(length), 999])
    assert (hit.start, hit.kept, hit.tier) == (length, length, "device")
    assert cached.kv.hit_tokens == {"device": length} and cached.kv.replayed_tokens == 0


def test_full_pages_are_shared_and_the_open_one_is_copied() -> None:
    cached = Cached()
    one = cached.admit("a", run_of(300))
    assert cached.kv.extend("a", 300)
    pages = cached.kv.page_ids("a")
    cached.kv.snapshot("a", run_of(300), 300)
    assert cached.moves(CopySlot)
    two = cached.admit("b", run_of(310))
    assert two.start == 300 and two.slot != one.slot
    mine = cached.kv.page_ids("b")
    assert mine[:2] == pages[:2] and mine[2] != pages[2]
    assert cached.kv.take_moves() == (
        CopySlot(2 - one.slot - two.slot + 1, two.slot),
        CopyPage(pages[2], mine[2]),
    )


def test_an_open_page_without_a_row_is_not_copied() -> None:
    cached = Cached()
    cached.run("a", run_of(131))
    cached.admit("b", run_of(140))
    assert not cached.moves(CopyPage) and len(cached.kv.page_ids("b")) == 2


def test_only_the_tokens_asked_for_are_taken_from_the_cache() -> None:
    cached = Cached()
    cached.run("a", run_of(100))
    assert cached.admit("b", run_of(200), limit=0) == Admission(
        slot=cached.kv.slot("b"), promised=1, start=0, kept=0, fold=0
    )


def test_without_a_snapshot_stored_rows_are_replayed_from_nothing() -> None:
    cached = Cached()
    cached.run("a", run_of(300))
    hit = cached.admit("b", [*run_of(260), *run_of(50, 900)])
    assert (hit.start, hit.kept, hit.fold, hit.tier) == (260 - POLICY.replay_tokens(260), 260, 243, "replay")
    assert cached.moves(ClearSlot) == [ClearSlot(hit.slot)]
    assert cached.kv.replayed_tokens == 17 and cached.kv.hit_tokens == {"replay": 243}


def test_between_a_snapshot_and_the_end_of_the_match_rows_are_read_and_not_written() -> None:
    cached = Cached()
    cached.run("a", run_of(60))
    cached.run("b", run_of(70))
    cached.run("c", [*run_of(60), 900])
    hit = cached.admit("d", [*run_of(66), 800])
    assert (hit.start, hit.kept, hit.tier) == (60, 66, "device") and cached.kv.replayed_tokens == 6


def test_a_replay_leaves_nothing_before_its_state_is_exact() -> None:
    cached = Cached()
    cached.run("a", run_of(300))
    tokens = [*run_of(260), *run_of(50, 900)]
    hit = cached.admit("b", tokens)
    assert (
        cached.kv.next_stop("b", hit.start, 259) is None and cached.kv.next_stop("b", hit.start, 260) == 260
    )
    cached.kv.take_moves()
    cached.kv.snapshot("b", tokens[:259], 259)
    assert cached.kv.take_moves() == ()
    cached.kv.snapshot("b", tokens[:260], 260)
    assert len(cached.kv.take_moves()) == 1
    cached.kv.check()


def test_of_equal_pages_one_stays() -> None:
    cached = Cached()
    cached.admit("a", run_of(300), limit=0)
    cached.admit("b", run_of(300), limit=0)
    assert cached.kv.extend("a", 300) and cached.kv.extend("b", 300)
    assert cached.kv.num_held_pages == 6
    cached.kv.snapshot("a", run_of(300), 300)
    cached.kv.snapshot("b", run_of(300), 300)
    assert cached.kv.num_held_pages == 4, "the full pages are one; each has its own open page"
    assert cached.kv.page_ids("a")[:2] == cached.kv.page_ids("b")[:2]
    cached.kv.check()


def test_the_only_snapshot_hands_its_slot_over_and_no_byte_moves() -> None:
    cached = Cached(slots=1)
    cached.run("a", run_of(100))
    hit = cached.admit("b", run_of(120))
    assert hit.start == 100 and not cached.moves(CopySlot, ClearSlot)
    assert cached.kv.num_evicted == (0, 1)


def test_an_open_page_may_become_its_own_copy() -> None:
    """The last page of the pool is the one to be copied: it is given up, and is the copy."""
    cached = Cached(pages=1)
    cached.run("a", run_of(100))
    hit = cached.admit("b", run_of(110))
    assert hit.start == 100 and not cached.moves(CopyPage) and cached.kv.page_ids("b") == (0,)


def test_what_is_released_without_tokens_leaves_nothing() -> None:
    cached = Cached()
    cached.admit("a", run_of(100))
    cached.kv.release("a")
    assert cached.kv.num_cached_pages == cached.kv.num_cached_slots == 0


def test_counts_tell_what_was_looked_up_and_what_hit() -> None:
    cached = Cached()
    cached.run("a", run_of(100))
    cached.run("b", run_of(150))
    cached.run("c", run_of(20, 5000))
    assert cached.kv.lookup_tokens == 270 and cached.kv.hit_tokens == {"device": 100}
    assert cached.kv.flush() == (3, 3)
    assert cached.admit("d", run_of(100)).start == 0
    assert cached.kv.hit_tokens == {"device": 100} and cached.kv.lookup_tokens == 370


def test_a_sequence_that_outlives_a_flush_is_cached_again() -> None:
    cached = Cached()
    cached.admit("a", run_of(300))
    assert cached.kv.extend("a", 300)
    cached.kv.snapshot("a", run_of(300), 300)
    cached.kv.flush()
    cached.end("a", run_of(300))
    assert cached.admit("b", run_of(310)).start == 300


# ---- tiers -----------------------------------------------------------------------------------------------


def test_what_the_device_lost_comes_back_from_the_tiers() -> None:
    tiers = SymbolicTiers()
    cached = Cached(tiers=tiers)
    cached.run("a", run_of(300))
    tiers.demote()
    cached.kv.flush()
    hit = cached.admit("b", run_of(310))
    assert (hit.start, hit.tier) == (300, "disk") and cached.kv.hit_tokens == {"disk": 300}
    loads = cached.moves(LoadPage, LoadState, CopySlot, CopyPage)
    assert [type(move) for move in loads] == [LoadPage, LoadPage, LoadState, CopySlot, CopyPage]
    assert cached.admit("c", run_of(310)).tier == "device"


def test_a_state_below_rows_of_the_device_is_fetched_alone() -> None:
    tiers = SymbolicTiers()
    cached = Cached(slots=1, tiers=tiers)
    cached.run("a", run_of(300))
    cached.run("b", run_of(20, 5000))  # takes the only slot
    hit = cached.admit("c", [*run_of(300), 999])
    assert (hit.start, hit.tier) == (300, "host") and not cached.moves(LoadPage)


def test_a_state_in_the_middle_of_rows_of_the_device_is_fetched() -> None:
    tiers = SymbolicTiers()
    cached = Cached(slots=1, tiers=tiers)
    cached.run("a", run_of(100))
    cached.run("b", run_of(140))
    cached.run("c", run_of(20, 5000))
    hit = cached.admit("d", [*run_of(105), 999])
    assert (hit.start, hit.kept, hit.tier) == (100, 105, "host")


def test_a_sequence_waits_for_its_fetch_and_for_no_other() -> None:
    tiers = SymbolicTiers()
    cached = Cached(tiers=tiers)
    cached.run("a", run_of(300))
    cached.kv.flush()
    tiers.most_polls = 10**6
    assert not cached.kv.is_ready("b", run_of(310), SPACE, 309)
    assert cached.kv.is_fetching and cached.kv.is_ready("c", run_of(310, 5000), SPACE, 309)
    cached.kv.wait_for_fetches(1.0)
    assert cached.kv.is_fetching, "it has arrived, and nobody has looked"
    assert cached.kv.is_ready("b", run_of(310), SPACE, 309) and not cached.kv.is_fetching


def test_a_state_that_is_lost_on_the_way_is_a_replay_or_a_miss() -> None:
    tiers = SymbolicTiers(loss=0.0)
    cached = Cached(tiers=tiers)
    cached.run("a", run_of(300))
    cached.kv.flush()
    tiers.blobs = {key: blob for key, blob in tiers.blobs.items() if key[1].kind == "page"}
    hit = cached.admit("b", run_of(310))
    assert (hit.start, hit.kept, hit.tier) == (256 - POLICY.replay_tokens(256), 256, "replay")
    cached.kv.release("b")
    cached.kv.flush()
    tiers.vanish(1.0)
    assert cached.admit("c", run_of(310)).start == 0


# ---- without a cache, in any order -----------------------------------------------------------------------


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
        held = sum(pages_for(n) for n in self.lengths.values())
        admission = self.kv.admit(seq_id)
        assert (admission is None) == (len(self.lengths) == NUM_SLOTS or held == NUM_PAGES)
        if admission is not None:
            self.lengths[seq_id] = 1

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
    def shrink(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.lengths)))
        self.lengths[seq_id] = data.draw(st.integers(1, self.lengths[seq_id]))
        self.kv.shrink(seq_id, self.lengths[seq_id])

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

    def release(self, seq_id, tokens=(), fold=0):  # type: ignore[no-untyped-def]
        cache = self._sequences[seq_id]
        cache.page_ids = cache.page_ids[:-1]
        super().release(seq_id, tokens, fold)


class FaultyManagerMachine(ManagerMachine):
    def make_manager(self) -> KVManager:
        return KeepsAPage(NUM_PAGES, NUM_SLOTS)


def test_the_machine_catches_a_planted_leak() -> None:
    hunt = settings(
        max_examples=200, stateful_step_count=40, deadline=None, database=None, phases=[Phase.generate]
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(FaultyManagerMachine, settings=hunt)
