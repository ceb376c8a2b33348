"""Runs the segments of one step through the model and its caches; the only place where model and KV memory
meet."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bittrue.model.batch import Segment, build_batch
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.ops.contracts import LayerCache

# Logits of one block of rows are held at a time: 64 rows of 129,280 ids are 33 MB.
LOGIT_ROWS = 64


class Runner:
    """A model joined to its KV memory. Every tensor it touches is addressed by the integers of the
    segments."""

    def __init__(self, model: DeepseekV4, caches: Sequence[LayerCache]) -> None:
        self.model = model
        self.caches = list(caches)

    @property
    def max_draft(self) -> int:
        """How many tokens of a step its sequence may take back: the rows its HCA layers keep unfolded."""
        pending = [cache.hca_pending for cache in self.caches if cache.hca_pending is not None]
        return int(pending[0].shape[1]) if pending else 0

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Advances every segment's sequence by its tokens. Returns the last streams [T, M, D], segments in
        order."""
        return self.model.forward(build_batch(segments), self.caches)

    @torch.inference_mode()
    def logits(self, streams: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), V] f32 of the named rows of ``streams``."""
        return self.model.logits(streams[list(rows)])

    def logits_by_block(self, streams: Tensor, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The same for many rows, a bounded block at a time."""
        for start in range(0, len(rows), LOGIT_ROWS):
            block = rows[start : start + LOGIT_ROWS]
            yield block, self.logits(streams, block)
