"""Reference of the two compressors: each channel pooled token by token, in the order of positions."""

import torch
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, Batch, CompressorWeights
from bittrue.ops.ref.norm import rms_norm
from bittrue.ops.ref.pages import write_entry
from bittrue.ops.ref.quant import hadamard as hadamard_transform
from bittrue.ops.ref.quant import pack_rows
from bittrue.ops.ref.rope import rope, rope_angles


def csa_compress(
    u: Tensor,
    gate: Tensor,
    weights: CompressorWeights,
    batch: Batch,
    state: Tensor,
    pages: Tensor,
    fmt: RowFormat,
    *,
    act: torch.dtype,
    hadamard: bool,
) -> None:
    ring, c = state.shape[1], state.shape[3] // 2
    offsets, starts, slots = batch.offsets.tolist(), batch.starts.tolist(), batch.slots.tolist()
    kept = batch.kept.tolist()
    biased = gate + weights.ape[batch.positions.long() % CSA_RATIO]
    for s in range(batch.num_sequences):
        first, start, slot = offsets[s], starts[s], slots[s]
        end = start + offsets[s + 1] - first

        def row(p: int, first: int = first, start: int = start, slot: int = slot) -> tuple[Tensor, Tensor]:
            if p >= start:
                return u[first + p - start], biased[first + p - start]
            return state[slot, p % ring, 0], state[slot, p % ring, 1]

        for t in range(max(start, kept[s]), end):
            if (t + 1) % CSA_RATIO == 0:
                i = t // CSA_RATIO
                before = range(max(0, CSA_RATIO * (i - 1)), CSA_RATIO * i)
                half_a = [tuple(x[:c] for x in row(p)) for p in before]
                half_b = [tuple(x[c:] for x in row(p)) for p in range(CSA_RATIO * i, t + 1)]
                pooled = _softmax_pool(half_a + half_b)
                entry = _finish(pooled, weights, CSA_RATIO * i, fmt, act, hadamard)
                write_entry(pages, batch.page_table, s, i, entry)
        for t in range(max(start, end - ring), end):
            state[slot, t % ring, 0] = u[first + t - start]
            state[slot, t % ring, 1] = biased[first + t - start]


def hca_compress(
    u: Tensor,
    gate: Tensor,
    weights: CompressorWeights,
    batch: Batch,
    fold: Tensor,
    pending: Tensor,
    pages: Tensor,
    fmt: RowFormat,
    *,
    act: torch.dtype,
) -> None:
    max_draft = pending.shape[1]
    offsets, starts, slots = batch.offsets.tolist(), batch.starts.tolist(), batch.slots.tolist()
    folds, kept = batch.folds.tolist(), batch.kept.tolist()
    biased = gate + weights.ape[batch.positions.long() % HCA_RATIO]
    for s in range(batch.num_sequences):
        first, start, slot, folded = offsets[s], starts[s], slots[s], folds[s]
        end = start + offsets[s + 1] - first
        if end == start:
            continue
        rows = {p: pending[slot, p % max_draft].clone().unbind() for p in range(folded, start)}
        rows |= {p: (u[first + p - start], biased[first + p - start]) for p in range(start, end)}
        new_folded = max(folded, end - max_draft)
        pool = _empty_pool(fold) if folded % HCA_RATIO == 0 else fold[slot].clone()
        for t in range(folded, end):
            if t == new_folded:
                fold[slot] = pool
            pool = _fold(pool, *rows[t])
            if (t + 1) % HCA_RATIO == 0:
                i = t // HCA_RATIO
                if t >= max(start, kept[s]):
                    entry = _finish(pool[2] / pool[1], weights, HCA_RATIO * i, fmt, act, False)
                    write_entry(pages, batch.page_table, s, i, entry)
                pool = _empty_pool(fold)
        if new_folded == end:
            fold[slot] = pool
        for t in range(max(start, new_folded), end):
            pending[slot, t % max_draft, 0], pending[slot, t % max_draft, 1] = rows[t]


def _softmax_pool(slots: list[tuple[Tensor, ...]]) -> Tensor:
    """Softmax-weighted mean of the (u, gate) slots [c], each sum taken in slot order."""
    top = slots[0][1]
    for _, g in slots[1:]:
        top = torch.maximum(top, g)
    total = torch.zeros_like(top)
    weighted = torch.zeros_like(top)
    for u, g in slots:
        e = _exp(g - top)
        total = total + e
        weighted = weighted + e * u
    return weighted / total


def _empty_pool(fold: Tensor) -> Tensor:
    pool = torch.zeros_like(fold[0])
    pool[0] = -torch.inf
    return pool


def _fold(pool: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """The running (max, sum, weighted sum) [3, c] after one more row."""
    top, total, weighted = pool
    new_top = torch.maximum(top, g)
    keep, e = _exp(top - new_top), _exp(g - new_top)
    return torch.stack((new_top, total * keep + e, weighted * keep + e * u))


def _finish(
    pooled: Tensor,
    weights: CompressorWeights,
    position: int,
    fmt: RowFormat,
    act: torch.dtype,
    hadamard: bool,
) -> Tensor:
    """The bytes of one entry from its pooled channels [c] f32."""
    x = rms_norm(pooled.to(act)[None], weights.norm, weights.eps)
    at = torch.tensor([position], dtype=torch.int32, device=pooled.device)
    x = rope(x[:, None], *rope_angles(at, weights.inv_freq), False)[:, 0]
    if hadamard:
        x = hadamard_transform(x)
    return pack_rows(x.contiguous(), fmt)[0]


def _exp(x: Tensor) -> Tensor:
    # Through float64 the result is the rounded exponential, whatever vector width or tail torch uses.
    return torch.exp(x.double()).float()
