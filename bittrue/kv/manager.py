"""The KV manager: which slot and pages belong to which sequence and which to the prefix cache, the only place
where their counts change.

It decides with integers. What has to be done to the tensors is a list of moves, in order, that ``take_moves``
hands out; whoever runs steps carries them out before the next one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bittrue.kv.fetching import Fetch, Tiers, worth_fetching
from bittrue.kv.identity import STATE_HEAD, BlobName, page_digest, state_digest
from bittrue.kv.layout import CSA_FRONTIER, CSA_RATIO, PAGE_TOKENS, pages_for
from bittrue.kv.moves import (
    ClearSlot,
    CopyPage,
    CopySlot,
    LoadPage,
    LoadState,
    Move,
    SavePage,
    SaveState,
)
from bittrue.kv.pages import PagePool, SlotPool
from bittrue.kv.prefix import Match, Node, PrefixTree, Snapshot


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What of finished work is kept, and how a prefix is resumed.

    ``snapshot_every`` tokens a state is kept: 128 is the "full" strategy, 0 "recompute", all between
    "periodic". ``num_layers`` and ``window`` say how many tokens a replay without a state takes.
    """

    is_on: bool = True
    snapshot_every: int = 0
    num_layers: int = 1
    window: int = 1
    max_draft: int = 0

    def replay_tokens(self, position: int) -> int:
        """Tokens before ``position`` after whose replay, from nothing, the state there is exact: the last
        layer's ring and open rows, and a window less one for every layer below it."""
        last = max(self.window, CSA_FRONTIER - 1, position % PAGE_TOKENS)
        return (self.num_layers - 1) * (self.window - 1) + last


NO_CACHE = CachePolicy(is_on=False)
_NEVER = 1 << 62  # a position no sequence reaches


@dataclass(frozen=True, slots=True)
class Admission:
    """Where an admitted sequence begins: computed from ``start`` on, with the running pool at ``fold``; the
    rows of tokens before ``kept`` stand already. ``tier``: what it was resumed from; None = from nothing.
    ``promised``: pages its first slice needs beyond those it holds."""

    slot: int
    promised: int = 0
    start: int = 0
    kept: int = 0
    fold: int = 0
    tier: str | None = None


@dataclass(slots=True)
class SequenceCache:
    """What one live sequence holds. ``page_ids`` is replaced, never changed: plans may keep the tuple."""

    slot: int
    space: bytes = b""
    page_ids: tuple[int, ...] = ()
    length: int = 0
    exact_from: int = 0  # before this position a replay's state is not what it will be
    path: list[Node] = field(default_factory=list)  # its full pages in the tree


@dataclass(frozen=True, slots=True)
class _Hit:
    """A way to resume: from ``snapshot``, or (None) from nothing at ``start``."""

    match: Match
    start: int = 0
    kept: int = 0
    snapshot: Snapshot | None = None


