"""Drafts by the checkpoint's own draft module, which feeds on the streams of the last block."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bittrue.model.mtp import Mtp, MtpInput, once_each
from bittrue.ops.contracts import Batch, Captured, LayerCache
from bittrue.spec.proposer import Choose, DraftView

# Rows of a captured call at most: beyond, the kernels take far longer than the Python between them.
GRAPH_ROWS = 32


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
    them, of any sequences, is one call. Calls of up to GRAPH_ROWS rows are captured once and replayed.
    """

    def __init__(self, mtp: Mtp, cache: LayerCache) -> None:
        """``cache``: of the draft layer, with the slots of the target's states."""
        self._mtp = mtp
        self._cache = cache
        self._window = mtp.model.config.window
        self._rows = _Rows(mtp, GRAPH_ROWS)
        self._forwards: dict[int, Captured] = {}
        self._stores: dict[int, Captured] = {}

    @property
    def is_lazy(self) -> bool:
        return False  # its window ring holds what only this step's streams tell

    @torch.inference_mode()
    def after_step(
        self, streams: Tensor, views: Sequence[DraftView], choose: Choose
    ) -> list[tuple[int, ...]]:
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
        own, logits = self._replay(self._forwards, count, call)
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
        padded = min(GRAPH_ROWS, 1 << (count - 1).bit_length())
        self._rows.write([*rows, *(rows[0] for _ in range(count, padded))], streams)
        self._rows.streams[count:padded] = streams[0]
        self._replay(self._stores, padded, call)

    def _is_captured(self, count: int) -> bool:
        return self._mtp.model.ops.capture is not None and count <= GRAPH_ROWS

    def _given(self, rows: Sequence[Row], streams: Tensor) -> MtpInput:
        """The input of a direct call."""
        own = _Rows(self._mtp, len(rows))
        own.write(rows, streams)
        return own.given(len(rows))

    def _replay(self, captures: dict[int, Captured], count: int, call: Callable[[Mtp, MtpInput], Any]) -> Any:
        """Runs ``call`` on the first ``count`` rows written."""
        captured = captures.get(count)
        if captured is None:
            capture = self._mtp.model.ops.capture
            assert capture is not None
            given = self._rows.given(count)
            captured = captures[count] = capture(lambda ops: call(self._mtp.on(ops), given))
        return captured.replay()


class _Rows:
    """The inputs of a call at fixed addresses: ``given`` of any count reads the first rows."""

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

    def given(self, count: int) -> MtpInput:
        positions = self._positions[:count]
        batch = Batch(
            token_ids=self._next_ids[:count],
            positions=positions,
            seq_ids=self._order[:count],
            offsets=self._order[: count + 1],
            starts=positions,
            folds=positions,
            slots=self._slots[:count],
            kept=positions,
            page_table=self._no_pages[:count],
        )
        ones, identity = self._once
        return MtpInput(batch, self.streams[:count], (ones[:count], identity[:count]))
