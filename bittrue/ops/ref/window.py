"""Reference of store_window: a ring of rows addressed by absolute position."""

from torch import Tensor

from bittrue.ops.contracts import Batch


def store_window(rows: Tensor, batch: Batch, window: Tensor) -> None:
    ring = window.shape[1]
    offsets, starts, slots = batch.offsets.tolist(), batch.starts.tolist(), batch.slots.tolist()
    for s in range(batch.num_sequences):
        first = offsets[s]
        num = offsets[s + 1] - first
        for j in range(max(0, num - ring), num):
            window[slots[s], (starts[s] + j) % ring] = rows[first + j]
