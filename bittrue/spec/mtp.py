"""Drafts by the checkpoint's own draft module, which feeds on the streams of the last block."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bittrue.model.mtp import Mtp, MtpInput, once_each
from bittrue.ops.contracts import Batch, Captured, LayerCache
from bittrue.spec.proposer import Choose, DraftView

# Rows of a captured call at most: beyond, the kernels take far longer than the Python between them.
GRAPH_ROWS = 32

Key = TypeVar("Key")  # of a captured call


class Row(NamedTuple):
    """One position of one sequence: the token after it is known, or drafted."""

    slot: int
    position: int
    next_id: int


class MtpProposer:
    """Keeps the module's ring of every live sequence and drafts by recursion.

    The ring is a layer of the sequence's state: it holds the row of every position whose streams and next
    token were known, and follows the sequence through snapshots and preemption. A draft beyond the first is
    made from the module's own streams and drafts, at positions that are not computed yet; what that leaves
    in the ring is written again, from the true streams and tokens, when the step has computed them.

    Rows are independent of each other but for the ring, so every row is a segment of one token: any number of
    them, of any sequences, is one call. Calls of up to GRAPH_ROWS rows are captured once and replayed. A
    greedy sequence alone is drafted for in a single replay: rows to store, forwards and arg-maxes in turn.
    """

    def __init__(self, mtp: Mtp, cache: LayerCache) -> None:
        """``cache``: of the draft layer, with the slots of the target's states."""
        self._mtp = mtp
        self._cache = cache
        self._window = mtp.model.config.window
        self._rows = _Rows(mtp, GRAPH_ROWS)
        self._forwards: dict[int, Captured] = {}
        self._stores: dict[int, Captured] = {}
        self._chains: dict[tuple[int, int], Captured] = {}  # rows stored, drafts

    @property
    def is_lazy(self) -> bool:
        return False  # its window ring holds what only this step's streams tell

    @torch.inference_mode()
    def after_step(
        self, streams: Tensor, views: Sequence[DraftView], choose: Choose
    ) -> list[tuple[int, ...]]:
        if len(views) == 1 and self._can_chain(views[0]):
            return [self._chain(streams, views[0])]
        stored: list[Row] = []
        heads: list[Row] = []
        from_stored: list[int] = []  # rows of streams
        from_heads: list[int] = []
        drafting: list[int] = []  # views
        for index, view in enumerate(views):
            drafts = view.wants > 0 and view.computed_from < view.computed_to
            assert not drafts or view.computed_to == len(view.tokens) - 1, "a prefill wants drafts"
            # Earlier rows would be overwritten, or never read again.
            first = max(view.computed_from, view.computed_to - self._window)
            for position in range(first, view.computed_to):
                is_head = drafts and position == view.computed_to - 1
                row = Row(view.slot, position, view.tokens[position + 1])
                (heads if is_head else stored).append(row)
                (from_heads if is_head else from_stored).append(
                    view.first_row + position - view.computed_from
                )
            if drafts:
                drafting.append(index)
        # A replay writes over the step's streams: what is needed of them is copied first.
        head_streams = streams[from_heads]
        if stored:
            self._store(stored, streams[from_stored])
        return self._draft(heads, head_streams, drafting, views, choose)

    def forget(self, seq_id: str) -> None:
        """Nothing is kept per sequence but its ring."""

    def _draft(
        self,
        rows: list[Row],
        streams: Tensor,
        drafting: list[int],
        views: Sequence[DraftView],
        choose: Choose,
    ) -> list[tuple[int, ...]]:
        """``rows`` and ``streams`` are those of the last computed position of each view in ``drafting``."""
        drafts: list[list[int]] = [[] for _ in views]
        place = 0
        while drafting:
            streams, logits = self._forward(rows, streams)
            chosen = choose(logits, drafting, place)
            for index, token in zip(drafting, chosen, strict=True):
                drafts[index].append(token)
            place += 1
            stay = [i for i, index in enumerate(drafting) if views[index].wants > place]
            rows = [Row(rows[i].slot, rows[i].position + 1, chosen[i]) for i in stay]
            if len(stay) < len(drafting):
                streams = streams[stay]
                drafting = [drafting[i] for i in stay]
        return [tuple(found) for found in drafts]

    # ---- calls -------------------------------------------------------------------------------------------

    def _forward(self, rows: Sequence[Row], streams: Tensor) -> tuple[Tensor, Tensor]:
        """Streams and logits of ``rows``, one of each sequence at most; they last until the next call."""

        def call(mtp: Mtp, given: MtpInput) -> tuple[Tensor, Tensor]:
            own = mtp.forward(given, self._cache)
            return own, mtp.logits(own)

        count = len(rows)
        if not self._is_captured(count):
            return call(self._mtp, self._given(rows, streams))
        self._rows.write(rows, streams)
        own, logits = self._replay(self._forwards, count, lambda mtp: call(mtp, self._rows.given(count)))
        return own, logits

    def _store(self, rows: Sequence[Row], streams: Tensor) -> None:
        """Puts ``rows`` in their rings."""

        def call(mtp: Mtp, given: MtpInput) -> None:
            mtp.store_rows(given, self._cache)

        count = len(rows)
        if not self._is_captured(count):
            call(self._mtp, self._given(rows, streams))
            return
        # Few captures serve all counts: what is missing to the next power of two is the first row again, the
        # same bytes in the same place.
        padded = _padded(count)
        self._rows.write([*rows, *(rows[0] for _ in range(count, padded))], streams)
        self._rows.streams[count:padded] = streams[0]
        self._replay(self._stores, padded, lambda mtp: call(mtp, self._rows.given(padded)))

    def _can_chain(self, view: DraftView) -> bool:
        num_stored = min(view.computed_to - view.computed_from, self._window) - 1
        return (
            view.is_greedy
            and view.wants > 0
            and num_stored >= 0
            and self._is_captured(_padded(num_stored) + view.wants)
        )

    def _chain(self, streams: Tensor, view: DraftView) -> tuple[int, ...]:
        """Stores the rows of one sequence and drafts behind the last, each draft made from the one before."""
        last, wants = view.computed_to - 1, view.wants
        first = max(view.computed_from, view.computed_to - self._window)
        num_stored = last - first
        count = _padded(num_stored)
        # Rows to store, the first of them again up to the count, then a row for each draft.
        positions = [*range(first, last), *(first,) * (count - num_stored), *range(last, last + wants)]
        next_ids = [view.tokens[position + 1] for position in positions[:count]]
        self._rows.write_one(view.slot, positions, [*next_ids, view.tokens[last + 1]])
        given, row = self._rows.streams, view.first_row + first - view.computed_from
        given[:num_stored] = streams[row : row + num_stored]
        given[num_stored:count] = streams[row]
        given[count] = streams[row + num_stored]
        drafts = self._replay(
            self._chains, (count, wants), lambda mtp: self._store_and_draft(mtp, count, wants)
        )
        return tuple(int(token) for token in drafts)

    def _store_and_draft(self, mtp: Mtp, count: int, num_drafts: int) -> list[Tensor]:
        """Stores ``count`` rows written, and makes the drafts from the row behind them on: [1] i64 each."""
        if count:
            mtp.store_rows(self._rows.given(count), self._cache)
        given, drafts = self._rows.given(1, first=count), []
        for place in range(1, num_drafts + 1):
            own = mtp.forward(given, self._cache)
            drafts.append(mtp.model.ops.argmax(mtp.logits(own)))
            if place < num_drafts:
                behind = self._rows.given(1, first=count + place)
                given = MtpInput(replace(behind.batch, token_ids=drafts[-1]), own, behind.once)
        return drafts

    def _is_captured(self, count: int) -> bool:
        return self._mtp.model.ops.capture is not None and count <= GRAPH_ROWS

    def _given(self, rows: Sequence[Row], streams: Tensor) -> MtpInput:
        """The input of a direct call."""
        own = _Rows(self._mtp, len(rows))
        own.write(rows, streams)
        return own.given(len(rows))

    def _replay(self, captures: dict[Key, Captured], key: Key, call: Callable[[Mtp], Any]) -> Any:
        """Runs ``call``, which reads the rows written and is the same for the same key."""
        captured = captures.get(key)
        if captured is None:
            capture = self._mtp.model.ops.capture
            assert capture is not None
            captured = captures[key] = capture(lambda ops: call(self._mtp.on(ops)))
        return captured.replay()


