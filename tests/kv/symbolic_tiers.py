"""The slower tiers in symbols: blobs that arrive late, lose a part, or vanish."""

import random
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

from bittrue.kv.identity import BlobName

_HANDLE = struct.Struct("<Q")
Key = tuple[bytes, BlobName]


class SymbolicTiers:
    """A ``kv.manager.Tiers``, which a SymbolicCache saves into. Each blob lies in one tier, "host" or "disk".

    ``most_polls``: how often at most a fetch is asked before it is done; a blob on its way is lost with
    probability ``loss``; with probability ``cut`` a fetch leaves a rest.
    """

    def __init__(self, seed: int = 0, *, most_polls: int = 0, loss: float = 0.0, cut: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.most_polls, self.loss, self.cut = most_polls, loss, cut
        self.blobs: dict[Key, tuple[str, bytes]] = {}
        self.events: Counter[str] = Counter()
        self._contents: list[tuple[BlobName, Any]] = []

    def save(self, space: bytes, name: BlobName, content: object, head: bytes = b"") -> None:
        self.events["saved"] += 1
        self._contents.append((name, content))
        self.blobs[space, name] = ("host", head + _HANDLE.pack(len(self._contents) - 1))

    def content(self, name: BlobName, data: bytes) -> Any:
        """What was saved as ``data`` (without its head)."""
        saved_as, content = self._contents[_HANDLE.unpack(data)[0]]
        assert saved_as == name, f"a blob saved as {saved_as} is loaded as {name}"
        return content

    def demote(self) -> None:
        """All that is in the host tier lies on disk from now on."""
        self.blobs = {key: ("disk", data) for key, (_, data) in self.blobs.items()}

    def vanish(self, share: float) -> None:
        """Each blob is gone with probability ``share``."""
        self.blobs = {key: blob for key, blob in self.blobs.items() if self.rng.random() >= share}

    # ---- what the manager asks ---------------------------------------------------------------------------

    def has(self, space: bytes, name: BlobName, /) -> str | None:
        return self.blobs[space, name][0] if (space, name) in self.blobs else None

    def states(self, space: bytes, parent: bytes, /) -> list[tuple[int, bytes]]:
        names = [name for place, name in self.blobs if place == space and name.kind == "state"]
        return [(name.offset, name.digest) for name in names if name.parent == parent]

    def touch(self, space: bytes, name: BlobName, /) -> None:
        self.events["touched"] += (space, name) in self.blobs

    def fetch(self, space: bytes, names: Sequence[BlobName], /) -> "SymbolicFetch":
        assert names and all(name.kind == "page" for name in names[:-1]), "pages, then at most one state"
        self.events["fetched"] += 1
        return SymbolicFetch(self, space, names, self.rng.randint(0, self.most_polls))


class SymbolicFetch:
    """Done after it has been asked ``polls`` times: also between two questions of one step."""

    def __init__(self, tiers: SymbolicTiers, space: bytes, names: Sequence[BlobName], polls: int) -> None:
        self._tiers, self._space, self._names, self._polls = tiers, space, names, polls
        self._result: dict[BlobName, tuple[str, bytes]] | None = None
        self._rest: tuple[BlobName, ...] = ()

    @property
    def done(self) -> bool:
        if self._polls:
            self._polls -= 1
            return False
        if self._result is None:
            self._arrive()
        return True

    def wait(self, timeout_s: float) -> None:
        self._polls = 0

    @property
    def result(self) -> dict[BlobName, tuple[str, bytes]]:
        assert self._result is not None, "the fetch is not done"
        return self._result

    @property
    def rest(self) -> tuple[BlobName, ...]:
        assert self._result is not None, "the fetch is not done"
        return self._rest

    def release(self) -> None:
        self._result, self._rest, self._polls = {}, (), 0

    def _arrive(self) -> None:
        tiers, self._result = self._tiers, {}
        for place, name in enumerate(self._names):
            if place and tiers.rng.random() < tiers.cut:
                self._rest = tuple(self._names[place:])
                tiers.events["cut"] += 1
                break
            blob = tiers.blobs.get((self._space, name))
            if blob is None or tiers.rng.random() < tiers.loss:
                tiers.events["lost"] += 1
                if name.kind == "page":
                    break  # pages after a gap are useless, and so is a state behind one
            else:
                self._result[name] = blob
