"""One fetch: blobs wanted in the order of their chain, and what of them has arrived."""

import threading
from collections.abc import Sequence

from bittrue.kv.identity import BlobName


class BytesInFlight:
    """Bytes read from disk that fetches hold, for all of them together."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int, *, always: bool) -> bool:
        """Count ``num_bytes`` more, if they fit or ``always``."""
        with self._lock:
            if not always and self.num_bytes + num_bytes > self.limit_bytes:
                return False
            self.num_bytes += num_bytes
            return True

    def give_back(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes -= num_bytes


class Fetch:
    """Blobs on their way from the tiers. ``names``: pages in chain order, then at most one state.

    It ends where a page is missing, because pages after a gap are useless, or where the bytes in flight do
    not allow more: then ``rest`` says what to ask for once ``result`` has been used. The first blob from disk
    is read always, so repeated fetches get through.
    """

    def __init__(
        self,
        namespace: bytes,
        names: Sequence[BlobName],
        in_memory: Sequence[bytes],
        in_flight: BytesInFlight,
    ) -> None:
        """``in_memory``: the payloads of the first names, as far as memory has them."""
        self.namespace = namespace
        self.names = tuple(names)
        self._in_flight = in_flight
        self._settled = threading.Condition()
        self._found: dict[int, tuple[str, bytes]] = {i: ("host", data) for i, data in enumerate(in_memory)}
        self._taken: dict[int, int] = {}  # bytes counted in flight, by place
        self._first = self._next = len(in_memory)
        self._stop = len(self.names)  # nothing from here on
        self._cut = len(self.names)  # where bytes in flight ended it
        self._reading = 0

    @property
    def done(self) -> bool:
        """Whether nothing more will arrive."""
        # In this order: once nothing is left to claim, the number being read only falls.
        return self._next >= self._stop and self._reading == 0

    def wait(self, timeout_s: float) -> None:
        """Wait until ``done``, for at most ``timeout_s`` seconds."""
        with self._settled:
            self._settled.wait_for(lambda: self.done, timeout_s)

    @property
    def result(self) -> dict[BlobName, tuple[str, bytes]]:
        """Name -> (the tier it came from, "host" or "disk"; the payload, verified). Missing and bad ones are
        absent. To be read when ``done``."""
        with self._settled:
            assert self.done, "the fetch is not done: wait for it"
            return {self.names[i]: self._found[i] for i in sorted(self._found)}

    @property
    def rest(self) -> tuple[BlobName, ...]:
        """Names left for another fetch because the bytes in flight were used up."""
        with self._settled:
            return self.names[self._cut :] if self._cut == self._stop else ()

    def release(self) -> None:
        """The result has been used, or is not wanted any more: read no further, and let other fetches have
        the bytes. Done by itself when the object goes."""
        with self._settled:
            self._stop_at(0)
            self._settled.notify_all()

    def end(self) -> None:
        """Read no further, but keep what has arrived."""
        with self._settled:
            self._stop_at(self._next)
            self._settled.notify_all()

    def __del__(self) -> None:
        self._in_flight.give_back(sum(self._taken.values()))

    # For the readers.

    def claim(self) -> int | None:
        """The next place to read, to be settled by the caller; None when there is none."""
        with self._settled:
            if self._next >= self._stop:
                return None
            self._next += 1
            self._reading += 1
            return self._next - 1

    def may_read(self, place: int, num_bytes: int) -> bool:
        """Whether the bytes in flight allow this one; if not, the fetch ends before it."""
        with self._settled:
            if place >= self._stop:
                return False
            if self._in_flight.take(num_bytes, always=place == self._first):
                self._taken[place] = num_bytes
                return True
            self._cut = min(self._cut, place)
            self._stop_at(place)
            return False

    def settle(self, place: int, blob: tuple[str, bytes] | None) -> None:
        """What came of a claimed place."""
        with self._settled:
            self._reading -= 1
            if place < self._stop:
                if blob is not None:
                    self._found[place] = blob
                elif self.names[place].kind == "page":
                    self._stop_at(place)
            if self.done:
                self._settled.notify_all()

    def _stop_at(self, place: int) -> None:
        """End before ``place``; what arrived from there on is dropped."""
        self._stop = min(self._stop, place)
        for late in [i for i in self._found if i >= self._stop]:
            del self._found[late]
        for late in [i for i in self._taken if i >= self._stop]:
            self._in_flight.give_back(self._taken.pop(late))