def _padded(count: int) -> int:
    """The power of two that a call for ``count`` rows is captured for; 0 for none."""
    return min(GRAPH_ROWS, 1 << (count - 1).bit_length()) if count else 0


class _Rows:
    """The inputs of a call at fixed addresses: ``given`` of any count reads the rows from ``first`` on."""

    def __init__(self, mtp: Mtp, capacity: int) -> None:
        config = mtp.model.config
        self._slots = torch.zeros(capacity, dtype=torch.int32)
        self._positions = torch.zeros(capacity, dtype=torch.int32)
        self._next_ids = torch.zeros(capacity, dtype=torch.int64)
        self.streams = torch.zeros(capacity, config.hc_mult, config.hidden_size, dtype=mtp.model.act)
        self._order = torch.arange(capacity + 1, dtype=torch.int32)
        self._no_pages = torch.zeros(capacity, 0, dtype=torch.int32)
        self._once = once_each(capacity, config.hc_mult)

    def write(self, rows: Sequence[Row], streams: Tensor) -> None:
        """``streams`` [n, M, D] of the first n of ``rows``."""
        count = len(rows)
        slots, positions, next_ids = zip(*rows, strict=True)
        self._slots.numpy()[:count] = slots
        self._positions.numpy()[:count] = positions
        self._next_ids.numpy()[:count] = next_ids
        self.streams[: len(streams)] = streams

    def write_one(self, slot: int, positions: Sequence[int], next_ids: Sequence[int]) -> None:
        """Rows of one sequence; ``next_ids`` of the first of them. The caller writes their streams."""
        count = len(positions)
        self._slots.numpy()[:count] = slot
        self._positions.numpy()[:count] = positions
        self._next_ids.numpy()[: len(next_ids)] = next_ids

    def given(self, count: int, *, first: int = 0) -> MtpInput:
        rows = slice(first, first + count)
        positions = self._positions[rows]
        batch = Batch(
            token_ids=self._next_ids[rows],
            positions=positions,
            seq_ids=self._order[:count],
            offsets=self._order[: count + 1],
            starts=positions,
            folds=positions,
            slots=self._slots[rows],
            kept=positions,
            page_table=self._no_pages[rows],
        )
        ones, identity = self._once
        return MtpInput(batch, self.streams[rows], (ones[rows], identity[rows]))
