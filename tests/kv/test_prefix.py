"""The prefix tree: what is found of a token sequence, and what goes first when memory is wanted."""

from collections.abc import Sequence

import pytest

from bittrue.kv.identity import page_digest
from bittrue.kv.layout import PAGE_TOKENS, pages_for
from bittrue.kv.pages import PagePool, SlotPool
from bittrue.kv.prefix import Node, PrefixTree, common_length

SPACE = b"space"


class Forest:
    """A tree over small pools, with the steps that a sequence takes with it."""

    def __init__(self, pages: int = 16, slots: int = 8) -> None:
        self.pages, self.slots = PagePool(pages), SlotPool(slots)
        self.tree = PrefixTree(self.pages, self.slots)

    def put(self, tokens: Sequence[int], *, snapshot: bool = True, held: bool = False) -> list[Node]:
        """The pages of ``tokens`` into the tree, all of them its own, with a snapshot at the end."""
        pages = self.pages.allocate(pages_for(len(tokens)))
        assert pages is not None
        path = self.tree.insert(SPACE, [], tokens, pages)
        if snapshot:
            slot = self.slots.allocate()
            assert slot is not None
            full = len(tokens) // PAGE_TOKENS
            self.tree.hang(SPACE, path[:full], tuple(tokens[full * PAGE_TOKENS :]), slot, len(tokens))
        if not held:
            self.let_go(pages)
        self.check()
        return path

    def let_go(self, pages: Sequence[int]) -> None:
        for page in pages:
            if self.pages.release(page):
                self.tree.released(page)

    def found(self, tokens: Sequence[int], limit: int | None = None, space: bytes = SPACE) -> tuple[int, int]:
        """(tokens whose rows are known, position of the snapshot; 0: none)."""
        match = self.tree.match(space, tokens, len(tokens) if limit is None else limit)
        return match.length, 0 if match.snapshot is None else match.snapshot.position

    def check(self) -> None:
        self.pages.check()
        self.slots.check()
        self.tree.check()


