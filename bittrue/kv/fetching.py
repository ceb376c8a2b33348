"""What of a token sequence the slower tiers have beyond the device, and in which order to fetch it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from bittrue.kv.identity import BlobName, page_digest, state_digest
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.kv.prefix import Match


class Fetch(Protocol):
    """Blobs on their way out of the tiers: by name, with the tier each came from. Bad or missing ones are
    absent; ``rest`` is to be asked for once these are used."""

    @property
    def done(self) -> bool: ...
    @property
    def result(self) -> dict[BlobName, tuple[str, bytes]]: ...
    @property
    def rest(self) -> tuple[BlobName, ...]: ...
    def release(self) -> None: ...
    def wait(self, timeout_s: float) -> None: ...


class Tiers(Protocol):
    """What the manager asks of the tiers (kv/tiers.py has it). ``has``: the tier, or None; ``states``:
    (offset, digest) of the states below a chain digest."""

    def has(self, space: bytes, name: BlobName, /) -> str | None: ...
    def states(self, space: bytes, parent: bytes, /) -> list[tuple[int, bytes]]: ...
    def fetch(self, space: bytes, names: Sequence[BlobName], /) -> Fetch: ...
    def touch(self, space: bytes, name: BlobName, /) -> None: ...


def worth_fetching(
    tiers: Tiers,
    space: bytes,
    tokens: Sequence[int],
    limit: int,
    *,
    device: Match,
    device_start: int,
    replay_tokens: Callable[[int], int],
) -> list[BlobName]:
    """The pages, in order, and the state to resume from, if the tiers have more than the device.

    The device knows the pages of ``device`` and could begin at ``device_start``; a replay from nothing takes
    ``replay_tokens`` of a position.
    """
    full = [node for node in device.path if node.is_full][: device.length // PAGE_TOKENS]
    chain = [space, *(node.digest for node in full)]
    pages: list[BlobName] = []
    while (end := len(chain) * PAGE_TOKENS) <= limit:
        digest = page_digest(chain[-1], tokens[end - PAGE_TOKENS : end])
        name = BlobName("page", chain[-1], PAGE_TOKENS, digest)
        if tiers.has(space, name) is None:
            break
        pages.append(name)
        chain.append(digest)
    length = max(device.length, (len(chain) - 1) * PAGE_TOKENS)
    from_nothing = length - replay_tokens(length)
    least = max(device_start, from_nothing)
    for depth in range(len(chain) - 1, -1, -1):
        start = depth * PAGE_TOKENS
        if start + PAGE_TOKENS <= least:
            break
        open_tokens = tokens[start : min(start + PAGE_TOKENS - 1, limit)]
        state = _stored_state(tiers, space, chain[depth], open_tokens)
        if state is not None and start + state.offset > least:
            return [*pages[: max(0, depth - len(full))], state]
    return pages if from_nothing > device_start else []


def _stored_state(tiers: Tiers, space: bytes, parent: bytes, open_tokens: Sequence[int]) -> BlobName | None:
    """The deepest stored state whose open tokens begin ``open_tokens``."""
    stored = set(tiers.states(space, parent))
    for offset in sorted({offset for offset, _ in stored}, reverse=True):
        if offset <= len(open_tokens):
            digest = state_digest(parent, open_tokens[:offset])
            if (offset, digest) in stored:
                return BlobName("state", parent, offset, digest)
    return None
