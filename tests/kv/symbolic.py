"""What the cache tensors hold, told in symbols: executes moves and steps, and finds every wrong read.

A compressed row is the token prefix it was pooled from; a row of a ring is the prefix it was computed
behind, with its *depth*: for how many layers its input is what a run from position 0 has. Nothing is
cleared that the tensors do not clear: freed pages and slots keep what was in them, so whoever reads a stale
one is caught.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kv.symbolic_tiers import SymbolicTiers

from bittrue.engine.plan import ScheduledSequence
from bittrue.kv.identity import STATE_HEAD, BlobName
from bittrue.kv.layout import CSA_FRONTIER, CSA_RATIO, HCA_RATIO, PAGE_TOKENS
from bittrue.kv.manager import CachePolicy
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

CSA_ENTRIES = PAGE_TOKENS // CSA_RATIO
ENTRIES = CSA_ENTRIES + 1  # of a page: the CSA entries, then the HCA entry


class Fault(AssertionError):
    """The cache would have given wrong bits."""


class Prefixes:
    """Names of token prefixes: one integer each, whatever the length. A root stands for what the bits depend
    on beside the tokens."""

    def __init__(self) -> None:
        self._ids: dict[tuple[object, int], int] = {}
        self.parents = [-1]

    def root(self, facts: object) -> int:
        return self._child(("root", facts), -1, -1)

    def extend(self, ids: list[int], tokens: Sequence[int]) -> list[int]:
        """Appends to ``ids``, which ends with the prefix before ``tokens``, the prefix after each of them."""
        for token in tokens:
            ids.append(self._child(ids[-1], token, ids[-1]))
        return ids

    def _child(self, key: object, token: int, parent: int) -> int:
        found = self._ids.get((key, token))
        if found is None:
            found = self._ids[key, token] = len(self.parents)
            self.parents.append(parent)
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """Of a ring: the token that ends ``prefix`` stood here. ``depth`` -1: zeros."""

    prefix: int
    depth: int


CLEARED, GARBAGE = Row(-1, -1), Row(-2, -1)


@dataclass(slots=True)
class Slot:
    """``pool``: the running pool of the open HCA window, as the row of the last token in it."""

    window: list[Row]
    csa: list[Row]
    pending: list[Row]
    pool: Row = GARBAGE

    def fill(self, row: Row) -> None:
        for ring in (self.window, self.csa, self.pending):
            ring[:] = [row] * len(ring)
        self.pool = row

    def take(self, other: "Slot") -> None:
        self.window[:], self.csa[:], self.pending[:] = other.window, other.csa, other.pending
        self.pool = other.pool


@dataclass(frozen=True, slots=True)
class Reader:
    """Where a sequence or a snapshot stands: it has computed ``position`` tokens, ``ids[i]`` names the first
    i, its running pool is at ``fold``."""

    name: str
    ids: Sequence[int]
    position: int
    fold: int


@dataclass(slots=True)
class SymbolicCache:
    """Pages and slots of a model with ``policy.num_layers`` layers of every kind."""

    policy: CachePolicy
    num_pages: int
    num_slots: int
    prefixes: Prefixes
    tiers: SymbolicTiers | None = None
    pages: list[list[int]] = field(init=False)  # [page][entry] -> prefix; 0 = garbage
    slots: list[Slot] = field(init=False)
    moved: Counter[str] = field(init=False, default_factory=Counter)
    _before: dict[int, Slot] = field(init=False, default_factory=dict)  # of the step under way

    def __post_init__(self) -> None:
        draft = self.policy.max_draft
        self.pages = [[0] * ENTRIES for _ in range(self.num_pages)]
        sizes = (self.policy.window + draft, CSA_FRONTIER + draft, draft)
        self.slots = [Slot(*([GARBAGE] * size for size in sizes)) for _ in range(self.num_slots)]

    # ---- moves -------------------------------------------------------------------------------------------

    def apply(self, moves: Sequence[Move]) -> None:
        for move in moves:
            self.moved[type(move).__name__] += 1
            match move:
                case CopyPage(source, target):
                    self.pages[target][:] = self.pages[source]
                case CopySlot(source, target):
                    self.slots[target].take(self.slots[source])
                case ClearSlot(slot):
                    self.slots[slot].fill(CLEARED)
                case SavePage():
                    self._save_page(move)
                case SaveState():
                    self._save_state(move)
                case LoadPage(name, data, page):
                    self.pages[page][:] = self._tiers.content(name, data)
                case LoadState(name, data, slot, page, position):
                    self._load_state(name, data, slot, page, position)

    @property
    def _tiers(self) -> SymbolicTiers:
        assert self.tiers is not None, "a move to or from tiers, and there are none"
        return self.tiers

    def _save_page(self, move: SavePage) -> None:
        rows = self.pages[move.page]
        for before, after in zip(rows[: CSA_ENTRIES - 1], rows[1:CSA_ENTRIES], strict=True):
            if not before or self._ancestor(after, CSA_RATIO) != before:
                raise Fault(f"page {move.page} is saved with rows of two sequences, or unfinished")
        if rows[CSA_ENTRIES] != rows[CSA_ENTRIES - 1]:
            raise Fault(f"page {move.page} is saved without its HCA row")
        self._tiers.save(move.space, move.name, tuple(rows))

    def _save_state(self, move: SaveState) -> None:
        position, fold, held = move.position, move.fold, self.slots[move.slot]
        ids = self._history_of(move.slot, position)
        self.check_state(Reader(f"the state saved at {position}", ids, position, fold), move.slot)
        rows: tuple[int, ...] = ()
        if move.page is not None:
            self._check_page(move.page, ids, position // PAGE_TOKENS, position, "a saved state")
            rows = tuple(self.pages[move.page][: position % PAGE_TOKENS // CSA_RATIO])
        rings = [
            {p: ring[p % len(ring)] for p in places}
            for ring, places in zip(
                (held.window, held.csa, held.pending), self._ring_places(position, fold), strict=True
            )
        ]
        head = STATE_HEAD.pack(position, fold)
        self._tiers.save(move.space, move.name, (rings, held.pool, rows), head)

    def _load_state(self, name: BlobName, data: bytes, slot: int, page: int | None, position: int) -> None:
        assert STATE_HEAD.unpack_from(data)[0] == position, "a state of another position"
        rings, pool, rows = self._tiers.content(name, data[STATE_HEAD.size :])
        held = self.slots[slot]
        for ring, saved in zip((held.window, held.csa, held.pending), rings, strict=True):
            for p, row in saved.items():
                ring[p % len(ring)] = row
        held.pool = pool
        if page is not None:
            self.pages[page][: len(rows)] = rows

    def _ring_places(self, position: int, fold: int) -> tuple[range, range, range]:
        return (
            range(max(0, position - self.policy.window + 1), position),
            range(max(0, position - CSA_FRONTIER + 1), position),
            range(fold, position),
        )

    def _ancestor(self, prefix: int, steps: int) -> int:
        for _ in range(steps):
            prefix = self.prefixes.parents[prefix]
        return prefix

    def _history_of(self, slot: int, position: int) -> list[int]:
        """The prefixes behind which a state claims to stand, by its last window row."""
        window = self.slots[slot].window
        ids = [window[(position - 1) % len(window)].prefix]
        while len(ids) <= position and ids[-1] > 0:
            ids.append(self.prefixes.parents[ids[-1]])
        if len(ids) != position + 1 or self.prefixes.parents[ids[-1]] != -1:
            raise Fault(f"slot {slot} is saved as a state at {position}, where it does not stand")
        return ids[::-1]

    # ---- steps -------------------------------------------------------------------------------------------

    def run(self, parts: Sequence[tuple[ScheduledSequence, Sequence[int]]]) -> list[list[int]]:
        """One step. ``parts``: each with the prefixes ids[0..end] of its tokens, drafts included. Returns per
        part the depth of each token: its logits are right from ``num_layers`` on."""
        self._check_apart([part for part, _ in parts])
        read: Counter[tuple[int, int]] = Counter()
        for part, ids in parts:
            read.update(self._read_rows(part, ids))
        written: set[tuple[int, int]] = set()
        depths = []
        for part, ids in parts:
            depths.append(self._compute(part, ids))
            for page, entry, prefix in self._rows_closed(part, ids, depths[-1]):
                if (page, entry) in written or read[page, entry]:
                    raise Fault(f"{part.seq_id} writes entry {entry} of page {page}, which others use")
                written.add((page, entry))
                self.pages[page][entry] = prefix
        return depths

    def _check_apart(self, parts: Sequence[ScheduledSequence]) -> None:
        if len({part.slot for part in parts}) != len(parts):
            raise Fault("two sequences of a step share a slot")
        for part in parts:
            if len(set(part.page_ids)) != len(part.page_ids) or part.end > len(part.page_ids) * PAGE_TOKENS:
                raise Fault(f"the pages of {part.seq_id} do not hold its tokens")
            if not max(0, part.start - self.policy.max_draft) <= part.fold <= part.start < part.end:
                raise Fault(f"the fold of {part.seq_id} is off")

    def _read_rows(self, part: ScheduledSequence, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Entries that have to stand before the step, checked: those of tokens before it, or before kept."""
        stands = max(part.start, min(part.kept, part.end))
        return self.check_rows(part.page_ids, ids, stands, part.seq_id)

    def check_rows(
        self, page_ids: Sequence[int], ids: Sequence[int], stands: int, name: str
    ) -> list[tuple[int, int]]:
        """Every entry closed by the first ``stands`` tokens is in its page."""
        places = []
        for index in range(-(-stands // PAGE_TOKENS)):
            places += self._check_page(page_ids[index], ids, index, stands, name)
        return places

    def _check_page(
        self, page: int, ids: Sequence[int], index: int, stands: int, name: str
    ) -> list[tuple[int, int]]:
        first = index * PAGE_TOKENS
        closed = min(CSA_ENTRIES, (stands - first) // CSA_RATIO)
        wanted = ids[first + CSA_RATIO : first + CSA_RATIO * closed + 1 : CSA_RATIO]
        rows = self.pages[page]
        if rows[:closed] != list(wanted):
            entry = next(i for i in range(closed) if rows[i] != wanted[i])
            raise Fault(f"{name} reads entry {entry} of page {page} at {first}, and another row is there")
        places = [(page, entry) for entry in range(closed)]
        if closed == CSA_ENTRIES:
            if rows[CSA_ENTRIES] != ids[first + HCA_RATIO]:
                raise Fault(f"{name} reads the HCA entry of page {page} at {first}, and another row is there")
            places.append((page, CSA_ENTRIES))
        return places

    def _compute(self, part: ScheduledSequence, ids: Sequence[int]) -> list[int]:
        """Writes the rings (what they had is in ``_before``); the depth of each token of the step.

        The window row of layer i is exact where depth >= i, so a token's depth is one more than the least
        among those it sees.
        """
        slot, start, end = self.slots[part.slot], part.start, part.end
        before = replace(slot, window=slot.window[:], csa=slot.csa[:], pending=slot.pending[:])
        self._before[part.slot] = before
        window, full = self.policy.window, self.policy.num_layers
        rows = {p: self._row(slot.window, p, ids, part.seq_id) for p in self._ring_places(start, start)[0]}
        depths: list[int] = []
        seen = [row.depth for row in rows.values()]
        if min(seen, default=full) >= full - 1:
            depths = [full] * (end - start)
        else:
            for p in range(start, end):
                behind = seen[-min(p, window - 1) :] if window > 1 else []
                depths.append(min([full, *(depth + 1 for depth in behind)]))
                seen.append(depths[-1])
        new = {p: Row(ids[p + 1], depths[p - start]) for p in range(start, end)}
        for ring in (slot.window, slot.csa):
            for p in range(max(start, end - len(ring)), end):
                ring[p % len(ring)] = new[p]
        self._fold(part, ids, new, before)
        return depths

    def _row(self, ring: list[Row], p: int, ids: Sequence[int], name: str) -> Row:
        row = ring[p % len(ring)]
        if row is not CLEARED and row.prefix != ids[p + 1]:
            raise Fault(f"{name} reads the row of position {p}, and another is there")
        return row

    def _fold(self, part: ScheduledSequence, ids: Sequence[int], new: dict[int, Row], before: Slot) -> None:
        slot, at = self.slots[part.slot], max(part.fold, part.end - self.policy.max_draft)
        pending = {p: self._row(before.pending, p, ids, part.seq_id) for p in range(part.fold, part.start)}
        depth = self._pool_depth(part, ids, before, pending | new, at)
        slot.pool = Row(ids[at], depth)
        for p in range(max(part.start, at), part.end):
            slot.pending[p % len(slot.pending)] = new[p]

    def _pool_depth(
        self, part: ScheduledSequence, ids: Sequence[int], before: Slot, rows: dict[int, Row], at: int
    ) -> int:
        """Depth of what is pooled of the window that is open before position ``at``."""
        first = (at - 1) // HCA_RATIO * HCA_RATIO
        depths = [rows[p].depth for p in range(max(first, part.fold), at)]
        if first < part.fold and part.fold % HCA_RATIO:
            if before.pool is not CLEARED and before.pool.prefix != ids[part.fold]:
                raise Fault(f"{part.seq_id} goes on from a pool that does not stand at {part.fold}")
            depths.append(before.pool.depth)
        return min(depths, default=self.policy.num_layers)

    def _rows_closed(
        self, part: ScheduledSequence, ids: Sequence[int], depths: Sequence[int]
    ) -> list[tuple[int, int, int]]:
        """(page, entry, prefix) of what the step writes: entries that tokens from ``kept`` on close."""
        before, exact = self._before.pop(part.slot), self.policy.num_layers - 1
        closed = []

        def depth_at(p: int) -> int:
            if p >= part.start:
                return depths[p - part.start]
            return self._row(before.csa, p, ids, part.seq_id).depth

        for t in range(max(part.start, part.kept), part.end):
            page = part.page_ids[t // PAGE_TOKENS]
            if (t + 1) % CSA_RATIO == 0:
                pooled = range(max(0, t + 1 - 2 * CSA_RATIO), t + 1)
                if min(depth_at(p) for p in pooled) < exact:
                    raise Fault(f"{part.seq_id} writes a CSA row at {t} from states that are not exact yet")
                closed.append((page, t % PAGE_TOKENS // CSA_RATIO, ids[t + 1]))
            if (t + 1) % HCA_RATIO == 0:
                self._check_pooled(part, ids, before, depths, t + 1)
                closed.append((page, CSA_ENTRIES, ids[t + 1]))
        return closed

    def _check_pooled(
        self, part: ScheduledSequence, ids: Sequence[int], before: Slot, depths: Sequence[int], at: int
    ) -> None:
        rows = {p: self._row(before.pending, p, ids, part.seq_id) for p in range(part.fold, part.start)}
        rows |= {part.start + i: Row(-1, depth) for i, depth in enumerate(depths)}
        if self._pool_depth(part, ids, before, rows, at) < self.policy.num_layers - 1:
            raise Fault(f"{part.seq_id} writes an HCA row at {at - 1} from states that are not exact yet")

    # ---- what stands -------------------------------------------------------------------------------------

    def check_state(self, reader: Reader, slot: int, *, exact: bool = True) -> None:
        """``slot`` is what a run from position 0 has before the token at ``reader.position``, in everything
        that a later token asks for; without ``exact`` of the right tokens, at any depth."""
        held, ids, position = self.slots[slot], reader.ids, reader.position
        least = self.policy.num_layers - 1 if exact else -1
        open_window = position // HCA_RATIO * HCA_RATIO
        window, _, pending = self._ring_places(position, reader.fold)
        csa = range(max(0, position // CSA_RATIO * CSA_RATIO - CSA_RATIO), position)
        rows = [(p, held.window, least) for p in window] + [(p, held.csa, least) for p in csa]
        rows += [(p, held.pending, least if p >= open_window else -1) for p in pending]
        for p, ring, depth in rows:
            row = ring[p % len(ring)]
            is_right = row.prefix == ids[p + 1] or (not exact and row is CLEARED)
            if not is_right or row.depth < depth:
                raise Fault(f"{reader.name}: the row of position {p} in slot {slot} is not what it should be")
        if reader.fold > open_window:
            is_right = held.pool.prefix == ids[reader.fold] or (not exact and held.pool is CLEARED)
            if not is_right or held.pool.depth < least:
                raise Fault(f"{reader.name}: the pool in slot {slot} is not what it should be")