def run_of(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


@pytest.mark.parametrize("length", [1, 3, 5, 127, 128, 129, 300])
def test_a_hit_is_exact_to_the_token(length: int) -> None:
    forest = Forest()
    forest.put(run_of(length))
    assert forest.found(run_of(length)) == (length, length)
    assert forest.found([*run_of(length), 999, 998]) == (length, length)
    assert forest.found(run_of(length + 200)) == (length, length)
    for known in range(length):
        assert forest.found([*run_of(known), 999, 998]) == (known, 0)
        assert forest.found(run_of(length), known) == (known, 0)


def test_the_deepest_snapshot_at_or_before_the_match_is_found() -> None:
    forest = Forest()
    for length in (3, 100, 128, 200, 290):
        forest.put(run_of(length))
    for known, snapshot in (
        (2, 0),
        (3, 3),
        (99, 3),
        (100, 100),
        (127, 100),
        (128, 128),
        (199, 128),
        (289, 200),
    ):
        assert forest.found([*run_of(known), 999]) == (known, snapshot)


def test_branches_share_what_they_have_in_common() -> None:
    forest = Forest()
    left, right = run_of(300), [*run_of(150), *run_of(150, 5000)]
    one = forest.put(left)
    two = forest.put(right)
    assert one[0] is two[0] and one[1] is not two[1]
    assert forest.tree.num_pages == 5
    assert forest.found(left) == forest.found(right) == (300, 300)


def test_siblings_find_the_snapshot_that_their_open_tokens_begin_with() -> None:
    """A branch inside a page has pages of its own, and the state before the branch is one for both."""
    forest = Forest()
    forest.put(run_of(150))
    forest.put([*run_of(150), 700, 701], snapshot=False)
    forest.put([*run_of(150), 800, 801], snapshot=False)
    assert forest.tree.num_snapshots == 1
    for after in (700, 800):
        assert forest.found([*run_of(150), after, after + 1, 9]) == (152, 150)


def test_namespaces_share_nothing() -> None:
    forest = Forest()
    forest.put(run_of(200))
    assert forest.found(run_of(200), space=b"other") == (0, 0)


def test_looking_up_changes_nothing_and_leaves_nothing_behind() -> None:
    forest = Forest()
    forest.put(run_of(200))
    before = dict(forest.tree._roots)
    for number in range(50):
        forest.found(run_of(200), space=str(number).encode())
    assert forest.tree._roots == before


def test_a_tail_that_grows_replaces_its_page() -> None:
    forest = Forest()
    (short,) = forest.put(run_of(50))
    first = short.page
    (longer,) = forest.put(run_of(90))
    assert longer is short and longer.page != first and forest.pages.num_cached == 1
    assert forest.found(run_of(90)) == (90, 90) and forest.found(run_of(50)) == (50, 50)
    (full,) = forest.put(run_of(128))
    assert full.digest == page_digest(SPACE, run_of(128))
    assert forest.found([*run_of(50), 999]) == (50, 50)


def test_a_page_known_already_is_not_taken_a_second_time() -> None:
    forest = Forest()
    (one,) = forest.put(run_of(128))
    (two,) = forest.put(run_of(128), snapshot=False)
    assert one is two and forest.pages.num_cached == 1
    forest.put(run_of(40))
    assert forest.pages.num_cached == 1, "what a known page begins with is known"


def test_a_slot_is_taken_from_the_snapshot_used_longest_ago() -> None:
    forest = Forest()
    for start in (0, 1000, 2000):
        forest.put(run_of(10, start))
    forest.tree.touch(forest.tree.match(SPACE, run_of(10), 10))
    slot = forest.tree.evict_snapshot()
    assert slot == 1
    forest.slots.release(slot)
    assert forest.found(run_of(10, 1000)) == (10, 0), "rows outlive their snapshot"
    assert forest.found(run_of(10)) == (10, 10)


def test_a_page_is_taken_from_the_leaf_used_longest_ago_that_nobody_holds() -> None:
    forest = Forest()
    held = forest.put(run_of(100), held=True)
    forest.put(run_of(260, 1000))
    forest.put(run_of(100, 2000))
    assert forest.tree.evict_page()
    assert forest.found(run_of(260, 1000)) == (256, 0), "the tail goes first, and the state that needs it"
    forest.tree.touch(forest.tree.match(SPACE, run_of(260, 1000), 200))
    assert forest.tree.evict_page()
    assert forest.found(run_of(100, 2000)) == (0, 0)
    assert forest.tree.evict_page() and forest.tree.evict_page()
    assert not forest.tree.evict_page(), "the page that is held stays"
    assert forest.found(run_of(100)) == (100, 100)
    forest.let_go([node.page for node in held])
    assert forest.tree.evict_page() and forest.tree.num_pages == forest.tree.num_snapshots == 0
    forest.check()


def test_an_inner_page_used_through_its_tail_is_as_young_as_the_tail() -> None:
    forest = Forest()
    forest.put(run_of(256))
    forest.put(run_of(100, 5000))
    forest.tree.touch(forest.tree.match(SPACE, run_of(256), 256))
    assert forest.tree.evict_page()
    assert forest.found(run_of(100, 5000)) == (0, 0)


def test_a_snapshot_goes_with_the_rows_it_stands_on_and_not_before_a_sibling_has_them() -> None:
    forest = Forest()
    forest.put(run_of(150))
    left, right = [*run_of(150), *run_of(30, 700)], [*run_of(150), *run_of(30, 800)]
    forest.put(left)
    forest.put(right)
    assert forest.tree.num_snapshots == 3
    assert forest.tree.evict_page()
    assert forest.found(left) == (150, 150) and forest.found(right) == (180, 180)
    forest.check()
    assert forest.tree.evict_page()
    assert forest.found(left) == (128, 0) and forest.tree.num_snapshots == 0
    assert forest.slots.num_free == 8
    forest.check()


def test_a_flush_forgets_all_and_leaves_sequences_what_they_hold() -> None:
    forest = Forest()
    held = forest.put(run_of(200), held=True)
    forest.put(run_of(300, 1000))
    assert forest.tree.flush() == (5, 2)
    assert forest.found(run_of(200)) == (0, 0) and not held[0].is_alive
    assert (forest.pages.num_held, forest.pages.num_cached, forest.slots.num_free) == (2, 0, 8)
    again = forest.tree.insert(SPACE, held, run_of(200), [node.page for node in held])
    assert all(node.is_alive for node in again) and forest.found(run_of(200)) == (200, 0)
    forest.check()


def test_what_waits_for_eviction_does_not_grow_with_use() -> None:
    forest = Forest(pages=4)
    (node,) = forest.put(run_of(100))
    for turn in range(1000):
        forest.tree.touch(forest.tree.match(SPACE, run_of(100), 100))
        forest.pages.retain(node.page)
        forest.let_go([node.page])
        forest.put(run_of(50, 1000 + turn))
        while forest.pages.num_free < 2:
            assert forest.tree.evict_page()
        forest.tree.touch(forest.tree.match(SPACE, run_of(100), 100))
    assert node.is_alive and forest.tree.num_evicted_snapshots > 900
    assert len(forest.tree._leaves) <= 4 and len(forest.tree._states) < 100


@pytest.mark.parametrize("length", [0, 1, 2, 5, 64, 127, 128])
def test_common_length_is_that_of_the_plain_loop(length: int) -> None:
    a = run_of(128)
    for b in (a[:length], [*a[:length], -1, *a[length + 1 :]], [*a[:length], -1]):
        plain = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert common_length(a, b) == common_length(tuple(b), tuple(a)) == plain
