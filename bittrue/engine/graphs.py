"""Small steps captured once per shape, then replayed: no Python between the ops of a step.

The shape of a step is its numbers of sequences and of tokens. Which sequence has how many of the tokens, and
where they stand, is data: all captures read the same index tensors, whose addresses stay and whose rows are
rewritten from the integers of the step; those of the page table only where a sequence's pages changed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bittrue.kv.ledger import GRAPH_ROWS, GRAPHS
from bittrue.model.batch import Segment
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.obs.trace import OpTimes
from bittrue.ops.contracts import Batch, Captured, LayerCache, OpTable
from bittrue.ops.recorded import Chosen, recorded


class StepGraphs:
    """Captured steps of up to GRAPH_ROWS tokens: their streams [T, M, D], logits [T, V] and choices.

    At most GRAPHS shapes are held; the one unused for longest makes room.
    """

    def __init__(self, model: DeepseekV4, caches: Sequence[LayerCache], table_width: int) -> None:
        assert model.ops.capture is not None
        self._model = model
        self._caches = caches
        self._index = _StepIndex(table_width)
        self._captured: dict[tuple[int, int], Captured] = {}  # the last used last

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(sequences, tokens) of the steps held, the last used last."""
        return list(self._captured)

    def covers(self, segments: Sequence[Segment]) -> bool:
        """Whether a step of ``segments`` is small enough to be captured: beyond, the kernels take far longer
        than the Python between them."""
        return 0 < len(segments) <= GRAPH_ROWS and 0 < sum(len(s.token_ids) for s in segments) <= GRAPH_ROWS

    def run(self, segments: Sequence[Segment], times: OpTimes | None = None) -> tuple[Tensor, Tensor, Chosen]:
        """Advances every sequence by its tokens. The tensors last until the next replay of anything captured
        by the model's ops. ``times``: what to add the time of every kernel to."""
        shape = len(segments), self._index.write(segments)
        captured = self._captured.pop(shape, None)
        if captured is None:
            if len(self._captured) == GRAPHS:
                del self._captured[next(iter(self._captured))]
            captured = self._capture(*shape)
        self._captured[shape] = captured
        if times is None:
            captured.replay()
        else:
            for name, seconds in captured.time():
                times.add(name, seconds)
        result: tuple[Tensor, Tensor, Chosen] = captured.result
        return result

    def _capture(self, num_sequences: int, num_tokens: int) -> Captured:
        batch = self._index.batch(num_sequences, num_tokens)

        def step(ops: OpTable) -> tuple[Tensor, Tensor, Chosen]:
            chosen = Chosen()
            model = self._model.on(recorded(ops, chosen))
            streams = model.forward(batch, self._caches)
            return streams, model.logits(streams), chosen

        assert self._model.ops.capture is not None
        return self._model.ops.capture(step)


class _StepIndex:
    """The index tensors of a step at addresses that stay: a step has the first rows of each."""

    def __init__(self, table_width: int) -> None:
        self._token_ids = np.zeros(GRAPH_ROWS, dtype=np.int64)
        self._positions = np.zeros(GRAPH_ROWS, dtype=np.int32)
        self._seq_ids = np.zeros(GRAPH_ROWS, dtype=np.int32)
        self._offsets = np.zeros(GRAPH_ROWS + 1, dtype=np.int32)
        self._starts = np.zeros(GRAPH_ROWS, dtype=np.int32)
        self._folds = np.zeros(GRAPH_ROWS, dtype=np.int32)
        self._slots = np.zeros(GRAPH_ROWS, dtype=np.int32)
        self._kept = np.zeros(GRAPH_ROWS, dtype=np.int32)
        # Not cleared: no op reads an entry beyond the pages of its sequence.
        self._table = np.empty((GRAPH_ROWS, table_width), dtype=np.int32)
        self._pages: list[Sequence[int] | None] = [None] * GRAPH_ROWS  # what each row of the table holds
        self._counts: list[int] = []  # what seq_ids and offsets hold

    def batch(self, num_sequences: int, num_tokens: int) -> Batch:
        """The step of these numbers, whatever it is rewritten to."""
        tokens, sequences = slice(num_tokens), slice(num_sequences)
        return Batch(
            token_ids=torch.from_numpy(self._token_ids[tokens]),
            positions=torch.from_numpy(self._positions[tokens]),
            seq_ids=torch.from_numpy(self._seq_ids[tokens]),
            offsets=torch.from_numpy(self._offsets[: num_sequences + 1]),
            starts=torch.from_numpy(self._starts[sequences]),
            folds=torch.from_numpy(self._folds[sequences]),
            slots=torch.from_numpy(self._slots[sequences]),
            kept=torch.from_numpy(self._kept[sequences]),
            page_table=torch.from_numpy(self._table[sequences]),
        )

    def write(self, segments: Sequence[Segment]) -> int:
        """Makes ``segments`` the step. Returns the number of its tokens."""
        counts = [len(s.token_ids) for s in segments]
        num_tokens, num_sequences = sum(counts), len(counts)
        self._token_ids[:num_tokens] = [t for s in segments for t in s.token_ids]
        starts = [s.start for s in segments]
        self._starts[:num_sequences] = starts
        self._folds[:num_sequences] = [s.fold for s in segments]
        self._slots[:num_sequences] = [s.slot for s in segments]
        self._kept[:num_sequences] = [s.kept for s in segments]
        if counts != self._counts:
            self._offsets[1 : num_sequences + 1] = np.cumsum(counts)
            self._seq_ids[:num_tokens] = np.repeat(np.arange(num_sequences), counts)
            self._counts = counts
        self._positions[:num_tokens] = [
            p for start, count in zip(starts, counts, strict=True) for p in range(start, start + count)
        ]
        for row, segment in enumerate(segments):
            pages = segment.page_ids
            # The same tuple is the same pages; a list could have been changed.
            if self._pages[row] is not pages or not isinstance(pages, tuple):
                self._table[row, : len(pages)] = pages
                self._pages[row] = pages
        return num_tokens
