"""The prefix tree: which token prefixes have their rows in pages, and at which positions a state is kept.

A node is one page of one path: up to 128 tokens below the pages before it. Only a leaf may have fewer. A
snapshot hangs on the node of the last full page before it, named by the tokens of the open page (so that all
siblings that begin with those tokens find it). The tree owns its pages and slots through the pools; sequences
hold pages of it beside. Integers only.

Order of eviction. For a slot: the snapshot used longest ago. For a page: the leaf used longest ago that no
sequence holds, and before it the snapshots that need its rows. So a snapshot never outlives the rows it
stands on, and rows outlive the snapshots that could be computed again from them.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TypeVar, overload

from bittrue.kv.identity import page_digest
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.kv.pages import PagePool, SlotPool

Tokens = tuple[int, ...]
_Item = TypeVar("_Item")


@dataclass(slots=True, eq=False)
class Snapshot:
    """A state at a position: the tokens before it are the path of ``node`` and then ``tokens``.

    ``tier``: where it was found; "device" unless it has just been loaded.
    """

    node: "Node"
    tokens: Tokens
    slot: int
    fold: int
    last_used: int = 0
    tier: str = "device"
    is_alive: bool = True

    @property
    def position(self) -> int:
        return self.node.end + len(self.tokens)


@dataclass(slots=True, eq=False)
class Node:
    """One page. ``digest`` is the hash chain up to its end; empty while the page is not full.

    ``last_used``: of what goes on below it, only what is gone counts.
    """

    tokens: Tokens
    page: int  # -1 at a root
    parent: "Node | None"
    end: int  # position after its last token
    digest: bytes = b""
    children: list["Node"] = field(default_factory=list)  # by tokens; none is a prefix of another
    snapshots: dict[Tokens, Snapshot] = field(default_factory=dict)
    lengths: "Counter[int]" = field(default_factory=Counter)  # of the keys of ``snapshots``
    last_used: int = 0
    is_alive: bool = True
    is_listed: bool = False  # it waits among the leaves

    @property
    def is_full(self) -> bool:
        return len(self.tokens) == PAGE_TOKENS or self.parent is None

    def nearest(self, tokens: Tokens) -> "tuple[Node | None, int]":
        """The child that shares most with ``tokens`` from their start, and how many tokens it shares."""
        place = bisect_left(self.children, tokens, key=_tokens)
        best, shared = None, 0
        for child in self.children[max(0, place - 1) : place + 1]:
            count = common_length(child.tokens, tokens)
            if count > shared:
                best, shared = child, count
        return best, shared

    def snapshot_before(self, tokens: Tokens) -> Snapshot | None:
        """The deepest snapshot here whose open tokens begin ``tokens``."""
        for length in sorted(self.lengths, reverse=True):
            found = self.snapshots.get(tokens[:length]) if length <= len(tokens) else None
            if found is not None:
                return found
        return None


def _tokens(node: Node) -> Tokens:
    return node.tokens


class Beginning(Sequence[int]):
    """The first ``length`` of ``tokens``, not copied: copying a million for one more page takes longer than
    all the rest."""

    def __init__(self, tokens: list[int], length: int) -> None:
        self._tokens, self._length = tokens, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        if isinstance(place, slice):
            start, stop, step = place.indices(self._length)
            return self._tokens[start:stop:step]
        return self._tokens[range(self._length)[place]]


def common_length(a: Sequence[int], b: Sequence[int], limit: int | None = None) -> int:
    """Length of the longest common beginning, at most ``limit``."""
    most = min(len(a), len(b), len(a) if limit is None else limit)
    low, high = 0, min(most, PAGE_TOKENS)  # a[:low] == b[:low]
    while a[low:high] == b[low:high]:
        if high == most:
            return most
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True)
class Match:
    """How far a token sequence is known: the first ``length`` tokens have rows in the pages of ``path``, the
    last of which may be matched in part. ``snapshot`` is the deepest at or before ``length``."""

    path: tuple[Node, ...]
    length: int
    snapshot: Snapshot | None


class PrefixTree:
    """All cached prefixes of all namespaces over one pool of pages and one of slots."""

    def __init__(self, pages: PagePool, slots: SlotPool) -> None:
        self._pages, self._slots = pages, slots
        self._roots: dict[bytes, Node] = {}
        self._node_of: dict[int, Node] = {}  # by page
        self._clock = 0
        self._serial = 0
        # Candidates, oldest first, each with the time it had when it was put here.
        self._leaves: list[tuple[int, int, Node]] = []
        self._states: list[tuple[int, int, Snapshot]] = []
        self.version = 0  # another one whenever something else may be found
        self.num_snapshots = 0
        self.num_evicted_pages = 0
        self.num_evicted_snapshots = 0

    # ---- looking up --------------------------------------------------------------------------------------

    def root(self, space: bytes) -> Node:
        """Where the paths of a namespace begin. It is in the tree while it has pages below it."""
        found = self._roots.get(space)
        return found if found is not None else Node((), -1, None, 0, digest=space)

    def match(self, space: bytes, tokens: Sequence[int], limit: int) -> Match:
        """What is known of the first ``limit`` tokens. Changes nothing."""
        node, path, length = self.root(space), [], 0
        while True:
            piece = tuple(tokens[length : min(length + PAGE_TOKENS, limit)])
            child, shared = node.nearest(piece)
            if child is None:
                break
            path.append(child)
            length += shared
            if shared < PAGE_TOKENS:
                break
            node = child
        return Match(tuple(path), length, self._deepest(space, path, tokens, length))

    def _deepest(
        self, space: bytes, path: Sequence[Node], tokens: Sequence[int], length: int
    ) -> Snapshot | None:
        for index in range(length // PAGE_TOKENS, -1, -1):
            node = path[index - 1] if index else self.root(space)
            if node.snapshots:
                start = index * PAGE_TOKENS
                found = node.snapshot_before(tuple(tokens[start : min(start + PAGE_TOKENS - 1, length)]))
                if found is not None:
                    return found
        return None

    def touch(self, match: Match) -> None:
        """The match is used now."""
        self._clock += 1
        if match.path:
            match.path[-1].last_used = self._clock
        if match.snapshot is not None:
            match.snapshot.last_used = self._clock

    # ---- growing -----------------------------------------------------------------------------------------

    def insert(
        self, space: bytes, path: Sequence[Node], tokens: Sequence[int], pages: Sequence[int]
    ) -> list[Node]:
        """Takes the pages of ``tokens``, which a sequence holds, into the tree.

        ``path``: nodes of the first pages, if they are known. Returns the whole path; where it has another
        page than ``pages`` the tree knew these 128 tokens already, and the sequence may exchange its own.
        """
        self._clock += 1
        nodes = list(path) if not path or path[-1].is_alive else []
        for start in range(len(nodes) * PAGE_TOKENS, len(tokens), PAGE_TOKENS):
            parent = nodes[-1] if nodes else self.root(space)
            piece = tuple(tokens[start : start + PAGE_TOKENS])
            nodes.append(self._insert_page(parent, piece, pages[start // PAGE_TOKENS]))
        if nodes:
            nodes[-1].last_used = self._clock
        return nodes

    def _insert_page(self, parent: Node, piece: Tokens, page: int) -> Node:
        near, shared = parent.nearest(piece)
        if near is not None and shared == len(piece):
            return near
        if near is not None and shared == len(near.tokens):
            self._replace_page(near, page)  # ``piece`` goes on where that leaf ends
            near.end += len(piece) - len(near.tokens)
            near.tokens = piece
            node = near
        else:
            if parent.parent is None:
                self._roots[parent.digest] = parent
            node = Node(piece, page, parent, parent.end + len(piece))
            parent.children.insert(bisect_left(parent.children, piece, key=_tokens), node)
            self._pages.keep(page)
            self._node_of[page] = node
        self.version += 1
        if node.is_full:
            node.digest = page_digest(parent.digest, piece)
        return node

    def _replace_page(self, node: Node, page: int) -> None:
        if node.page == page:
            return
        del self._node_of[node.page]
        self._pages.drop(node.page)
        self._pages.keep(page)
        node.page = page
        self._node_of[page] = node

    def hang(self, space: bytes, path: Sequence[Node], tokens: Tokens, slot: int, fold: int) -> Snapshot:
        """A snapshot in the held ``slot`` after the full pages of ``path`` and the open ``tokens``.

        There must be none there yet.
        """
        node = path[-1] if path else self.root(space)
        assert tokens not in node.snapshots, "a snapshot is taken twice at one position"
        self._clock += 1
        self._slots.cache(slot)
        snapshot = Snapshot(node, tokens, slot, fold, last_used=self._clock)
        node.snapshots[tokens] = snapshot
        node.lengths[len(tokens)] += 1
        self.num_snapshots += 1
        self.version += 1
        if len(self._states) > 2 * self.num_snapshots + 64:  # most of them are no more
            self._states = [entry for entry in self._states if entry[2].is_alive]
            heapify(self._states)
        self._push(self._states, snapshot.last_used, snapshot)
        return snapshot

    # ---- letting go --------------------------------------------------------------------------------------

    def released(self, page: int) -> None:
        """The last sequence has let go of a page of the tree: it can be evicted from now on."""
        node = self._node_of.get(page)
        if node is not None and not node.children:
            self._list(node)

    def evict_snapshot(self) -> int | None:
        """Drops the snapshot used longest ago: its slot, held by the caller; None when there is none."""
        while self._states:
            used, _, snapshot = heappop(self._states)
            if snapshot.is_alive and snapshot.last_used == used:
                self.num_evicted_snapshots += 1
                return self.take_slot(snapshot)
            if snapshot.is_alive:
                self._push(self._states, snapshot.last_used, snapshot)
        return None

    def take_slot(self, snapshot: Snapshot) -> int:
        """The snapshot is no more; its slot is held by the caller."""
        node = snapshot.node
        del node.snapshots[snapshot.tokens]
        node.lengths[len(snapshot.tokens)] -= 1
        if node.lengths[len(snapshot.tokens)] == 0:
            del node.lengths[len(snapshot.tokens)]
        snapshot.is_alive = False
        self.num_snapshots -= 1
        self.version += 1
        self._slots.uncache(snapshot.slot)
        return snapshot.slot

    def evict_page(self) -> bool:
        """Frees the page of the leaf used longest ago that no sequence holds. False when there is none."""
        while self._leaves:
            used, _, node = heappop(self._leaves)
            node.is_listed = False
            if not node.is_alive or node.children or self._pages.owners(node.page):
                continue  # it comes back when it can be evicted again
            if node.last_used != used:
                self._list(node)
                continue
            self.num_evicted_pages += 1
            self._remove(node)
            return True
        return False

    def flush(self) -> tuple[int, int]:
        """Forgets everything: (pages, snapshots) that were known. Pages that sequences hold stay theirs."""
        counts = (len(self._node_of), self.num_snapshots)
        self.version += 1
        for node in list(self._nodes()):
            for snapshot in list(node.snapshots.values()):
                self._slots.release(self.take_slot(snapshot))
            node.is_alive = False
            if node.parent is not None:
                self._pages.drop(node.page)
        self._roots.clear()
        self._node_of.clear()
        self._leaves.clear()
        self._states.clear()
        return counts

    def _remove(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        place = bisect_left(parent.children, node.tokens, key=_tokens)
        assert parent.children[place] is node
        del parent.children[place]
        for snapshot in list(node.snapshots.values()):
            self._drop_snapshot(snapshot)
        # Those of the parent that stand on the open rows of this page, unless a sibling has them too.
        shared = parent.nearest(node.tokens)[1]
        for length in [length for length in parent.lengths if shared < length <= len(node.tokens)]:
            found = parent.snapshots.get(node.tokens[:length])
            if found is not None:
                self._drop_snapshot(found)
        parent.last_used = max(parent.last_used, node.last_used)
        self.version += 1
        node.is_alive = False
        del self._node_of[node.page]
        self._pages.drop(node.page)
        if parent.children:
            return
        if parent.parent is None:
            del self._roots[parent.digest]
        elif not self._pages.owners(parent.page):
            self._list(parent)

    def _drop_snapshot(self, snapshot: Snapshot) -> None:
        self.num_evicted_snapshots += 1
        self._slots.release(self.take_slot(snapshot))

    def _list(self, node: Node) -> None:
        if not node.is_listed:
            node.is_listed = True
            self._push(self._leaves, node.last_used, node)

    def _push(self, heap: list[tuple[int, int, _Item]], used: int, item: _Item) -> None:
        self._serial += 1
        heappush(heap, (used, self._serial, item))

    # ---- looking at it whole -----------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return len(self._node_of)

    def _nodes(self) -> Iterator[Node]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children

    def check(self, is_listed: Callable[[int], bool] = lambda page: True) -> None:
        """Assert what must hold between calls."""
        seen: set[int] = set()
        snapshots = 0
        waiting = {id(node) for _, _, node in self._leaves}
        states = {id(snapshot) for _, _, snapshot in self._states}
        for node in self._nodes():
            assert node.is_alive
            assert [c.tokens for c in node.children] == sorted(c.tokens for c in node.children)
            for a, b in zip(node.children, node.children[1:], strict=False):
                assert a.tokens != b.tokens[: len(a.tokens)], "a child is a prefix of another"
            assert node.is_full or not node.children, "a page that is not full has pages below it"
            assert Counter(len(t) for t in node.snapshots) == node.lengths
            for tokens, snapshot in node.snapshots.items():
                snapshots += 1
                assert snapshot.is_alive and snapshot.node is node and snapshot.tokens == tokens
                assert id(snapshot) in states, "a snapshot cannot be evicted"
                assert len(tokens) < PAGE_TOKENS
                assert not tokens or node.nearest(tokens)[1] == len(tokens), "a snapshot without its rows"
            if node.parent is None:
                continue
            assert node.page not in seen and self._node_of[node.page] is node, "a page is in two places"
            assert self._pages.is_kept(node.page)
            seen.add(node.page)
            assert node.end == node.parent.end + len(node.tokens)
            if not node.children and not self._pages.owners(node.page):
                assert id(node) in waiting, "a leaf cannot be evicted"
            if self._pages.owners(node.page) and node.parent.parent is not None:
                assert self._pages.owners(node.parent.page), "a held page below one that nobody holds"
        assert seen == set(self._node_of)
        assert snapshots == self.num_snapshots == self._slots.num_cached