class KVManager:
    """Gives sequences slots and pages, and keeps the prefixes of those that had them."""

    def __init__(
        self,
        num_pages: int,
        num_slots: int,
        policy: CachePolicy = NO_CACHE,
        tiers: Tiers | None = None,
    ) -> None:
        self._pages = PagePool(num_pages)
        self._slots = SlotPool(num_slots)
        self._tree = PrefixTree(self._pages, self._slots)
        self.policy = policy
        self.tiers = tiers if policy.is_on else None
        self._sequences: dict[str, SequenceCache] = {}
        self._fetches: dict[str, Fetch | None] = {}  # of sequences that wait; None: nothing (more) to fetch
        self._moves: list[Move] = []
        self._last_hit: tuple[tuple[int, bytes, int], Sequence[int], _Hit] | None = None
        self.hit_tokens: Counter[str] = Counter()
        self.lookup_tokens = 0
        self.replayed_tokens = 0

    # ---- counts ------------------------------------------------------------------------------------------

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
    def num_cached_pages(self) -> int:
        return self._pages.num_cached

    @property
    def num_available_pages(self) -> int:
        """Pages that a sequence could get now: the free ones, and those the cache gives up."""
        return self._pages.num_free + self._pages.num_cached

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
    def num_cached_slots(self) -> int:
        return self._slots.num_cached

    @property
    def num_evicted(self) -> tuple[int, int]:
        """(pages, snapshots) evicted since the start."""
        return self._tree.num_evicted_pages, self._tree.num_evicted_snapshots

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest sequence that could ever be held, alone."""
        return self._pages.total * PAGE_TOKENS if self._slots.total else 0

    def can_ever_fit(self, num_tokens: int) -> bool:
        return num_tokens <= self.capacity_tokens

    def take_moves(self) -> tuple[Move, ...]:
        """What has to be done before the next step, in order. Handed out once."""
        moves, self._moves = tuple(self._moves), []
        return moves

    # ---- sequences come ----------------------------------------------------------------------------------

    def is_ready(self, seq_id: str, tokens: Sequence[int], space: bytes, limit: int) -> bool:
        """Whether a waiting sequence may be admitted: False while what the tiers know of its first ``limit``
        tokens is on its way."""
        if self.tiers is None or limit <= 0:
            return True
        if seq_id not in self._fetches:
            device = self._best_hit(space, tokens, limit)
            names = worth_fetching(
                self.tiers,
                space,
                tokens,
                limit,
                device=device.match,
                device_start=device.start,
                replay_tokens=self.policy.replay_tokens,
            )
            self._fetches[seq_id] = self.tiers.fetch(space, names) if names else None
        fetch = self._fetches[seq_id]
        if fetch is None or not fetch.done:
            return fetch is None
        rest = fetch.rest
        self._insert_fetched(seq_id, tokens, space)
        if rest:
            self._fetches[seq_id] = self.tiers.fetch(space, rest)
        return not rest

    @property
    def is_fetching(self) -> bool:
        """Whether somebody waits for a fetch. One that has just been done counts until it was looked at: else
        nobody would be ready, and nothing under way."""
        return any(fetch is not None for fetch in self._fetches.values())

    def wait_for_fetches(self, timeout_s: float) -> None:
        """Sleeps until a fetch is done, if any is under way."""
        fetch = next((f for f in self._fetches.values() if f is not None and not f.done), None)
        if fetch is not None:
            fetch.wait(timeout_s)

    def forget_fetch(self, seq_id: str) -> None:
        """The sequence waits no more, or asks again next time."""
        fetch = self._fetches.pop(seq_id, None)
        if fetch is not None:
            fetch.release()

    def admit(
        self,
        seq_id: str,
        tokens: Sequence[int] = (),
        space: bytes = b"",
        *,
        limit: int = 0,
        ahead: int = 0,
        promised: int = 0,
    ) -> Admission | None:
        """Gives a sequence a state slot, the cached pages of its first tokens, at most ``limit`` of them, and
        the page of its next token.

        None, and nothing changed, where no slot is left, or beside ``promised`` pages too few for the next
        ``ahead`` tokens.
        """
        assert seq_id not in self._sequences, f"sequence {seq_id} is admitted twice"
        if self._slots.num_free + self._slots.num_cached == 0:
            return None
        hit = self._best_hit(space, tokens, limit) if self.policy.is_on else _Hit(Match((), 0, None))
        shared = [node.page for node in hit.match.path[: hit.kept // PAGE_TOKENS]]
        for page in shared:
            self._pages.retain(page)
        first = max(hit.start + 1, hit.kept)  # tokens whose pages it gets at once
        reach = max(first, min(hit.start + ahead, len(tokens) + 1))
        wanted = min(pages_for(reach), self.num_pages) - len(shared)
        if wanted > self.num_available_pages - promised:
            self._let_go(shared)
            return None
        self._fetches.pop(seq_id, None)
        self._touch(space, hit)
        tier = None if hit.start == 0 else "replay" if hit.snapshot is None else hit.snapshot.tier
        fold = hit.start if hit.snapshot is None else hit.snapshot.fold
        cache = SequenceCache(self._state_for(hit), space, tuple(shared), hit.kept)
        cache.path = list(hit.match.path[: len(shared)])
        cache.exact_from = hit.kept if tier == "replay" else 0
        self._sequences[seq_id] = cache
        if pages_for(hit.kept) > len(shared):
            self._copy_open_page(cache, hit)
        assert self.extend(seq_id, first), "a page was counted as available"
        self._count_hit(tokens, hit, tier)
        missing = max(0, len(shared) + wanted - len(cache.page_ids))
        return Admission(cache.slot, missing, hit.start, hit.kept, fold, tier)

    def best_start(self, space: bytes, tokens: Sequence[int], limit: int) -> int:
        """The position from which a sequence would be computed if it were admitted now."""
        return self._best_hit(space, tokens, limit).start

    def gain(self, shared: int, prompt_end: int) -> tuple[int, int]:
        """Where a prompt could start that shares ``shared`` tokens with one that is being computed, at a
        snapshot on the way or replayed from nothing; and where the other one has to be for it."""
        every = self.policy.snapshot_every
        at = max(shared // every * every if every else 0, prompt_end if shared >= prompt_end else 0)
        from_nothing = shared - self.policy.replay_tokens(shared)
        # Rows enter the cache with the next snapshot behind them.
        stops = [prompt_end] if prompt_end >= shared else []
        stops += [-(-shared // every) * every] if every else []
        return (from_nothing, min(stops)) if stops and from_nothing > at else (at, at)

    def _best_hit(self, space: bytes, tokens: Sequence[int], limit: int) -> _Hit:
        """The way that leaves least to compute: from the deepest snapshot, or by replay from nothing.

        The last answer is kept: a long prompt that waits for memory asks the same in every step. Tokens are
        told apart as objects, so a list that has been asked about may only grow.
        """
        asked = (self._tree.version, space, limit)
        if self._last_hit is None or self._last_hit[0] != asked or self._last_hit[1] is not tokens:
            self._last_hit = (asked, tokens, self._find_hit(space, tokens, limit))
        return self._last_hit[2]

    def _find_hit(self, space: bytes, tokens: Sequence[int], limit: int) -> _Hit:
        match = self._tree.match(space, tokens, limit)
        snapshot = match.snapshot
        start = 0 if snapshot is None else snapshot.position
        from_nothing = match.length - self.policy.replay_tokens(match.length)
        if from_nothing > start:
            return _Hit(match, from_nothing, match.length)
        return _Hit(match, start, match.length, snapshot) if start else _Hit(match)

    def _state_for(self, hit: _Hit) -> int:
        """A slot that holds the state the hit begins with."""
        slot = self._slots.allocate()
        snapshot = hit.snapshot
        if slot is None:
            # The snapshot itself may be the one used longest ago: its slot changes hands, and no byte moves.
            slot = self._tree.evict_snapshot()
            assert slot is not None, "slots are cached, but none can be evicted"
        if snapshot is not None and snapshot.slot != slot:
            self._moves.append(CopySlot(snapshot.slot, slot))
        if snapshot is None and hit.start:
            self._moves.append(ClearSlot(slot))
        if snapshot is not None:
            snapshot.tier = "device"
        return slot

    def _copy_open_page(self, cache: SequenceCache, hit: _Hit) -> None:
        """The page that the sequence goes on writing is its own, with the rows it has so far."""
        source = hit.match.path[-1].page
        page = self._take_pages(1)
        assert page is not None, "the page was counted as available"
        cache.page_ids += page
        # The source may just have been evicted for the target, even be it: its bytes still stand.
        if hit.kept % PAGE_TOKENS >= CSA_RATIO and source != page[0]:
            self._moves.append(CopyPage(source, page[0]))

    def _touch(self, space: bytes, hit: _Hit) -> None:
        """What is used here is not to be what the slower tiers give up next."""
        self._tree.touch(hit.match)
        if self.tiers is None or hit.start == 0:
            return
        # The last full page stands for those before it: none goes while something hangs on it.
        last = next((node for node in reversed(hit.match.path) if node.is_full), None)
        if last is not None and last.parent is not None:
            self.tiers.touch(space, BlobName("page", last.parent.digest, PAGE_TOKENS, last.digest))
        if hit.snapshot is not None:
            parent, tokens = hit.snapshot.node.digest, hit.snapshot.tokens
            self.tiers.touch(space, BlobName("state", parent, len(tokens), state_digest(parent, tokens)))

    def _count_hit(self, tokens: Sequence[int], hit: _Hit, tier: str | None) -> None:
        self.lookup_tokens += len(tokens)
        self.replayed_tokens += hit.kept - hit.start
        if tier is not None:
            self.hit_tokens[tier] += hit.start

    # ---- sequences grow ----------------------------------------------------------------------------------

    def extend(self, seq_id: str, new_length: int) -> bool:
        """Make the pages cover ``new_length`` tokens; False, and nothing changed, when there are too few even
        with those that the cache gives up."""
        cache = self._sequences[seq_id]
        missing = pages_for(new_length) - len(cache.page_ids)
        if missing > 0:
            pages = self._take_pages(missing)
            if pages is None:
                return False
            cache.page_ids += pages
        cache.length = max(cache.length, new_length)
        return True

    def shrink(self, seq_id: str, new_length: int) -> None:
        """Give back the pages beyond ``new_length`` tokens: those of drafts that were not accepted."""
        cache = self._sequences[seq_id]
        surplus = cache.page_ids[pages_for(new_length) :]
        if surplus:
            cache.page_ids = cache.page_ids[: pages_for(new_length)]
            self._let_go(surplus)
        cache.length = min(cache.length, new_length)

    def free_reach(self, seq_id: str) -> int:
        """The largest length that ``extend`` would grant now without taking a page from the cache."""
        return (len(self._sequences[seq_id].page_ids) + self._pages.num_free) * PAGE_TOKENS

    def reach(self, seq_id: str) -> int:
        """The largest length that ``extend`` would grant now."""
        return (len(self._sequences[seq_id].page_ids) + self.num_available_pages) * PAGE_TOKENS

    def next_stop(self, seq_id: str, position: int, prompt_end: int) -> int | None:
        """The next position after ``position`` at which a step has to end, for a snapshot there."""
        if not self.policy.is_on:
            return None
        last = max(position, self._sequences[seq_id].exact_from - 1)
        every = self.policy.snapshot_every
        stops = [] if every == 0 else [(last // every + 1) * every]
        if last < prompt_end:
            stops.append(prompt_end)
        return min(stops, default=None)

    def is_stop(self, position: int, prompt_end: int) -> bool:
        """Whether a snapshot is to be taken at ``position``."""
        every = self.policy.snapshot_every
        on_grid = every > 0 and position % every == 0
        return self.policy.is_on and position > 0 and (on_grid or position == prompt_end)

    def keep_private(self) -> None:
        """Nothing that live sequences hold enters the cache from now on: it is not what their namespace
        stands for any more."""
        for cache in self._sequences.values():
            cache.exact_from = _NEVER

    def rebuilt_to(self, seq_id: str) -> int:
        """Tokens before this position are run over again only to rebuild a state behind stored rows: what
        they compute on the way is not what those rows were computed with. 0 = none are."""
        exact_from = self._sequences[seq_id].exact_from
        return 0 if exact_from == _NEVER else exact_from

    def snapshot(self, seq_id: str, tokens: Sequence[int], fold: int) -> None:
        """Takes what the sequence computed, ``tokens``, into the cache, with a copy of its state."""
        cache = self._sequences[seq_id]
        if not self.policy.is_on or len(tokens) < max(1, cache.exact_from):
            return
        self._insert(cache, tokens)
        if self._known(cache, tokens):
            return
        slot = self._slots.allocate()
        if slot is None:
            slot = self._tree.evict_snapshot()
        if slot is not None:
            self._moves.append(CopySlot(cache.slot, slot))
            self._hang(cache, tokens, slot, fold)

    def release(self, seq_id: str, tokens: Sequence[int] = (), fold: int = 0) -> None:
        """Takes back all that a sequence holds; what it computed, ``tokens``, stays in the cache, and its
        slot becomes the snapshot there."""
        cache = self._sequences[seq_id]
        is_kept = False
        if self.policy.is_on and tokens and len(tokens) >= cache.exact_from:
            self._insert(cache, tokens)
            is_kept = not self._known(cache, tokens)
            if is_kept:
                self._hang(cache, tokens, cache.slot, fold)
        del self._sequences[seq_id]
        if not is_kept:
            self._slots.release(cache.slot)
        self._let_go(cache.page_ids)

    def _take_pages(self, count: int) -> tuple[int, ...] | None:
        """``count`` pages, held once, out of the free and the cached ones; or None, and nothing changed."""
        if count > self.num_available_pages:
            return None
        while self._pages.num_free < count:
            assert self._tree.evict_page(), "pages are cached, but none can be evicted"
        return self._pages.allocate(count)

    def _let_go(self, pages: Sequence[int]) -> None:
        for page in pages:
            if self._pages.release(page):
                self._tree.released(page)

    def _insert(self, cache: SequenceCache, tokens: Sequence[int]) -> None:
        """The pages of ``tokens`` into the tree. Where the tree has a full page already, the sequence takes
        that one for its own, which holds the same bits."""
        before = len(cache.path) if not cache.path or cache.path[-1].is_alive else 0
        path = self._tree.insert(cache.space, cache.path, tokens, cache.page_ids)
        cache.path = path[: len(tokens) // PAGE_TOKENS]
        for index, node in enumerate(cache.path[before:], before):
            own = cache.page_ids[index]
            if node.page != own:
                self._pages.retain(node.page)
                self._let_go([own])
                cache.page_ids = (*cache.page_ids[:index], node.page, *cache.page_ids[index + 1 :])
            elif self.tiers is not None:
                assert node.parent is not None
                name = BlobName("page", node.parent.digest, PAGE_TOKENS, node.digest)
                self._moves.append(SavePage(node.page, cache.space, name))

    def _known(self, cache: SequenceCache, tokens: Sequence[int]) -> bool:
        """Whether there is a snapshot after ``tokens`` already."""
        node = cache.path[-1] if cache.path else self._tree.root(cache.space)
        return tuple(tokens[node.end :]) in node.snapshots

    def _hang(self, cache: SequenceCache, tokens: Sequence[int], slot: int, fold: int) -> None:
        position = len(tokens)
        open_tokens = tuple(tokens[position // PAGE_TOKENS * PAGE_TOKENS :])
        snapshot = self._tree.hang(cache.space, cache.path, open_tokens, slot, fold)
        if self.tiers is not None:
            parent = snapshot.node.digest
            name = BlobName("state", parent, len(open_tokens), state_digest(parent, open_tokens))
            page = cache.page_ids[position // PAGE_TOKENS] if open_tokens else None
            self._moves.append(SaveState(slot, page, position, fold, cache.space, name))

    # ---- tiers -------------------------------------------------------------------------------------------

    def _insert_fetched(self, seq_id: str, tokens: Sequence[int], space: bytes) -> None:
        """What a fetch brought becomes part of the tree, as far as there is room."""
        fetch = self._fetches.pop(seq_id, None)
        if fetch is None:
            return
        self._fetches[seq_id] = None
        found = fetch.result
        match = self._tree.match(space, tokens, len(tokens))
        path = [node for node in match.path if node.is_full][: match.length // PAGE_TOKENS]
        held = [node.page for node in path]  # not to be evicted for what comes after them
        for page in held:
            self._pages.retain(page)
        parent = path[-1].digest if path else space
        for start in range(len(path) * PAGE_TOKENS, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
            digest = page_digest(parent, tokens[start : start + PAGE_TOKENS])
            name = BlobName("page", parent, PAGE_TOKENS, digest)
            taken = self._take_pages(1) if name in found else None
            if taken is None:
                break
            self._moves.append(LoadPage(name, found[name][1], taken[0]))
            held += taken
            parent = digest
        path = self._tree.insert(space, path, tokens[: len(held) * PAGE_TOKENS], held)
        depths = {digest: depth for depth, digest in enumerate((space, *(node.digest for node in path)))}
        for name in found:
            if name.kind == "state" and name.parent in depths:
                state_path = path[: depths[name.parent]]
                self._let_go(self._insert_state(space, state_path, tokens, name, found[name]))
        self._let_go(held)
        fetch.release()

    def _insert_state(
        self,
        space: bytes,
        path: list[Node],
        tokens: Sequence[int],
        name: BlobName,
        found: tuple[str, bytes],
    ) -> tuple[int, ...]:
        """A fetched state becomes a snapshot. Returns the page of its open rows, still held, if any."""
        tier, blob = found
        start = len(path) * PAGE_TOKENS
        position, fold = STATE_HEAD.unpack_from(blob)
        open_tokens = tuple(tokens[start : start + name.offset])
        node = path[-1] if path else self._tree.root(space)
        if position - fold > self.policy.max_draft or open_tokens in node.snapshots:
            return ()  # written by a run with longer drafts: this one's rings cannot hold it
        page = self._take_pages(1) if open_tokens else ()
        if page is None:
            return ()
        slot = self._slots.allocate()
        if slot is None:
            slot = self._tree.evict_snapshot()
        if slot is None:
            return page
        self._moves.append(LoadState(name, blob, slot, page[0] if page else None, position))
        if page:
            self._tree.insert(space, path, tokens[:position], [*(n.page for n in path), *page])
        self._tree.hang(space, path, open_tokens, slot, fold).tier = tier
        return page

    # ---- the cache as a whole ----------------------------------------------------------------------------

    def flush(self) -> tuple[int, int]:
        """Forgets every cached prefix on the device: (pages, snapshots) that were known. What is on its way
        to it is not waited for."""
        for seq_id, fetch in self._fetches.items():
            if fetch is not None:
                fetch.release()
                self._fetches[seq_id] = None
        return self._tree.flush()

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
        """Assert that free + held + cached = total, and that each page and slot is held by who lists it."""
        self._pages.check()
        self._slots.check()
        self._tree.check()
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
