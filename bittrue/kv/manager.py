"""The KV manager: which slot and pages belong to which sequence, the only place where page counts change."""

from collections import Counter
from dataclasses import dataclass

from bittrue.kv.layout import PAGE_TOKENS, pages_for
from bittrue.kv.pages import PagePool, SlotPool


@dataclass(slots=True)
class SequenceCache:
    """What one live sequence holds. ``page_ids`` is replaced, never changed: plans may keep the tuple."""

    slot: int
    page_ids: tuple[int, ...] = ()
    length: int = 0


class KVManager:
    """Gives sequences slots and pages. Pages are reference counted, so that sequences can share prefixes."""

    def __init__(self, num_pages: int, num_slots: int) -> None:
        self._pages = PagePool(num_pages)
        self._slots = SlotPool(num_slots)
        self._sequences: dict[str, SequenceCache] = {}

    @property
    def num_pages(self) -> int:
        return self._pages.total

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    @property
    def num_held_pages(self) -> int:
        return self._pages.num_held

    @property
    def num_slots(self) -> int:
        return self._slots.total

    @property
    def num_free_slots(self) -> int:
        return self._slots.num_free

    @property
    def num_held_slots(self) -> int:
        return self._slots.num_held

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest sequence that could ever be held, alone."""
        return self._pages.total * PAGE_TOKENS if self._slots.total else 0

    def can_ever_fit(self, num_tokens: int) -> bool:
        return num_tokens <= self.capacity_tokens

    def admit(self, seq_id: str) -> int | None:
        """Give a sequence a state slot and no pages yet: the slot, or None when there is none."""
        assert seq_id not in self._sequences, f"sequence {seq_id} is admitted twice"
        slot = self._slots.allocate()
        if slot is not None:
            self._sequences[seq_id] = SequenceCache(slot)
        return slot

    def extend(self, seq_id: str, new_length: int) -> bool:
        """Make the pages cover ``new_length`` tokens; False, and nothing changed, when too few are free."""
        cache = self._sequences[seq_id]
        missing = pages_for(new_length) - len(cache.page_ids)
        if missing > 0:
            pages = self._pages.allocate(missing)
            if pages is None:
                return False
            cache.page_ids += pages
        cache.length = max(cache.length, new_length)
        return True

    def reach(self, seq_id: str) -> int:
        """The largest length that ``extend`` would grant now."""
        return (len(self._sequences[seq_id].page_ids) + self._pages.num_free) * PAGE_TOKENS

    def release(self, seq_id: str) -> None:
        """Take back all that a sequence holds."""
        cache = self._sequences.pop(seq_id)
        for page in cache.page_ids:
            self._pages.release(page)
        self._slots.release(cache.slot)

    def slot(self, seq_id: str) -> int:
        return self._sequences[seq_id].slot

    def page_ids(self, seq_id: str) -> tuple[int, ...]:
        """The pages of a sequence: entry i holds tokens 128 * i .. 128 * i + 127."""
        return self._sequences[seq_id].page_ids

    def length(self, seq_id: str) -> int:
        """How many tokens the sequence asked to hold."""
        return self._sequences[seq_id].length

    def sequence_ids(self) -> frozenset[str]:
        return frozenset(self._sequences)

    def check(self) -> None:
        """Assert that free + held = total, and that each page and slot is held by who lists it."""
        self._pages.check()
        self._slots.check()
        caches = self._sequences.values()
        owners = Counter(page for cache in caches for page in cache.page_ids)
        assert len(owners) == self._pages.num_held, "a page is held by no sequence"
        for page, count in owners.items():
            assert self._pages.owners(page) == count, (
                f"page {page} counts {self._pages.owners(page)} owners, not {count}"
            )
        slots = {cache.slot for cache in caches}
        assert len(slots) == len(caches) == self._slots.num_held, "a slot is shared or lost"
        for cache in caches:
            assert len(set(cache.page_ids)) == len(cache.page_ids), "a sequence holds a page twice"
            assert len(cache.page_ids) == pages_for(cache.length), "pages do not match the length"
