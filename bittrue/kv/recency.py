"""The order in which a tier lets blobs go: the least recently used one that nothing hangs on.

A page hangs on the page before it, a state on the page it continues from. A blob leaves only after all that
hang on it, because without it they could not be reached: so states go before their page and a chain of
pages goes from its end. This one order serves main memory and disk.
"""

import time
from dataclasses import dataclass
from heapq import heappop, heappush

from bittrue.kv.identity import BlobName

# A refused page is remembered while the rest of its chain follows. Not for ever: a faster tier may hold it,
# and then what hangs on it can be reached all the same. A forgotten one costs room for blobs nobody reaches.
_REFUSED_S = 60.0
_MAX_REFUSED = 65536

Key = tuple[bytes, BlobName]  # namespace, name


@dataclass(slots=True)
class Entry:
    """One blob that a tier holds. ``stamp``: when it was last used, on any clock that only goes forward."""

    key: Key
    num_bytes: int
    stamp: float
    seen: int = 0  # the scan that last met it (disk)
    queued_at: float | None = None  # its stamp in the heap; None = not in it


class Recency:
    """Entries by key, their bytes, and which goes next. Not locked: its owner locks it; ``in`` and ``get``
    are single look-ups in a dict and need no lock."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._entries: dict[Key, Entry] = {}
        self._hanging: dict[bytes, int] = {}  # chain digest -> entries whose parent it is
        self._page_at: dict[bytes, Entry] = {}  # chain digest -> the page that ends there
        self._heap: list[tuple[float, int, Entry]] = []  # candidates; checked again when popped
        self._pushes = 0
        self._refused: dict[bytes, float] = {}  # pages not taken -> when, oldest first

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def keys(self) -> list[Key]:
        return list(self._entries)

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def admit(self, entry: Entry, limit_bytes: int) -> tuple[bool, list[Entry]]:
        """Hold ``entry`` within ``limit_bytes``. Returns whether it is held, and who went to make room.

        Refused: what is larger than the limit, what only its own chain could make room for (a chain longer
        than the tier keeps its beginning, which is the part that can be reached), and what hangs on a page
        that was refused just before.
        """
        name = entry.key[1]
        gone: list[Entry] = []
        above_refused_at = self._refused.get(name.parent, -_REFUSED_S)
        if entry.num_bytes > limit_bytes or time.monotonic() < above_refused_at + _REFUSED_S:
            self.refuse(name)
            return False, gone
        # It is held first: so what it hangs on is not free, and it is the newest of those that are.
        self.add(entry)
        while self.num_bytes > limit_bytes:
            oldest = self.oldest()
            assert oldest is not None, "there are bytes, so there is an entry"
            self.remove(oldest.key)
            if oldest is entry:
                self.refuse(name)
                return False, gone
            gone.append(oldest)
        self._refused.pop(name.digest, None)
        return True, gone

    def refuse(self, name: BlobName) -> None:
        """Remember that this page is not here: those that hang on it would not be reached."""
        if name.kind == "page":
            self._refused.pop(name.digest, None)
            self._refused[name.digest] = time.monotonic()
            if len(self._refused) > _MAX_REFUSED:
                del self._refused[next(iter(self._refused))]

    def add(self, entry: Entry) -> None:
        """Hold one more blob; its key is not held yet."""
        assert entry.key not in self._entries, f"{entry.key} is held already"
        name = entry.key[1]
        self._entries[entry.key] = entry
        self.num_bytes += entry.num_bytes
        self._hanging[name.parent] = self._hanging.get(name.parent, 0) + 1
        if name.kind == "page":
            self._page_at[name.digest] = entry
        self._offer(entry)

    def touch(self, key: Key, stamp: float) -> None:
        """Used at ``stamp``; a key that is not held is ignored."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.stamp = max(entry.stamp, stamp)

    def remove(self, key: Key) -> Entry | None:
        """Hold it no longer, whatever hangs on it. None if it was not held."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        name = key[1]
        self.num_bytes -= entry.num_bytes
        left = self._hanging[name.parent] - 1
        if left:
            self._hanging[name.parent] = left
        else:
            del self._hanging[name.parent]
        if self._page_at.get(name.digest) is entry:
            del self._page_at[name.digest]
        above = self._page_at.get(name.parent)
        if above is not None:
            self._offer(above)
        return entry

    def oldest(self) -> Entry | None:
        """The entry to go next; None when none is held. It stays held until ``remove``."""
        while self._heap:
            stamp, _, entry = self._heap[0]
            if self._is_free(entry) and stamp == entry.stamp == entry.queued_at:
                return entry
            heappop(self._heap)
            if stamp == entry.queued_at:
                entry.queued_at = None
                self._offer(entry)
        # Every chain has an end, unless names were made up (files put there by hand): then any one goes.
        return next(iter(self._entries.values()), None)

    def _offer(self, entry: Entry) -> None:
        """Make it a candidate if nothing hangs on it; one with an older stamp in the heap is found again when
        that one comes up."""
        if entry.queued_at is None and self._is_free(entry):
            self._pushes += 1
            entry.queued_at = entry.stamp
            heappush(self._heap, (entry.stamp, self._pushes, entry))

    def _is_free(self, entry: Entry) -> bool:
        if self._entries.get(entry.key) is not entry:
            return False
        name = entry.key[1]
        return name.kind == "state" or name.digest not in self._hanging
