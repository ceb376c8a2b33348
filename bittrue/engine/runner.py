"""Runs the segments of one step through the model and its caches; the only place where model and KV memory
meet."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bittrue.engine.graphs import StepGraphs
from bittrue.kv.layout import pages_for
from bittrue.kv.ledger import LOGIT_ROWS
from bittrue.model.batch import Segment, build_batch
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.obs.trace import OpTimes
from bittrue.ops.contracts import PAGE_TOKENS, LayerCache
from bittrue.ops.recorded import Chosen, recorded
from bittrue.ops.traced import traced


class Runner:
    """A model joined to its KV memory. Every tensor it touches is addressed by the integers of the
    segments."""

    def __init__(self, model: DeepseekV4, caches: Sequence[LayerCache]) -> None:
        """``caches``: of every layer of the model, then those of a draft module, which the runner only holds.

        All have the slots of the same states."""
        num_layers = model.config.num_layers
        assert len(caches) >= num_layers, f"{len(caches)} caches for {num_layers} layers"
        self.model = model
        self.caches = list(caches[:num_layers])
        self.draft_caches = list(caches[num_layers:])
        self.num_slots = self.caches[0].window.shape[0]
        # None: a model of window layers alone, whose pages hold nothing.
        self.num_pages = next((c.rows.shape[0] for c in self.caches if c.rows is not None), None)
        # How many tokens of a step its sequence may take back.
        self.max_draft = self.caches[0].window.shape[1] - model.config.window
        self._checked: list[Sequence[int] | None] = [None] * self.num_slots  # pages found to exist
        is_captured = model.ops.capture is not None
        self._graphs = StepGraphs(model, self.caches, self._most_pages()) if is_captured else None
        # Streams, logits and choices of the last step, if it was captured.
        self._replayed: tuple[Tensor, Tensor, Chosen] | None = None
        self._times: OpTimes | None = None

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], chosen: Chosen | None = None) -> Tensor:
        """Advances every segment's sequence by its tokens. Returns the last streams [T, M, D], segments in
        order; they last until the next step, or the next replay of anything captured by the model's ops: a
        draft module's too. ``chosen`` receives the step's choices, which last as long."""
        for segment in segments:
            self._check(segment)
        if self._graphs is not None and self._graphs.covers(segments):
            self._replayed = self._graphs.run(segments, self._times)
            if chosen is not None:
                chosen.add(self._replayed[2])
            return self._replayed[0]
        self._replayed = None
        model = self._traced_model()
        if chosen is not None:
            model = model.on(recorded(model.ops, chosen))
        return model.forward(build_batch(segments), self.caches)

    @contextlib.contextmanager
    def trace(self) -> Iterator[OpTimes]:
        """Records where the time of the steps inside goes."""
        self._times = OpTimes()
        try:
            yield self._times
        finally:
            self._times = None

    def _traced_model(self) -> DeepseekV4:
        return self.model if self._times is None else self.model.on(traced(self.model.ops, self._times))

    @torch.inference_mode()
    def logits(self, streams: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), V] f32 of the named rows of ``streams``, for the caller to keep."""
        return self._traced_model().logits(streams[list(rows)])

    def logits_by_block(self, streams: Tensor, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The same for many rows, a bounded block at a time; a block lasts as long as ``streams`` do."""
        replayed = self._replayed
        if replayed is not None and streams is replayed[0]:
            # A captured step has the logits of all its rows.
            yield rows, replayed[1] if list(rows) == list(range(len(streams))) else replayed[1][list(rows)]
            return
        for start in range(0, len(rows), LOGIT_ROWS):
            block = rows[start : start + LOGIT_ROWS]
            yield block, self.logits(streams, block)

    def _most_pages(self) -> int:
        """That one sequence can have."""
        width = pages_for(self.model.config.max_positions)
        return width if self.num_pages is None else min(width, self.num_pages)

    def _check(self, segment: Segment) -> None:
        """Asserts that no kernel is led outside the KV memory: they follow the integers of a step unasked."""
        start, end = segment.start, segment.start + len(segment.token_ids)
        covered = len(segment.page_ids) * PAGE_TOKENS
        assert 0 <= start and end <= covered, f"pages for {covered} tokens, a segment up to {end}"
        assert 0 <= segment.slot < self.num_slots, f"slot {segment.slot} of {self.num_slots}"
        oldest = start - min(start, self.max_draft)
        assert oldest <= segment.fold <= start, f"the fold is at {segment.fold}, not {oldest}..{start}"
        pages = segment.page_ids
        # The same tuple was looked through before; a list could have been changed.
        if self.num_pages is not None and (
            self._checked[segment.slot] is not pages or not isinstance(pages, tuple)
        ):
            assert max(pages, default=-1) < self.num_pages, f"page {max(pages)} of {self.num_pages}"
            self._checked[segment.slot] = pages
