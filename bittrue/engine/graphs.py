"""Decode steps captured once per number of sequences, then replayed: no Python between the ops of a step.

Only a step in which every sequence has one token is captured. Its index tensors keep their addresses and are
rewritten from the integers of the step; the page table only where a sequence's pages changed.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bittrue.model.batch import Segment
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.obs.trace import OpTimes
from bittrue.ops.contracts import Batch, Captured, LayerCache


class DecodeGraph:
    """The captured step of ``num_sequences`` sequences: their streams [S, M, D] and logits [S, V]."""

    def __init__(
        self, model: DeepseekV4, caches: Sequence[LayerCache], num_sequences: int, table_width: int
    ) -> None:
        assert model.ops.capture is not None
        count = torch.arange(num_sequences + 1, dtype=torch.int32)
        self._token_ids = np.zeros(num_sequences, dtype=np.int64)
        self._positions = np.zeros(num_sequences, dtype=np.int32)
        self._folds = np.zeros(num_sequences, dtype=np.int32)
        self._slots = np.zeros(num_sequences, dtype=np.int32)
        self._kept = np.zeros(num_sequences, dtype=np.int32)
        # Not cleared: no op reads an entry beyond the pages of its sequence.
        self._table = np.empty((num_sequences, table_width), dtype=np.int32)
        self._pages: list[Sequence[int] | None] = [None] * num_sequences  # what each row of the table holds
        positions = torch.from_numpy(self._positions)
        batch = Batch(
            token_ids=torch.from_numpy(self._token_ids),
            positions=positions,
            seq_ids=count[:-1],
            offsets=count,
            starts=positions,
            folds=torch.from_numpy(self._folds),
            slots=torch.from_numpy(self._slots),
            kept=torch.from_numpy(self._kept),
            page_table=torch.from_numpy(self._table),
        )

        def step(model: DeepseekV4) -> tuple[Tensor, Tensor]:
            streams = model.forward(batch, caches)
            return streams, model.logits(streams)

        self._captured: Captured = model.ops.capture(lambda ops: step(model.on(ops)))

    def run(self, segments: Sequence[Segment], times: OpTimes | None = None) -> tuple[Tensor, Tensor]:
        """Advances every sequence by its token. The tensors last until the next step. ``times``: what to add
        the time of every kernel to."""
        self._token_ids[:] = [s.token_ids[0] for s in segments]
        self._positions[:] = [s.start for s in segments]
        self._folds[:] = [s.fold for s in segments]
        self._slots[:] = [s.slot for s in segments]
        self._kept[:] = [s.kept for s in segments]
        for row, segment in enumerate(segments):
            pages = segment.page_ids
            # The same tuple is the same pages; a list could have been changed.
            if self._pages[row] is not pages or not isinstance(pages, tuple):
                self._table[row, : len(pages)] = pages
                self._pages[row] = pages
        if times is None:
            self._captured.replay()
        else:
            for name, seconds in self._captured.time():
                times.add(name, seconds)
        streams, logits = self._captured.result
        return streams, logits
