"""Cases of the cache ops: window, compressors, index top-k and attention on steps of chunks and decodes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.ops.case import EXACT, Call, Case, Invariance, Outputs, Tolerance, generator, rows_alone
from bittrue.ops.contracts import (
    CSA_RATIO,
    HCA_RATIO,
    PAGE_TOKENS,
    Batch,
    CompressorWeights,
    LayerCache,
    LayerKind,
    OpTable,
)
from bittrue.ops.numeric import Difference, bits, first_difference
from bittrue.ops.ref.quant import hadamard, pack_rows, unpack_rows
from bittrue.ops.ref.rope import rope_angles

# (first position, number of tokens) of each sequence of a step.
Pieces = tuple[tuple[int, int], ...]
MIXED: Pieces = ((125, 9), (3, 1), (0, 5), (255, 1), (120, 1), (254, 3), (0, 1), (127, 1), (7, 2), (133, 2))
DECODES: Pieces = ((4, 1), (129, 1), (256, 1), (383, 1))
PREFILL: Pieces = ((0, 140),)
NOTHING: Pieces = ()
# Tokens replayed against stored entries, up to a position inside the step, beyond it, before it.
REPLAY: Pieces = ((0, 140), (120, 140), (250, 9), (2, 6), (125, 8))
REPLAY_KEPT = (130, 200, 400, 5, 100)
STEPS = {"mixed": MIXED, "decodes": DECODES, "prefill": PREFILL, "nothing": NOTHING}

F32, BF16 = torch.float32, torch.bfloat16
POOLED = Tolerance(
    2.0**-18, 2.0**-18, "sums in another order, an f32 exp within 2 ulp, then rotated and normalised"
)
POOLED_BF16 = Tolerance(2.0**-6, 2.0**-8, "f32 values apart may round to neighbours in bf16, at three places")
POOLED_FP8 = Tolerance(2.0**-3, 2.0**-8, "as in bf16, then values apart may round to neighbours in E4M3")
POOLED_FP4 = Tolerance(0.5, 2.0**-2, "as in bf16, then values apart may round to neighbours in E2M1")
ATTEND = Tolerance(0.0, 2.0**-18, "dot products and sums in another order, an f32 exp within 2 ulp")
ATTEND_BF16 = Tolerance(2.0**-7, 2.0**-18, "as in f32, then values apart may round to neighbours in bf16")
ATTEND_ROUNDED = Tolerance(
    2.0**-7, 2.0**-9, "as in bf16, and numerators apart may round to neighbours in bf16"
)


def cache_cases() -> list[Case]:
    """Every case of the cache ops."""
    return [*_windows(), *_csa(), *_hca(), *_topk(), *_attends()]


# ---- steps


def step_of(
    pieces: Sequence[tuple[int, int]],
    seed: int,
    *,
    folds: Sequence[int] | None = None,
    kept: Sequence[int] | None = None,
) -> Batch:
    """A Batch of the given pieces: slots and pages scattered, unused table entries -1. Without ``kept`` every
    entry is written."""
    order = generator(seed)
    num_pages = [-(-(start + count) // PAGE_TOKENS) for start, count in pieces]
    ids = torch.randperm(sum(num_pages), generator=order)
    table = torch.full((len(pieces), max(num_pages, default=0) + 1), -1)
    for s, num in enumerate(num_pages):
        table[s, :num], ids = ids[:num], ids[num:]
    counts = torch.tensor([count for _, count in pieces], dtype=torch.int64)
    positions = [p for start, count in pieces for p in range(start, start + count)]
    i32 = torch.int32
    return Batch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions, dtype=i32),
        seq_ids=torch.arange(len(pieces)).repeat_interleave(counts).to(i32),
        offsets=torch.cat((torch.zeros(1, dtype=i32), counts.cumsum(0).to(i32))),
        starts=torch.tensor([start for start, _ in pieces], dtype=i32),
        folds=torch.tensor([start for start, _ in pieces] if folds is None else list(folds), dtype=i32),
        slots=torch.randperm(len(pieces) + 2, generator=order)[: len(pieces)].to(i32),
        kept=torch.tensor([0] * len(pieces) if kept is None else list(kept), dtype=i32),
        page_table=table.to(i32),
    )


def take_sequences(batch: Batch, chosen: Tensor) -> tuple[Batch, Tensor]:
    """The batch of the chosen sequences in their order, and the rows of their tokens in the full step."""
    spans = [torch.arange(int(batch.offsets[s]), int(batch.offsets[s + 1])) for s in chosen]
    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *spans])
    counts = torch.tensor([span.numel() for span in spans], dtype=torch.int64)
    part = Batch(
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        seq_ids=torch.arange(len(chosen)).repeat_interleave(counts).to(torch.int32),
        offsets=torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(torch.int32),
        starts=batch.starts[chosen],
        folds=batch.folds[chosen],
        slots=batch.slots[chosen],
        kept=batch.kept[chosen],
        page_table=batch.page_table[chosen],
    )
    return part, rows


def take_tokens(batch: Batch, rows: Tensor) -> Batch:
    """A step in which every chosen token is a sequence of its own: a decode, with slots 0, 1, ..."""
    seqs = batch.seq_ids[rows].long()
    count = torch.arange(rows.numel() + 1, dtype=torch.int32)
    return Batch(
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        seq_ids=count[:-1],
        offsets=count,
        starts=batch.positions[rows],
        folds=batch.positions[rows],
        slots=count[:-1],
        kept=batch.kept[seqs],
        page_table=batch.page_table[seqs],
    )


def _num_pages(batch: Batch) -> int:
    return int(batch.page_table.max()) + 1 if batch.num_sequences else 1


def _num_slots(batch: Batch) -> int:
    return batch.num_sequences + 2


def _normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)) * scale


def _in_place(op: str, written: tuple[int, ...], shown: Callable[[Call, Outputs], Outputs]) -> Any:
    """A Case.run for an op that writes its arguments at ``written``; ``shown`` gives what is compared."""

    def run(table: OpTable, call: Call) -> Outputs:
        args = tuple(a.clone() if i in written else a for i, a in enumerate(call.args))
        getattr(table, op)(*args, **call.kwargs)
        return shown(call, tuple(args[i] for i in written))

    return run


def _sequences_alone(batch_at: int, token_args: tuple[int, ...]) -> Invariance:
    """Sequences in any order, and each alone, leave in their own slots and pages what the full step leaves.

    Outputs are whole pools and a sequence alone changes only its own part, so their changes together must be
    those of the full step.
    """

    def take(call: Call, chosen: Tensor) -> Call:
        part, rows = take_sequences(call.args[batch_at], chosen)
        args = [a[rows].contiguous() if i in token_args else a for i, a in enumerate(call.args)]
        args[batch_at] = part
        return Call(tuple(args), call.kwargs)

    def invariance(run: Callable[[Call], Outputs], call: Call, seed: int) -> Difference | None:
        full, num = run(call), call.args[batch_at].num_sequences
        order = torch.randperm(num, generator=generator(seed))
        merged = [out.clone() for out in run(take(call, order[:0]))]
        for s in range(num):
            before = run(take(call, order[:0]))
            for out, start, alone in zip(merged, before, run(take(call, torch.tensor([s]))), strict=True):
                changed = bits(alone) != bits(start)
                out[changed] = alone[changed]
        for outputs in (run(take(call, order)), tuple(merged)):
            for part, whole in zip(outputs, full, strict=True):
                difference = first_difference(part, whole)
                if difference is not None:
                    return difference
        return None

    return invariance


# ---- store_window


def _windows() -> Iterator[Case]:
    for name, pieces in STEPS.items():
        for ring in (7, 128):

            def inputs(seed: int, pieces: Pieces = pieces, ring: int = ring) -> Call:
                batch, random = step_of(pieces, seed), generator(seed)
                shapes = ((batch.num_tokens, 584), (_num_slots(batch), ring, 584))
                rows, window = (
                    torch.randint(0, 256, s, generator=random, dtype=torch.int64).to(torch.uint8)
                    for s in shapes
                )
                return Call((rows, batch, window))

            yield Case(
                op="store_window",
                name=f"{name}, ring of {ring}",
                make_inputs=inputs,
                tolerance=EXACT,
                run=_in_place("store_window", (2,), lambda call, written: written),
                invariance=_sequences_alone(1, (0,)),
                bytes=2 * 584 * sum(min(count, ring) for _, count in pieces),
            )


# ---- compressors

FORMATS = {
    "f32": (RowFormat("f32", 64), F32, POOLED),
    "bf16": (RowFormat("bf16", 40), BF16, POOLED_BF16),
    "fp8": (RowFormat("fp8", 160, 20), BF16, POOLED_FP8),
    "fp4": (RowFormat("fp4", 128), BF16, POOLED_FP4),
}


def _pool_weights(seed: int, ratio: int, width: int, fmt: RowFormat) -> CompressorWeights:
    rope_dim = 2 * (fmt.dim // 16)
    return CompressorWeights(
        ape=_normal(seed, ratio, width),
        norm=1.0 + _normal(seed + 1, fmt.dim, scale=0.1),
        inv_freq=160_000.0 ** (-torch.arange(0, rope_dim, 2) / rope_dim),
        rope_dim=rope_dim,
        eps=1e-6,
    )


def _pages_shown(at: int) -> Callable[[Call, Outputs], Outputs]:
    """Written state as it is, pages decoded; ``at`` is the format among the arguments. Pages come last."""

    def shown(call: Call, written: Outputs) -> Outputs:
        return (*written[:-1], unpack_rows(written[-1], call.args[at]))

    return shown


def _largest(at: int) -> Callable[[Call], Outputs]:
    """Magnitudes: state is of size 1, and no feature of a normalised entry exceeds sqrt(features)."""

    def magnitude(call: Call) -> Outputs:
        size = torch.tensor(float(call.args[at].dim) ** 0.5)
        return (*(torch.ones(()) for _ in range(at - 6)), torch.ones(()), size)

    return magnitude


def _compress_steps() -> Iterator[tuple[str, Pieces, tuple[int, ...]]]:
    for name, pieces in STEPS.items():
        yield name, pieces, (0,) * len(pieces)
    yield "replay", REPLAY, REPLAY_KEPT


def _csa() -> Iterator[Case]:
    for step, pieces, kept in _compress_steps():
        for kind, (fmt, act, tolerance) in FORMATS.items():
            for max_draft in (0, 3):

                def inputs(
                    seed: int,
                    pieces: Pieces = pieces,
                    kept: tuple[int, ...] = kept,
                    fmt: RowFormat = fmt,
                    act: torch.dtype = act,
                    max_draft: int = max_draft,
                ) -> Call:
                    batch, width = step_of(pieces, seed, kept=kept), 2 * fmt.dim
                    u = _normal(seed + 2, batch.num_tokens, width)
                    gate = _normal(seed + 3, batch.num_tokens, width, scale=2.0)
                    state = _normal(seed + 4, _num_slots(batch), 8 + max_draft, 2, width)
                    pages = torch.zeros(
                        _num_pages(batch), PAGE_TOKENS // CSA_RATIO, fmt.bytes, dtype=torch.uint8
                    )
                    weights = _pool_weights(seed, CSA_RATIO, width, fmt)
                    args = (u, gate, weights, batch, state, pages, fmt)
                    return Call(args, {"act": act, "hadamard": fmt.kind == "fp4"})

                num_tokens = sum(count for _, count in pieces)
                yield Case(
                    op="csa_compress",
                    name=f"{step} {kind}{fmt.dim}, draft {max_draft}",
                    make_inputs=inputs,
                    tolerance=tolerance,
                    run=_in_place("csa_compress", (4, 5), _pages_shown(6)),
                    magnitude=_largest(6),
                    invariance=_sequences_alone(3, (0, 1)),
                    bytes=num_tokens * fmt.dim * 4 * 4,
                    flops=num_tokens * fmt.dim * 2 * 20,
                )


def _hca() -> Iterator[Case]:
    for step, pieces, kept in _compress_steps():
        for kind in ("f32", "bf16", "fp8"):
            fmt, act, tolerance = FORMATS[kind]
            for max_draft in (0, 20):

                def inputs(
                    seed: int,
                    pieces: Pieces = pieces,
                    kept: tuple[int, ...] = kept,
                    fmt: RowFormat = fmt,
                    act: torch.dtype = act,
                    max_draft: int = max_draft,
                ) -> Call:
                    # After accepted drafts a pool stands anywhere between its earliest place and the start.
                    folds = [
                        start - min(start, max_draft) * (s % 3) // 2 for s, (start, _) in enumerate(pieces)
                    ]
                    batch = step_of(pieces, seed, folds=folds, kept=kept)
                    u = _normal(seed + 2, batch.num_tokens, fmt.dim)
                    gate = _normal(seed + 3, batch.num_tokens, fmt.dim, scale=2.0)
                    fold = _normal(seed + 4, _num_slots(batch), 3, fmt.dim)
                    fold[:, 1] = fold[:, 1].exp()
                    pending = _normal(seed + 5, _num_slots(batch), max_draft, 2, fmt.dim)
                    pages = torch.zeros(
                        _num_pages(batch), PAGE_TOKENS // HCA_RATIO, fmt.bytes, dtype=torch.uint8
                    )
                    weights = _pool_weights(seed, HCA_RATIO, fmt.dim, fmt)
                    return Call((u, gate, weights, batch, fold, pending, pages, fmt), {"act": act})

                num_tokens = sum(count for _, count in pieces)
                yield Case(
                    op="hca_compress",
                    name=f"{step} {kind}{fmt.dim}, draft {max_draft}",
                    make_inputs=inputs,
                    tolerance=tolerance,
                    run=_in_place("hca_compress", (4, 5, 6), _pages_shown(7)),
                    magnitude=_largest(7),
                    invariance=_sequences_alone(3, (0, 1)),
                    bytes=num_tokens * fmt.dim * 2 * 4,
                    flops=num_tokens * fmt.dim * 30,
                )


# ---- index_topk


def _quarter_turns(positions: Tensor, rope_dim: int) -> tuple[Tensor, Tensor]:
    """cos, sin [T, R/2] of quarter turns: a rotation by them is exact."""
    turns = (3 * positions[:, None] + 5 * torch.arange(rope_dim // 2)[None, :]) % 4
    cos = torch.tensor([1.0, 0.0, -1.0, 0.0])
    return cos[turns], cos[(turns + 3) % 4]


def _index_inputs(seed: int, pieces: Pieces, fmt: RowFormat, heads: int, k: int) -> Call:
    """f32, bf16: multiples of 1/2, whose dot products are exact in any order and tie. fp4: any values; every
    seventh key, and the queries of every third token, of groups so unlike that their powers of two differ."""
    batch, act = step_of(pieces, seed), F32 if fmt.kind == "f32" else BF16
    num_entries = _num_pages(batch) * PAGE_TOKENS // CSA_RATIO
    if fmt.kind == "fp4":
        q = _normal(seed + 1, batch.num_tokens, heads, fmt.dim)
        keys = _normal(seed + 2, num_entries, fmt.dim)
        spread = 2.0 ** (9.0 * torch.arange(fmt.dim) / fmt.dim)
        q[::3] = hadamard(q[::3] * spread)
        keys[::7] *= spread
        keys[::11, :32] = 0.0
        angles = rope_angles(batch.positions, 0.1 ** torch.arange(8.0))
    else:
        q = _normal(seed + 1, batch.num_tokens, heads, fmt.dim).round() / 2
        keys = _normal(seed + 2, num_entries, fmt.dim, scale=0.5).round() / 2
        angles = _quarter_turns(batch.positions, 16)
    keys[::5] = 0.0
    weights = _normal(seed + 3, batch.num_tokens, heads)
    pages = pack_rows(keys.to(act), fmt).view(_num_pages(batch), PAGE_TOKENS // CSA_RATIO, fmt.bytes)
    return Call((q.to(act), weights, batch, pages, fmt, *angles), {"k": k, "weight_scale": 0.011})


def _take_index(call: Call, rows: Tensor) -> Call:
    q, weights, batch, pages, fmt, cos, sin = call.args
    args = (q[rows], weights[rows], take_tokens(batch, rows), pages, fmt, cos[rows], sin[rows])
    return Call(args, call.kwargs)


def _topk() -> Iterator[Case]:
    long: Pieces = ((5_000, 3), (130, 10), (9_999, 1))
    for step, pieces in (STEPS | {"long": long}).items():
        for fmt in (RowFormat("f32", 64), RowFormat("bf16", 40), RowFormat("fp4", 128)):
            for heads, k in ((64, 24), (3, 512)):

                def inputs(
                    seed: int,
                    pieces: Pieces = pieces,
                    fmt: RowFormat = fmt,
                    heads: int = heads,
                    k: int = k,
                ) -> Call:
                    return _index_inputs(seed, pieces, fmt, heads, k)

                scored = [
                    (p + 1) // CSA_RATIO for start, count in pieces for p in range(start, start + count)
                ]
                scored = [num for num in scored if num > k]
                yield Case(
                    op="index_topk",
                    name=f"{step} {fmt.kind}{fmt.dim} H{heads} k{k}",
                    make_inputs=inputs,
                    tolerance=EXACT,
                    invariance=rows_alone(_take_index),
                    bytes=sum(scored) * fmt.bytes,
                    flops=2 * sum(scored) * heads * fmt.dim,
                )


# ---- attention


def _picks(batch: Batch, k: int, seed: int) -> Tensor:
    """ids [T, k]: for each token some of its visible entries, ascending, -1 after them."""
    random, ids = generator(seed), torch.full((batch.num_tokens, k), -1, dtype=torch.int32)
    for t, position in enumerate(batch.positions.tolist()):
        some = torch.randperm((position + 1) // CSA_RATIO, generator=random)[:k].sort().values
        ids[t, : some.numel()] = some
    return ids


def _attend_inputs(
    seed: int, kind: LayerKind, pieces: Pieces, fmt: RowFormat, heads: int, window: int
) -> Call:
    batch, act = step_of(pieces, seed), F32 if fmt.kind == "f32" else BF16

    def rows(seed: int, num: int) -> Tensor:
        return pack_rows(_normal(seed, num, fmt.dim).to(act), fmt)

    # Multiples of 1/4: sums of squares are exact in any order, so every norm is the same.
    q = (_normal(seed + 1, batch.num_tokens, heads, fmt.dim, scale=8.0).round() / 4).to(act)
    slots, pages, per_page = _num_slots(batch), _num_pages(batch), 32 if kind == "csa" else 1
    cache = LayerCache(
        kind=kind,
        row_format=fmt,
        key_format=None,
        window=rows(seed + 2, slots * (window + 3)).view(slots, window + 3, fmt.bytes),
        rows=None if kind == "window" else rows(seed + 3, pages * per_page).view(pages, per_page, fmt.bytes),
    )
    ids = _picks(batch, 24, seed) if kind == "csa" else None
    options = {
        "window": window,
        "scale": 2.0 * fmt.dim**-0.5,
        "norm_eps": 1e-6,
        "round_probs": fmt.kind == "fp8",
    }
    angles = _quarter_turns(batch.positions, 20)
    args = (q, rows(seed + 4, batch.num_tokens), batch, cache, ids, _normal(seed + 5, heads), *angles)
    return Call(args, options)


def _take_attention(call: Call, rows: Tensor) -> Call:
    """Each token as a decode: its slot holds its sequence's window, with the step's rows before it stored."""
    q, step_rows, batch, cache, ids, sink, cos, sin = call.args
    ring = cache.window.shape[1]
    window = cache.window[batch.slots[batch.seq_ids[rows].long()].long()].clone()
    for i, t in enumerate(rows.tolist()):
        s = int(batch.seq_ids[t])
        before = torch.arange(int(batch.offsets[s]), t)[-ring:]
        window[i, batch.positions[before].long() % ring] = step_rows[before]
    ids = None if ids is None else ids[rows]
    taken = (take_tokens(batch, rows), replace(cache, window=window), ids, sink, cos[rows], sin[rows])
    return Call((q[rows], step_rows[rows], *taken), call.kwargs)


def _row_magnitude(call: Call) -> Outputs:
    """An output is a mean of rows: its error is relative to the largest value stored."""
    fmt, stored = call.args[3].row_format, [call.args[1], call.args[3].window.flatten(0, 1)]
    if call.args[3].rows is not None:
        stored.append(call.args[3].rows.flatten(0, 1))
    return (unpack_rows(torch.cat(stored), fmt).abs().amax(),)


def _attends() -> Iterator[Case]:
    kinds: tuple[LayerKind, ...] = ("window", "csa", "hca")
    settings = (
        (RowFormat("f32", 64), 4, 128, ATTEND),
        (RowFormat("bf16", 40), 20, 5, ATTEND_BF16),
        (RowFormat("fp8", 96, 20), 64, 128, ATTEND_ROUNDED),
    )
    for kind in kinds:
        for step, pieces in STEPS.items():
            for fmt, heads, window, tolerance in settings:
                if step == "prefill" and heads == 64:
                    continue  # seconds in the reference

                def inputs(
                    seed: int,
                    kind: LayerKind = kind,
                    pieces: Pieces = pieces,
                    fmt: RowFormat = fmt,
                    heads: int = heads,
                    window: int = window,
                ) -> Call:
                    return _attend_inputs(seed, kind, pieces, fmt, heads, window)

                positions = [p for start, count in pieces for p in range(start, start + count)]
                num_rows = sum(min(p + 1, window) for p in positions)
                yield Case(
                    op="attention",
                    name=f"{kind} {step} {fmt.kind}{fmt.dim} N{heads} window {window}",
                    make_inputs=inputs,
                    tolerance=tolerance,
                    magnitude=_row_magnitude,
                    invariance=rows_alone(_take_attention),
                    bytes=num_rows * fmt.bytes,
                    flops=4 * num_rows * heads * fmt.dim,
                )
