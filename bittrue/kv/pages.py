"""The two allocators of cache memory: shared page ids, and state slots. Integers only.

Both hand out the lowest free id: the result depends only on the history of calls, and a mostly idle server
touches the same small part of its pools again and again.
"""

from heapq import heappop, heappush


class PagePool:
    """Page ids 0..total-1: free + held + cached = total, always.

    A page is *held* while sequences own it, *cached* while the prefix tree alone does, else *free*.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._owners: dict[int, int] = {}  # sequences
        self._kept: set[int] = set()  # pages of the tree
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._owners)

    @property
    def num_cached(self) -> int:
        return self._num_cached

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """The ``count`` lowest free pages, one owner each; None, and nothing changed, when fewer are free."""
        if count > len(self._free):
            return None
        pages = tuple(heappop(self._free) for _ in range(count))
        for page in pages:
            self._owners[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """One more owner of a held or cached page."""
        assert page in self._owners or page in self._kept, f"page {page} is retained but nobody has it"
        if page not in self._owners:
            self._num_cached -= 1
        self._owners[page] = self._owners.get(page, 0) + 1

    def release(self, page: int) -> bool:
        """One owner fewer; True when that was the last one: the page is then cached if the tree has it, or
        free."""
        assert page in self._owners, f"page {page} is released but nobody holds it"
        self._owners[page] -= 1
        if self._owners[page] > 0:
            return False
        del self._owners[page]
        if page in self._kept:
            self._num_cached += 1
        else:
            heappush(self._free, page)
        return True

    def keep(self, page: int) -> None:
        """The tree takes a held page into its care."""
        assert page in self._owners, f"page {page} is kept but nobody holds it"
        assert page not in self._kept, f"page {page} is kept twice"
        self._kept.add(page)

    def drop(self, page: int) -> None:
        """The tree lets go of a page; it is free unless a sequence holds it."""
        self._kept.remove(page)
        if page not in self._owners:
            self._num_cached -= 1
            heappush(self._free, page)

    def owners(self, page: int) -> int:
        """How many sequences own a page."""
        return self._owners.get(page, 0)

    def is_kept(self, page: int) -> bool:
        return page in self._kept

    def check(self) -> None:
        """Assert that every page is free, held or cached, exactly one of them."""
        cached = self._kept - set(self._owners)
        assert len(cached) == self._num_cached, "the count of cached pages is off"
        assert len(self._free) + len(self._owners) + len(cached) == self.total, (
            f"{len(self._free)} free + {len(self._owners)} held + {len(cached)} cached pages are not "
            f"{self.total}"
        )
        listed = set(self._free) | set(self._owners) | cached
        assert listed == set(range(self.total)), "a page is free twice, or free and held"
        assert all(count > 0 for count in self._owners.values()), "a held page has no owner"


class SlotPool:
    """State slots 0..total-1, each free, held by a sequence or cached as a snapshot.
    free + held + cached = total, always."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._held: set[int] = set()
        self._cached: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def allocate(self) -> int | None:
        """The lowest free slot, held; or None."""
        if not self._free:
            return None
        slot = heappop(self._free)
        self._held.add(slot)
        return slot

    def release(self, slot: int) -> None:
        assert slot in self._held, f"slot {slot} is released but nobody holds it"
        self._held.remove(slot)
        heappush(self._free, slot)

    def cache(self, slot: int) -> None:
        """A held slot becomes a snapshot."""
        self._held.remove(slot)
        self._cached.add(slot)

    def uncache(self, slot: int) -> None:
        """A snapshot becomes a held slot: of whoever asked, to use or to release."""
        self._cached.remove(slot)
        self._held.add(slot)

    def check(self) -> None:
        """Assert that every slot is free, held or cached, exactly one of them."""
        parts = (set(self._free), self._held, self._cached)
        counts = [len(self._free), len(self._held), len(self._cached)]
        assert sum(counts) == self.total, f"{counts} free, held and cached slots are not {self.total}"
        assert set().union(*parts) == set(range(self.total)), "a slot is in two places or in none"
