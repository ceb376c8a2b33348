"""Autograd functions of rows, compressors, the index and attention: the derivatives of what they do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.slopes import (
    BACKENDS,
    F32,
    SLOPES,
    Held,
    assert_act_passes_through,
    assert_is_composition,
    assert_smooth,
    close,
    differentiated,
    normal,
    offset,
    step_on,
    turn,
    walsh,
)
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from bittrue.config.formats import FP4_GROUP, RowFormat
from bittrue.ops.cases_grad_cache import documents, num_entries, picks
from bittrue.ops.contracts import HCA_RATIO, Batch, CompressorWeights, LayerCache, LayerKind
from bittrue.ops.ref import grad_cache
from bittrue.ops.ref.grad_matrix import pool
from bittrue.ops.ref.grad_vector import smooth_rms_norm
from bittrue.ops.ref.quant import hadamard, kv_rows, pack_rows, quant_fp4, unpack_rows
from bittrue.ops.ref.rope import rope, rope_angles
from bittrue.train.autograd import Step
from bittrue.train.autograd_cache import (
    AttendRows,
    AttentionCall,
    Compress,
    CompressCall,
    IndexCall,
    IndexScores,
    KvRows,
    RowsCall,
    _index_loss,
)
from bittrue.train.differentiable import _places

EPS = 1e-6
SHORT = (13, 2, 9)  # lengths of documents
LONG = (130, 5, 128)  # with entries of 128 tokens
ROPE = 4
INV_FREQ = 100.0 ** -(torch.arange(ROPE // 2) / (ROPE // 2))


def angles_of(batch: Batch) -> tuple[Tensor, Tensor]:
    return rope_angles(batch.positions, INV_FREQ)


# ---- rows


def rows_of(fmt: RowFormat) -> Held:
    batch, kv, norm = documents(SHORT), normal(0, sum(SHORT), 20), normal(1, 20)
    angles = angles_of(batch)

    def run(step: Step, kv: Tensor, master: Tensor) -> Tensor:
        call = RowsCall(norm, angles, EPS, fmt, [])
        values = KvRows.apply(kv, master, step, call)
        assert torch.equal(step.ops.unpack_rows(call.made[0], fmt), values)
        return values

    def unmoved(kv: Tensor, norm: Tensor) -> Tensor:
        return turn(smooth_rms_norm(kv, norm, EPS)[:, None], *angles)[:, 0]

    read = unpack_rows(kv_rows(kv, norm, *angles, EPS, fmt), fmt)
    moved = offset(read, unmoved(kv.double(), norm.double())) * (fmt.kind != "f32")
    return Held(run, lambda *inputs: unmoved(*inputs) + moved.to(inputs[0].dtype), (kv, norm))


# ---- compressors


def compress(lengths: tuple[int, ...], ratio: int, fmt: RowFormat, *, is_transformed: bool = False) -> Held:
    batch, c = documents(lengths, seed=3), fmt.dim
    width = 2 * c if ratio == 4 else c
    u, gate = normal(0, sum(lengths), width), normal(1, sum(lengths), width, gain=2.0)
    ape, norm = normal(2, ratio, width), normal(3, c)
    per_page = 128 // ratio
    at, positions = _places(batch, ratio, per_page)
    angles = rope_angles(positions, INV_FREQ)

    def run(step: Step, u: Tensor, gate: Tensor, ape: Tensor, norm: Tensor) -> Tensor:
        weights = CompressorWeights(ape.detach(), norm.detach(), INV_FREQ, ROPE, EPS)
        slots, pages = len(lengths) + 2, int(batch.page_table.max()) + 1
        state: tuple[Tensor, ...] = (torch.zeros(slots, 8, 2, width),)
        if ratio == HCA_RATIO:
            state = (torch.zeros(slots, 3, c), torch.zeros(slots, 0, 2, c))
        stored = torch.full((pages, per_page, fmt.bytes), 0xFF, dtype=torch.uint8)
        call = CompressCall(weights, batch, state, stored, fmt, ratio, is_transformed, at, positions)
        return Compress.apply(u, gate, ape, norm, step, call)

    def unmoved(u: Tensor, gate: Tensor, ape: Tensor, norm: Tensor) -> Tensor:
        pooled = pool(u, gate + ape[batch.positions.long() % ratio], batch, ratio)
        entries = turn(smooth_rms_norm(pooled, norm, EPS)[:, None], *angles)[:, 0]
        return walsh(entries) if is_transformed else entries

    inputs = (u, gate, ape, norm)
    plain = unmoved(*(x.double() for x in inputs))
    moved = offset(unpack_rows(pack_rows(plain.float(), fmt), fmt), plain) * (fmt.kind != "f32")
    return Held(run, lambda *inputs: unmoved(*inputs) + moved.to(inputs[0].dtype), inputs)


# ---- the index


def index_scores(fmt: RowFormat, act: torch.dtype = F32) -> Held:
    batch, heads, k = documents(SHORT), 3, 2
    q, weights = normal(0, sum(SHORT), heads, 64).to(act).float(), normal(1, sum(SHORT), heads)
    keys = normal(2, num_entries(SHORT, 4), 64)
    ids, angles = picks(SHORT, k, 0), angles_of(batch)
    call = IndexCall(ids, batch, angles, fmt, 0.3)

    def turned(q: Tensor) -> Tensor:
        return walsh(turn(q, *angles)) if fmt.kind == "fp4" else turn(q, *angles)

    moved = torch.zeros_like(q, dtype=torch.float64)
    if fmt.kind == "fp4":
        read = quant_fp4(hadamard(rope(q.to(act), *angles, False)), FP4_GROUP)
        moved = offset(read, turned(q.double()))

    def smooth(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        return grad_cache.index_scores(turned(q) + moved.to(q.dtype), weights * 0.3, keys, ids, batch)

    def run(step: Step, q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        return IndexScores.apply(q, weights, keys, step, call)

    return Held(run, smooth, (q, weights, keys), act)


# ---- attention

WINDOW = 5


def entries_of(kind: LayerKind) -> tuple[tuple[int, ...], int]:
    return (LONG, 128) if kind == "hca" else (SHORT, 4)


def attention_call(
    kind: LayerKind, step: Step, rows: Tensor, entries: Tensor | None, fmt: RowFormat | None = None
) -> AttentionCall:
    """What the op reads: rows and entries packed, by default in plain formats; the sink is to be put in."""
    lengths, ratio = entries_of(kind)
    batch = documents(lengths, seed=3)
    fmt = fmt or RowFormat("f32" if step.act == F32 else "bf16", rows.shape[1])
    cache = LayerCache(kind, fmt, None, torch.zeros(len(lengths) + 2, WINDOW, fmt.bytes, dtype=torch.uint8))
    if entries is not None:
        at, _ = _places(batch, ratio, 128 // ratio)
        pages = torch.full(
            (int(batch.page_table.max()) + 1, 128 // ratio, fmt.bytes), 0xFF, dtype=torch.uint8
        )
        pages.flatten(0, 1)[at] = step.ops.pack_rows(step.narrow(entries.detach()), fmt)
        cache = replace(cache, rows=pages)
    ids = picks(lengths, 2, 0) if kind == "csa" else None
    packed = step.ops.pack_rows(step.narrow(rows.detach()), fmt)
    return AttentionCall(
        packed, batch, cache, ids, torch.empty(0), angles_of(batch), WINDOW, 0.4, EPS, round_probs=False
    )


def attention(kind: LayerKind, fmt: RowFormat | None = None) -> Held:
    (lengths, ratio), heads, c = entries_of(kind), 2, 8
    batch = documents(lengths, seed=3)
    ids, angles = picks(lengths, 2, 0) if kind == "csa" else None, angles_of(batch)

    def stored(x: Tensor) -> Tensor:
        return x if fmt is None else unpack_rows(pack_rows(x, fmt), fmt)

    q, rows = normal(0, sum(lengths), heads, c, gain=2.0), stored(normal(1, sum(lengths), c))
    inputs = (q, rows, normal(2, heads))
    if kind != "window":
        inputs = (*inputs, stored(normal(3, num_entries(lengths, ratio), c)))

    def run(step: Step, q: Tensor, rows: Tensor, sink: Tensor, entries: Tensor | None = None) -> Tensor:
        call = replace(attention_call(kind, step, rows, entries, fmt), sink=sink.detach())
        return AttendRows.apply(q, rows, entries, sink, None, step, call)

    def smooth(q: Tensor, rows: Tensor, sink: Tensor, entries: Tensor | None = None) -> Tensor:
        turned = turn(smooth_rms_norm(q, None, EPS), *angles)
        given = (turned, rows, entries, ids, sink, batch)
        out, _ = grad_cache.attention(*given, window=WINDOW, scale=0.4)
        return turn(out, *angles, inverse=True)

    return Held(run, smooth, inputs)


HELD: dict[str, Callable[[], Held]] = {
    "KvRows": lambda: rows_of(RowFormat("f32", 20)),
    "Compress csa": lambda: compress(SHORT, 4, RowFormat("f32", 16)),
    "Compress csa, transformed": lambda: compress(SHORT, 4, RowFormat("f32", 16), is_transformed=True),
    "Compress hca": lambda: compress(LONG, 128, RowFormat("f32", 12)),
    "AttendRows window": lambda: attention("window"),
    "AttendRows csa": lambda: attention("csa"),
    "AttendRows hca": lambda: attention("hca"),
}
# Those that read quantised values, or round what they read to bf16.
MORE: dict[str, Callable[[], Held]] = {
    "KvRows of fp8": lambda: rows_of(RowFormat("fp8", 20, ROPE)),
    "Compress csa to fp8": lambda: compress(SHORT, 4, RowFormat("fp8", 16, ROPE)),
    "Compress csa to fp4": lambda: compress(SHORT, 4, RowFormat("fp4", 32), is_transformed=True),
    "Compress hca to fp8": lambda: compress(LONG, 128, RowFormat("fp8", 12, ROPE)),
    "AttendRows csa of fp8": lambda: attention("csa", RowFormat("fp8", 8, ROPE)),
    "IndexScores": lambda: index_scores(RowFormat("f32", 64)),
    "IndexScores of fp4": lambda: index_scores(RowFormat("fp4", 64)),
    "IndexScores of fp4 in bf16": lambda: index_scores(RowFormat("fp4", 64), torch.bfloat16),
}
ALL = {**HELD, **MORE}


@pytest.mark.parametrize("name", ALL)
def test_the_composition_has_the_slopes_autograd_takes(name: str) -> None:
    assert_smooth(ALL[name]())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_the_function_has_the_values_and_gradients_of_the_composition(name: str, backend: str) -> None:
    assert_is_composition(ALL[name](), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", HELD)
def test_rounding_activations_passes_every_gradient_through(name: str, backend: str) -> None:
    assert_act_passes_through(HELD[name](), backend)


# ---- the index loss


def index_loss_by_query(scores: Tensor, mass: Tensor, ids: Tensor) -> Tensor:
    """KL(what attention gives each chosen entry || softmax of the scores), query after query."""
    total = scores.new_zeros(())
    for t in range(len(ids)):
        own = ids[t] >= 0
        if mass[t, own].sum() > 0:
            total = total + kl_divergence(Categorical(probs=mass[t, own]), Categorical(logits=scores[t, own]))
    return total


def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """scores, mass and ids; some entries have no mass, one query has none at all, and some chose nothing."""
    ids = picks(SHORT, 3, 1)
    scores, mass = normal(0, *ids.shape, gain=2.0), normal(1, *ids.shape).clamp(min=0) * (ids >= 0)
    chosen = (ids >= 0).any(1).nonzero()[:, 0]
    mass[chosen[2]] = 0.0
    assert ((mass == 0) & (ids >= 0)).any() and (mass.sum(1) > 0).any()
    return scores, mass, ids


def test_the_index_loss_and_its_gradient_are_those_of_every_query() -> None:
    scores, mass, ids = loss_inputs()
    leaf = scores.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: index_loss_by_query(s, mass.double(), ids), (leaf,))
    want = index_loss_by_query(leaf, mass.double(), ids)
    (d_want,) = torch.autograd.grad(want, leaf)
    loss, d_scores = _index_loss(scores, mass, ids)
    assert loss == pytest.approx(want.detach().item(), rel=1e-6)
    close(d_scores, d_want, SLOPES)


def attended(
    backend: str, scores: Tensor | None, scale: float, **options: Any
) -> tuple[list[Tensor], list[Tensor | None], Step]:
    """attention of a CSA layer with the index's scores: outputs, gradients, and the step."""
    step = step_on(backend, index_scale=scale)
    q, rows, sink, entries = attention("csa").inputs

    def run(q: Tensor, rows: Tensor, sink: Tensor, entries: Tensor, scores: Tensor | None = None) -> Tensor:
        call = replace(attention_call("csa", step, rows, entries), sink=sink.detach())
        out = AttendRows.apply(q, rows, entries, sink, scores, step, call)
        return out * options.get("gain", 1.0)

    given = (q, rows, sink, entries) if scores is None else (q, rows, sink, entries, scores)
    return *differentiated(run, given), step


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_does_not_depend_on_the_scores(backend: str) -> None:
    shape = picks(SHORT, 2, 0).shape
    outs, grads, _ = attended(backend, None, 0.0)
    for seed, scale in ((5, 0.0), (6, 3.0)):
        other_outs, other_grads, _ = attended(backend, normal(seed, *shape), scale)
        assert torch.equal(outs[0], other_outs[0])
        for grad, other in zip(grads, other_grads[:4], strict=True):
            assert grad is not None and other is not None
            assert torch.equal(grad, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_index_gradient_enters_with_its_scale_and_no_other(backend: str) -> None:
    """Whatever the loss does with attention's result: the scores learn from the mass alone."""
    batch, ids = documents(SHORT, seed=3), picks(SHORT, 2, 0)
    q, rows, sink, entries = (x.double() for x in attention("csa").inputs)
    turned = turn(smooth_rms_norm(q, None, EPS), *angles_of(batch))
    _, mass = grad_cache.attention(turned, rows, entries, ids, sink, batch, window=WINDOW, scale=0.4)
    assert mass is not None
    scores = normal(5, *ids.shape)
    leaf = scores.double().requires_grad_()
    loss = index_loss_by_query(leaf, mass, ids)
    (want,) = torch.autograd.grad(loss, leaf)
    for scale, gain in ((0.7, 1.0), (0.7, 0.0), (0.0, 1.0)):
        _, grads, step = attended(backend, scores, scale, gain=gain)
        assert grads[4] is not None
        close(grads[4], scale * want, SLOPES)
        assert step.index_loss == pytest.approx(loss.detach().item(), rel=1e-5)
