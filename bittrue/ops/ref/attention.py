"""Reference of attention: one query token at a time over its own ordered list of rows."""

import torch
from torch import Tensor

from bittrue.ops.contracts import HCA_RATIO, Batch, LayerCache
from bittrue.ops.ref.norm import rms_norm, row_sum
from bittrue.ops.ref.pages import entry_rows
from bittrue.ops.ref.quant import unpack_rows
from bittrue.ops.ref.rope import rope


def attention(
    q: Tensor,
    step_rows: Tensor,
    batch: Batch,
    cache: LayerCache,
    ids: Tensor | None,
    sink: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    window: int,
    scale: float,
    norm_eps: float,
    round_probs: bool,
) -> Tensor:
    q = rope(rms_norm(q, None, norm_eps), cos, sin, False)
    out = torch.empty_like(q)
    for t in range(q.shape[0]):
        stored = torch.cat((_window_rows(t, step_rows, batch, cache, window), _entries(t, batch, cache, ids)))
        rows = unpack_rows(stored, cache.row_format)
        out[t] = _attend(q[t].float(), rows, sink, scale, round_probs).to(q.dtype)
    # Keys are values, so the output carries the rotation of the rows it read.
    return rope(out, cos, sin, True)


def _window_rows(t: int, step_rows: Tensor, batch: Batch, cache: LayerCache, window: int) -> Tensor:
    """Stored rows of positions max(0, p - window + 1)..p of token t, ascending: [n, bytes] u8."""
    seq, position = int(batch.seq_ids[t]), int(batch.positions[t])
    start, first, slot = int(batch.starts[seq]), int(batch.offsets[seq]), int(batch.slots[seq])
    ring = cache.window.shape[1]
    oldest = max(0, position - window + 1)
    before = torch.arange(oldest, max(oldest, start), device=step_rows.device)
    since = max(oldest, start)
    return torch.cat((cache.window[slot, before % ring], step_rows[first + since - start : t + 1]))


def _entries(t: int, batch: Batch, cache: LayerCache, ids: Tensor | None) -> Tensor:
    """Stored rows of the compressed entries token t attends to, ascending by id: [n, bytes] u8."""
    if cache.rows is None:
        return cache.window[:0, 0]
    if ids is not None:
        chosen = ids[t].long()
        chosen = chosen[chosen >= 0]
    else:
        chosen = torch.arange((int(batch.positions[t]) + 1) // HCA_RATIO, device=cache.rows.device)
    return entry_rows(cache.rows, batch.page_table, int(batch.seq_ids[t]), chosen)


def _attend(q: Tensor, rows: Tensor, sink: Tensor, scale: float, round_probs: bool) -> Tensor:
    """q [N, c], rows [n, c], sink [N], all f32 -> [N, c] f32. The list's length sets the order of sums."""
    logits = row_sum(q[:, None, :] * rows[None, :, :]) * scale  # [N, n]
    top = logits.amax(-1, keepdim=True)
    probs = torch.exp((logits - top).double()).float()
    total = row_sum(probs) + torch.exp((sink - top[:, 0]).double()).float()
    if round_probs:
        probs = probs.bfloat16().float()
    values = rows.T.contiguous()  # [c, n]
    return row_sum(probs[:, None, :] * values[None, :, :]) / total[:, None]
