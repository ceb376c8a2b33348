"""Runs the segments of one step through the model and its caches; the only place where model and KV memory
meet."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bittrue.model.batch import Segment, build_batch
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.ops.contracts import PAGE_TOKENS, Batch, LayerCache

# Logits of one block of rows are held at a time: 64 rows of 129,280 ids are 33 MB.
LOGIT_ROWS = 64


class Runner:
    """A model joined to its KV memory. Every tensor it touches is addressed by the integers of the
    segments."""

    def __init__(self, model: DeepseekV4, caches: Sequence[LayerCache]) -> None:
        self.model = model
        self.caches = list(caches)
        self.num_slots = self.caches[0].window.shape[0]
        # None: a model of window layers alone, whose pages hold nothing.
        self.num_pages = next((c.rows.shape[0] for c in self.caches if c.rows is not None), None)
        # How many tokens of a step its sequence may take back.
        self.max_draft = self.caches[0].window.shape[1] - model.config.window

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Advances every segment's sequence by its tokens. Returns the last streams [T, M, D], segments in
        order."""
        batch = build_batch(segments)
        self._check(segments, batch)
        return self.model.forward(batch, self.caches)

    @torch.inference_mode()
    def logits(self, streams: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), V] f32 of the named rows of ``streams``."""
        return self.model.logits(streams[list(rows)])

    def logits_by_block(self, streams: Tensor, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The same for many rows, a bounded block at a time."""
        for start in range(0, len(rows), LOGIT_ROWS):
            block = rows[start : start + LOGIT_ROWS]
            yield block, self.logits(streams, block)

    def _check(self, segments: Sequence[Segment], batch: Batch) -> None:
        """Asserts that no kernel is led outside the KV memory: they follow the integers of a step unasked."""
        for segment in segments:
            start, end = segment.start, segment.start + len(segment.token_ids)
            covered = len(segment.page_ids) * PAGE_TOKENS
            assert 0 <= start and end <= covered, f"pages for {covered} tokens, a segment up to {end}"
            assert 0 <= segment.slot < self.num_slots, f"slot {segment.slot} of {self.num_slots}"
            oldest = start - min(start, self.max_draft)
            assert oldest <= segment.fold <= start, f"the fold is at {segment.fold}, not {oldest}..{start}"
        if self.num_pages is not None and batch.page_table.numel():
            largest = int(batch.page_table.max())
            assert largest < self.num_pages, f"page {largest} of {self.num_pages}"
