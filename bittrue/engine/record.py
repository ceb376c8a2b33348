"""What was chosen for the tokens of one sequence: experts by the learned routers, rows by the index."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bittrue.config.model import ModelConfig
from bittrue.engine.types import Choices
from bittrue.ops.contracts import CSA_RATIO
from bittrue.ops.recorded import Chosen

Ids = NDArray[np.unsignedinteger[Any]]


class ChoiceRecord:
    """Grows with the sequence. A position computed again, after rejected drafts or a preemption, is written
    again: the last computation is the one its successors read."""

    def __init__(self, config: ModelConfig, max_context: int) -> None:
        num_indexes = config.layer_kinds[: config.num_layers].count("csa")
        num_routers = config.num_layers - config.num_hash_layers
        expert_dtype = np.uint8 if config.num_experts <= 1 << 8 else np.uint16
        row_dtype = np.uint16 if max_context // CSA_RATIO <= 1 << 16 else np.uint32
        self._first_choice = CSA_RATIO * (config.index_topk + 1) - 1
        self._experts = np.zeros((0, num_routers, config.experts_per_token), expert_dtype)
        self._rows = np.zeros((0, num_indexes, config.index_topk), row_dtype)
        self._first = self._end = 0  # the positions recorded

    def take(self, start: int, chosen: Chosen, rows: slice) -> None:
        """``rows`` of the step's choices are those of the positions from ``start`` on."""
        end = start + rows.stop - rows.start
        if start > self._end or end < self._first:
            # Another sequence computed what lies between (after a preemption it came out of the cache).
            self._first, self._end = start, end
        else:
            self._first, self._end = min(start, self._first), max(end, self._end)
        self._experts = _grown(self._experts, end)
        for i, ids in enumerate(chosen.experts):
            self._experts[start:end, i] = ids[rows].numpy()
        begin = max(start, self._first_choice)
        if begin < end:
            free = self._first_choice
            self._rows = _grown(self._rows, end - free)
            for i, ids in enumerate(chosen.rows):
                picked = ids[rows.start + begin - start : rows.stop]
                self._rows[begin - free : end - free, i] = picked.numpy()

    def forget(self) -> None:
        """All that was recorded: the weights are others, and every position is computed with them."""
        self._first = self._end = 0

    def choices(self, num_tokens: int, versions: Sequence[tuple[int, str]]) -> Choices:
        """Of the first ``num_tokens`` tokens, as many as were computed. ``versions``: of the weights, by the
        generated token they begin with."""
        # A sequence that ends before its last token is computed has no record that reaches there.
        first = self._first if self._first < num_tokens <= self._end else num_tokens
        free = self._first_choice
        first_row = max(first, free)
        experts = self._experts[first:num_tokens]
        rows = self._rows[first_row - free : max(num_tokens - free, 0)]
        return Choices(
            first=first,
            experts=experts.tobytes(),
            expert_shape=(*experts.shape, experts.itemsize),
            first_row=first_row,
            rows=rows.tobytes(),
            row_shape=(*rows.shape, rows.itemsize),
            versions=tuple(versions),
        )


def expert_ids(choices: Choices) -> Ids:
    """Experts of the learned routers for the positions from ``choices.first`` on: [tokens, routers, k]."""
    return _array(choices.experts, choices.expert_shape)


def row_ids(choices: Choices) -> Ids:
    """Rows of the CSA layers for the positions from ``choices.first_row`` on: [tokens, layers, k]."""
    return _array(choices.rows, choices.row_shape)


def _array(data: bytes, shape: tuple[int, int, int, int]) -> Ids:
    *lengths, num_bytes = shape
    ids: Ids = np.frombuffer(data, f"<u{num_bytes}").reshape(lengths)
    return ids


def _grown(array: Ids, length: int) -> Ids:
    """``array`` with room for ``length``, in steps that double."""
    if length <= len(array):
        return array
    larger = np.zeros((max(length, 2 * len(array), 256), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger
