"""The slower tiers behind the device, main memory and disk, as one store of blobs."""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Literal

from bittrue.errors import NotFlushed
from bittrue.kv.disk import DiskTier
from bittrue.kv.fetch import BytesInFlight, Fetch
from bittrue.kv.host import HostTier
from bittrue.kv.identity import BlobName
from bittrue.kv.recency import Key
from bittrue.obs.log import Log

QUEUE_BYTES = 2**28  # blobs that wait for the disk, at most
FETCH_BYTES = 2**30  # read from disk and not used yet, all fetches together
NUM_READERS = 4  # reading and checking leave the interpreter lock, so they overlap
CLOSE_S = 10.0  # for the last writes


class TierStore:
    """Blobs by (namespace, name): saved without waiting, looked up by name, fetched by threads.

    Made for one calling thread, which never waits for the disk, except in ``flush``, ``drain`` and ``close``.
    What it gets back was verified: it is what was saved under that name, or it is missing.
    """

    def __init__(
        self,
        *,
        host_bytes: int,
        disk: DiskTier | None,
        log: Log,
        queue_bytes: int = QUEUE_BYTES,
        fetch_bytes: int = FETCH_BYTES,
    ) -> None:
        self._host = HostTier(host_bytes)
        self._disk = disk
        self._log = log
        self._queue_bytes = queue_bytes
        self._in_flight = BytesInFlight(fetch_bytes)
        self._lock = threading.Lock()  # guards everything below, and the host tier
        self._to_write = threading.Condition(self._lock)
        self._written = threading.Condition(self._lock)
        self._to_read = threading.Condition(self._lock)
        self._queue: deque[Key] = deque()  # to be written, in the order saved
        self._pending: dict[Key, bytes] = {}  # the data of those, and of the one that is being written
        self._pending_states: set[Key] = set()
        self._pending_bytes = 0
        self._writing: Key | None = None
        self._fetches: deque[Fetch] = deque()
        self._generation = 0  # of flushes: what was read before one is not kept after it
        self._is_closed = False
        threads = [] if disk is None else [self._write_often, *[self._read_often] * NUM_READERS]
        self._threads = [threading.Thread(target=work, name="kv-tiers", daemon=True) for work in threads]
        for thread in self._threads:
            thread.start()

    def save(self, namespace: bytes, name: BlobName, data: bytes) -> None:
        """Keep ``data`` under ``name``: in main memory now, on disk soon. A blob the tiers cannot take is
        dropped and counted. The bytes are kept, not copied."""
        key = (namespace, name)
        with self._lock:
            assert not self._is_closed, "the store is closed"
            self._host.put(namespace, name, data)
            if self._disk is None or key in self._pending:
                return
            if self._pending_bytes + len(data) <= self._queue_bytes:
                self._pending[key] = data
                self._pending_bytes += len(data)
                if name.kind == "state":
                    self._pending_states.add(key)
                self._queue.append(key)
                self._to_write.notify()
                return
        self._disk.drop(name)

    def has(self, namespace: bytes, name: BlobName) -> Literal["host", "disk"] | None:
        """The fastest tier that should have the blob. A fetch may still miss it."""
        if self._host.has(namespace, name) or (namespace, name) in self._pending:
            return "host"
        if self._disk is not None and self._disk.has(namespace, name):
            return "disk"
        return None

    def states(self, namespace: bytes, parent: bytes) -> list[tuple[int, bytes]]:
        """(offset, digest) of all states that continue from ``parent``, each once, in no order."""
        with self._lock:
            found = set(self._host.states(namespace, parent))
            for place, name in self._pending_states:
                if place == namespace and name.parent == parent:
                    found.add((name.offset, name.digest))
        if self._disk is not None:
            found.update(self._disk.states(namespace, parent))
        return list(found)

    def fetch(self, namespace: bytes, names: Sequence[BlobName]) -> Fetch:
        """Begin to get ``names`` (pages in chain order, then at most one state). What main memory has from
        the start on is there at once; threads read the rest, and keep it in main memory."""
        in_memory = []
        with self._lock:
            for name in names:
                data = self._in_memory(namespace, name)
                if data is None:
                    break
                in_memory.append(data)
            fetch = Fetch(namespace, names, in_memory, self._in_flight)
            if self._disk is None or self._is_closed:
                fetch.end()
            elif not fetch.done:
                self._fetches.append(fetch)
                self._to_read.notify(NUM_READERS)
        return fetch

    def touch(self, namespace: bytes, name: BlobName) -> None:
        """The device had this blob: the slower tiers keep theirs as if it had been theirs that was used."""
        with self._lock:
            self._host.touch(namespace, name)
        if self._disk is not None:
            self._disk.touch(namespace, name)

    def flush(self, namespace: bytes | None) -> dict[str, int]:
        """Remove the blobs of one namespace, or all, from memory and disk: how many, by tier. Fetches under
        way end with nothing. Raises NotFlushed if something is left."""
        with self._lock:
            self._generation += 1
            for fetch in self._fetches:
                if namespace in (None, fetch.namespace):
                    fetch.release()
            self._drop_queued(namespace)
            removed = {"host": self._host.flush(namespace), "disk": 0}
            self._written.wait_for(lambda: self._writing is None)
        if self._disk is not None:
            removed["disk"], errors = self._disk.flush(namespace)
            if errors:
                raise NotFlushed(
                    f"{len(errors)} files of the disk cache could not be removed ({removed['disk']} were); "
                    f"the first: {errors[0]}; make the directory writable, then flush again"
                )
        self._log.info("cache_tiers_flushed", **removed)
        return removed

    def counters(self) -> dict[str, int]:
        """Events since the start, by "tier.event"."""
        return {**self._host.counters, **({} if self._disk is None else self._disk.counters)}

    def sizes(self) -> dict[str, int]:
        """Bytes held, by tier; ``queue``: waiting for the disk, ``fetch``: read and not used yet."""
        return {
            "host": self._host.num_bytes,
            "disk": 0 if self._disk is None else self._disk.num_bytes,
            "queue": self._pending_bytes,
            "fetch": self._in_flight.num_bytes,
        }

    def drain(self, timeout_s: float) -> bool:
        """Wait until what was saved is on disk (or dropped), at most ``timeout_s`` seconds; whether it is."""
        with self._lock:
            return self._written.wait_for(lambda: not self._pending, timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """End the threads; queued writes have ``timeout_s`` seconds, the others are dropped. A fetch under
        way ends with what it has."""
        if not self.drain(timeout_s):
            self._log.warning("disk_cache_not_drained", dropped=len(self._queue), bytes=self._pending_bytes)
        with self._lock:
            self._is_closed = True
            self._drop_queued(None)
            for fetch in self._fetches:
                fetch.end()
            self._to_write.notify_all()
            self._to_read.notify_all()
        for thread in self._threads:
            thread.join()
        if self._disk is not None:
            self._disk.close()

    # With the lock held.

    def _in_memory(self, namespace: bytes, name: BlobName) -> bytes | None:
        data = self._host.get(namespace, name)
        if data is None:
            data = self._pending.get((namespace, name))
            self._host.counters["host.hit"] += data is not None
        return data

    def _drop_queued(self, namespace: bytes | None) -> None:
        """Write no more of one namespace, or at all, but for the one that is being written."""
        kept = deque(key for key in self._queue if namespace not in (None, key[0]))
        for key in self._queue:
            if namespace in (None, key[0]):
                self._settle_write(key)
        self._queue = kept

    def _settle_write(self, key: Key) -> None:
        self._pending_bytes -= len(self._pending.pop(key))
        self._pending_states.discard(key)
        self._written.notify_all()

    # The threads.

    def _write_often(self) -> None:
        disk = self._disk
        assert disk is not None
        while True:
            with self._lock:
                self._to_write.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                self._writing = key = self._queue.popleft()
                data = self._pending[key]
            try:
                disk.write(*key, data)
            finally:
                with self._lock:
                    self._writing = None
                    self._settle_write(key)
            del data  # not held while waiting

    def _read_often(self) -> None:
        while True:
            with self._lock:
                self._to_read.wait_for(lambda: self._fetches or self._is_closed)
                if not self._fetches:
                    return
                fetch, generation = self._fetches[0], self._generation
                place = fetch.claim()
                if place is None:
                    self._fetches.popleft()
            if place is not None:
                self._read(fetch, place, generation)
            del fetch  # not held while waiting: its bytes in flight go with it

    def _read(self, fetch: Fetch, place: int, generation: int) -> None:
        disk, namespace, name = self._disk, fetch.namespace, fetch.names[place]
        assert disk is not None
        blob: tuple[str, bytes] | None = None
        try:
            with self._lock:
                data = self._in_memory(namespace, name)
            if data is not None:
                blob = ("host", data)
                return
            file_bytes = disk.file_bytes(namespace, name)
            if file_bytes is None:
                disk.count("disk.miss")
            elif fetch.may_read(place, file_bytes):
                data = disk.read(namespace, name)
                if data is not None:
                    blob = ("disk", data)
                    with self._lock:
                        if generation == self._generation:
                            self._host.put(namespace, name, data)
        finally:
            fetch.settle(place, blob)
