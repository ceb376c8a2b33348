"""Runs the segments of one step through the model and its caches; the only place where model and KV memory
meet."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bittrue.engine.graphs import DecodeGraph
from bittrue.kv.layout import pages_for
from bittrue.kv.ledger import GRAPH_SEQUENCES, LOGIT_ROWS
from bittrue.model.batch import Segment, build_batch
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.obs.trace import OpTimes
from bittrue.ops.contracts import PAGE_TOKENS, LayerCache
from bittrue.ops.traced import traced


class Runner:
    """A model joined to its KV memory. Every tensor it touches is addressed by the integers of the
    segments."""

    def __init__(self, model: DeepseekV4, caches: Sequence[LayerCache]) -> None:
        self.model = model
        self._capture = model.ops.capture
        self._times: OpTimes | None = None
        self.caches = list(caches)
        self.num_slots = self.caches[0].window.shape[0]
        # None: a model of window layers alone, whose pages hold nothing.
        self.num_pages = next((c.rows.shape[0] for c in self.caches if c.rows is not None), None)
        # How many tokens of a step its sequence may take back.
        self.max_draft = self.caches[0].window.shape[1] - model.config.window
        self._checked: list[Sequence[int] | None] = [None] * self.num_slots  # pages found to exist
        self._graphs: dict[int, DecodeGraph] = {}
        self._decoded: tuple[Tensor, Tensor] | None = None  # streams and logits of the last step, if captured

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Advances every segment's sequence by its tokens. Returns the last streams [T, M, D], segments in
        order; they last until the next step."""
        for segment in segments:
            self._check(segment)
        if self._has_graph(segments):
            self._decoded = self._graph(len(segments)).run(segments, self._times)
            return self._decoded[0]
        self._decoded = None
        return self._traced_model().forward(build_batch(segments), self.caches)

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
        """The same for many rows, a bounded block at a time; a block lasts until the next step."""
        decoded = self._decoded
        if decoded is not None and streams is decoded[0] and list(rows) == list(range(len(streams))):
            yield rows, decoded[1]
            return
        for start in range(0, len(rows), LOGIT_ROWS):
            block = rows[start : start + LOGIT_ROWS]
            yield block, self.logits(streams, block)

    def _has_graph(self, segments: Sequence[Segment]) -> bool:
        if self._capture is None or not 0 < len(segments) <= GRAPH_SEQUENCES:
            return False
        return all(len(segment.token_ids) == 1 for segment in segments)

    def _graph(self, num_sequences: int) -> DecodeGraph:
        graph = self._graphs.get(num_sequences)
        if graph is None:
            width = pages_for(self.model.config.max_positions)
            if self.num_pages is not None:
                width = min(width, self.num_pages)
            graph = DecodeGraph(self.model, self.caches, num_sequences, width)
            self._graphs[num_sequences] = graph
        return graph

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
