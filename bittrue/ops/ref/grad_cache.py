"""Reference derivatives of attention and the index scores."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, Batch
from bittrue.ops.ref.vjp import vjp

CHUNK = 64  # queries looked at together: bounds the memory of gathered entries


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Queries ``start..end`` of the batch, neighbours in one sequence that begins at row ``first``."""

    start: int
    end: int
    first: int
    entries: slice  # of that sequence


def cache_gradients() -> dict[str, Callable[..., Any]]:
    """The backward ops of this file by name."""
    return {
        "attention": attention_backward,
        "index_scores": index_scores,
        "index_scores_backward": index_scores_backward,
    }


def _chunks(batch: Batch, ratio: int) -> Iterator[_Chunk]:
    offsets, before = batch.offsets.tolist(), 0
    for first, last in zip(offsets, offsets[1:], strict=False):
        own = slice(before, before + (last - first) // ratio)
        before = own.stop
        for start in range(first, last, CHUNK):
            yield _Chunk(start, min(start + CHUNK, last), first, own)


def attention(
    q: Tensor,
    rows: Tensor,
    entries: Tensor | None,
    ids: Tensor | None,
    sink: Tensor,
    batch: Batch,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """The smooth form: (out [T, N, c], mass [T, k] or None), arguments as GradTable.attention's."""
    outs, masses = [q[:0]], []
    for chunk in _chunks(batch, HCA_RATIO if ids is None else CSA_RATIO):
        queries, oldest = q[chunk.start : chunk.end], max(chunk.first, chunk.start - window + 1)
        own = rows[oldest : chunk.end]
        at, other = torch.arange(chunk.start, chunk.end)[:, None], torch.arange(oldest, chunk.end)[None, :]
        logits = torch.einsum("tnc,rc->tnr", queries, own) * scale
        seen = (other <= at) & (other > at - window)
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        chosen = None
        if entries is not None:
            pool = entries[chunk.entries]
            picks = _closed(chunk, pool.shape[0]) if ids is None else ids[chunk.start : chunk.end].long()
            chosen = _gathered(pool, picks)
            more = torch.einsum("tnc,tkc->tnk", queries, chosen) * scale
            logits = torch.cat((logits, more.masked_fill((picks < 0)[:, None], -torch.inf)), -1)
        top = logits.detach().amax(-1, keepdim=True)
        probs = torch.exp(logits - top)
        probs = probs / (probs.sum(-1, keepdim=True) + torch.exp(sink[None, :, None] - top))
        out = torch.einsum("tnr,rc->tnc", probs[..., : own.shape[0]], own)
        if chosen is not None:
            out = out + torch.einsum("tnk,tkc->tnc", probs[..., own.shape[0] :], chosen)
        outs.append(out)
        masses.append(probs[..., own.shape[0] :].sum(1))
    out = torch.cat(outs)
    if ids is None:
        return out, None
    return out, torch.cat(masses) if masses else out.new_zeros(ids.shape)


def _closed(chunk: _Chunk, num: int) -> Tensor:
    """[queries, num] i64: the ids of the HCA entries that are closed at each query, -1 for the others."""
    closed = (torch.arange(chunk.start, chunk.end) - chunk.first + 1)[:, None] // HCA_RATIO
    own = torch.arange(num)[None, :]
    return torch.where(own < closed, own, -1)


def _gathered(pool: Tensor, picks: Tensor) -> Tensor:
    """pool [n, c], picks [t, k] -> [t, k, c]; zeros where the pick is -1."""
    return torch.cat((pool, pool.new_zeros(1, pool.shape[1])))[picks]


def attention_backward(
    d_out: Tensor,
    q: Tensor,
    rows: Tensor,
    entries: Tensor | None,
    ids: Tensor | None,
    sink: Tensor,
    batch: Batch,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    def smooth(q: Tensor, rows: Tensor, sink: Tensor, entries: Tensor | None = None) -> Tensor:
        return attention(q, rows, entries, ids, sink, batch, window=window, scale=scale)[0]

    inputs = (q, rows, sink) if entries is None else (q, rows, sink, entries)
    d_q, d_rows, d_sink, *d_entries = vjp(smooth, inputs, (d_out,))
    with torch.no_grad():
        mass = attention(q, rows, entries, ids, sink, batch, window=window, scale=scale)[1]
    return d_q, d_rows, d_entries[0] if d_entries else None, d_sink, mass


def index_scores(q: Tensor, head_weights: Tensor, keys: Tensor, ids: Tensor, batch: Batch) -> Tensor:
    scores = [q.new_zeros(0, ids.shape[1])]
    for chunk in _chunks(batch, CSA_RATIO):
        picks = ids[chunk.start : chunk.end].long()
        own = _gathered(keys[chunk.entries], picks)
        dots = torch.relu(torch.einsum("thc,tkc->thk", q[chunk.start : chunk.end], own))
        scores.append(torch.einsum("th,thk->tk", head_weights[chunk.start : chunk.end], dots))
    return torch.cat(scores)


def index_scores_backward(
    d_scores: Tensor, q: Tensor, head_weights: Tensor, keys: Tensor, ids: Tensor, batch: Batch
) -> tuple[Tensor, ...]:
    def smooth(q: Tensor, head_weights: Tensor, keys: Tensor) -> Tensor:
        return index_scores(q, head_weights, keys, ids, batch)

    return vjp(smooth, (q, head_weights, keys), (d_scores,))
