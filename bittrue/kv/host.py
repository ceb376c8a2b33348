"""The host tier: blobs in main memory under a byte budget."""

from itertools import count

from bittrue.kv.identity import BlobName
from bittrue.kv.recency import Entry, Key, Recency


class HostTier:
    """Blobs by name; the order in which they go is that of ``Recency``. Not locked: its owner locks it;
    ``has`` is one look-up in a dict and needs no lock."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._blobs: dict[Key, bytes] = {}
        self._states: dict[tuple[bytes, bytes], set[tuple[int, bytes]]] = {}
        self._order = Recency()
        self._clock = count(1)
        self.counters = {"host.saved": 0, "host.hit": 0, "host.evicted": 0, "host.refused": 0}

    @property
    def num_bytes(self) -> int:
        """Payload bytes held; never more than the budget."""
        return self._order.num_bytes

    def has(self, namespace: bytes, name: BlobName) -> bool:
        return (namespace, name) in self._blobs

    def put(self, namespace: bytes, name: BlobName, data: bytes) -> bool:
        """Keep ``data`` (no copy is made). False when it is refused: see ``Recency.admit``."""
        if self.budget_bytes == 0:
            return False
        key = (namespace, name)
        if key in self._blobs:  # same name, same content
            self._order.touch(key, next(self._clock))
            return True
        is_held, gone = self._order.admit(Entry(key, len(data), next(self._clock)), self.budget_bytes)
        for entry in gone:
            self._drop(entry.key)
        self.counters["host.evicted"] += len(gone)
        self.counters["host.saved" if is_held else "host.refused"] += 1
        if is_held:
            self._blobs[key] = data
            if name.kind == "state":
                self._states.setdefault((namespace, name.parent), set()).add((name.offset, name.digest))
        return is_held

    def get(self, namespace: bytes, name: BlobName) -> bytes | None:
        """The blob, which counts as a use; None if it is not here."""
        key = (namespace, name)
        data = self._blobs.get(key)
        if data is not None:
            self.counters["host.hit"] += 1
            self._order.touch(key, next(self._clock))
        return data

    def touch(self, namespace: bytes, name: BlobName) -> None:
        """Count as used what was found in a faster tier."""
        self._order.touch((namespace, name), next(self._clock))

    def states(self, namespace: bytes, parent: bytes) -> list[tuple[int, bytes]]:
        """(offset, digest) of the states that continue from ``parent``."""
        return list(self._states.get((namespace, parent), ()))

    def flush(self, namespace: bytes | None) -> int:
        """Remove the blobs of one namespace, or all; how many there were."""
        keys = [key for key in self._blobs if namespace is None or key[0] == namespace]
        for key in keys:
            self._order.remove(key)
            self._drop(key)
        return len(keys)

    def _drop(self, key: Key) -> None:
        """Forget the data of a key that the order holds no longer."""
        namespace, name = key
        del self._blobs[key]
        if name.kind == "state":
            place = (namespace, name.parent)
            self._states[place].discard((name.offset, name.digest))
            if not self._states[place]:
                del self._states[place]
