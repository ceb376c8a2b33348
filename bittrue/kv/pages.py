"""The two allocators of cache memory: reference-counted page ids, and state slots. Integers only.

Both hand out the lowest free id: the result depends only on the history of calls, and a mostly idle server
touches the same small part of its pools again and again.
"""

from heapq import heappop, heappush


class PagePool:
    """Page ids 0..total-1. A page is free, or held by one or more owners. free + held = total, always."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._owners: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._owners)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """The ``count`` lowest free pages, one owner each; None, and nothing changed, when fewer are free."""
        if count > len(self._free):
            return None
        pages = tuple(heappop(self._free) for _ in range(count))
        for page in pages:
            self._owners[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """One more owner of a held page."""
        assert page in self._owners, f"page {page} is retained but nobody holds it"
        self._owners[page] += 1

    def release(self, page: int) -> bool:
        """One owner fewer; True when that was the last one and the page is free again."""
        assert page in self._owners, f"page {page} is released but nobody holds it"
        self._owners[page] -= 1
        if self._owners[page] > 0:
            return False
        del self._owners[page]
        heappush(self._free, page)
        return True

    def owners(self, page: int) -> int:
        """How many owners a page has; 0 = free."""
        return self._owners.get(page, 0)

    def check(self) -> None:
        """Assert that every page is either free, once, or held by at least one owner."""
        assert len(self._free) + len(self._owners) == self.total, (
            f"{len(self._free)} free + {len(self._owners)} held pages are not {self.total}"
        )
        listed = set(self._free) | set(self._owners)
        assert listed == set(range(self.total)), "a page is free twice, or free and held"
        assert all(count > 0 for count in self._owners.values()), "a held page has no owner"


class SlotPool:
    """State slots 0..total-1, one owner each. free + held = total, always."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def allocate(self) -> int | None:
        """The lowest free slot, or None."""
        if not self._free:
            return None
        slot = heappop(self._free)
        self._held.add(slot)
        return slot

    def release(self, slot: int) -> None:
        assert slot in self._held, f"slot {slot} is released but nobody holds it"
        self._held.remove(slot)
        heappush(self._free, slot)

    def check(self) -> None:
        """Assert that every slot is either free, once, or held."""
        assert len(self._free) + len(self._held) == self.total, (
            f"{len(self._free)} free + {len(self._held)} held slots are not {self.total}"
        )
        listed = set(self._free) | self._held
        assert listed == set(range(self.total)), "a slot is free twice, or free and held"
