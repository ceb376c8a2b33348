"""Derivatives of attention and the index scores: the smooth forms are the ops, their gradients are right."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.ops.case import Call
from bittrue.ops.cases_grad_cache import attention_inputs, documents, num_entries, score_inputs
from bittrue.ops.contracts import Batch, LayerCache
from bittrue.ops.cpu.grad_cache import cache_gradients
from bittrue.ops.cpu.library import load_kernels
from bittrue.ops.ref import grad_cache
from bittrue.ops.ref.attention import attention as attention_op
from bittrue.ops.ref.index import index_topk
from bittrue.ops.ref.norm import rms_norm
from bittrue.ops.ref.quant import pack_rows

LENGTHS = (140, 3, 9)
EPS = 1e-6


def reference() -> SimpleNamespace:
    return SimpleNamespace(**grad_cache.cache_gradients())


def cpu() -> SimpleNamespace:
    return SimpleNamespace(**cache_gradients(load_kernels()))


def paged(entries: Tensor, lengths: Sequence[int], ratio: int, fmt: RowFormat) -> tuple[Tensor, Tensor]:
    """Entries of whole documents in pages: [pages, per page, bytes] and the page table [S, P]."""
    per_page, before, page = 128 // ratio, 0, 0
    table = torch.full((len(lengths), max(lengths) // 128 + 1), -1, dtype=torch.int32)
    pages = torch.zeros(sum(n // 128 + 1 for n in lengths), per_page, fmt.bytes, dtype=torch.uint8)
    for s, length in enumerate(lengths):
        own = pack_rows(entries[before : before + length // ratio], fmt)
        for i in range(length // 128 + 1):
            part = own[i * per_page : (i + 1) * per_page]
            pages[page, : part.shape[0]], table[s, i] = part, page
            page += 1
        before += length // ratio
    return pages, table


def unrotated(num_tokens: int) -> tuple[Tensor, Tensor]:
    return torch.ones(num_tokens, 4), torch.zeros(num_tokens, 4)


@pytest.mark.parametrize("kind", ["window", "hca", "csa"])
def test_the_smooth_attention_is_the_op(kind: Any) -> None:
    call = attention_inputs(3, kind, LENGTHS, 3, 32, 11, 8)
    _, q, rows, entries, ids, sink, batch = call.args
    fmt, num_tokens = RowFormat("f32", 32), sum(LENGTHS)
    cache = LayerCache(kind, fmt, None, torch.zeros(len(LENGTHS) + 2, 11, fmt.bytes, dtype=torch.uint8))
    if entries is not None:
        pages, table = paged(entries, LENGTHS, 4 if kind == "csa" else 128, fmt)
        cache, batch = replace(cache, rows=pages), replace(batch, page_table=table)
    out = attention_op(
        q, pack_rows(rows, fmt), batch, cache, ids, sink, *unrotated(num_tokens),
        window=11, scale=0.4, norm_eps=EPS, round_probs=False,
    )  # fmt: skip
    smooth, mass = grad_cache.attention(
        rms_norm(q, None, EPS), rows, entries, ids, sink, batch, window=11, scale=0.4
    )
    torch.testing.assert_close(smooth, out, atol=3e-6, rtol=0)
    assert (mass is None) == (kind != "csa")


def test_the_smooth_scores_choose_what_the_op_chooses() -> None:
    lengths, k = (140, 3, 57), 6
    q, weights, keys, _, batch = score_inputs(1, lengths, 4, 32, k).args
    fmt = RowFormat("f32", 32)
    pages, table = paged(keys, lengths, 4, fmt)
    batch = replace(batch, page_table=table)
    chosen = index_topk(q, weights, batch, pages, fmt, *unrotated(sum(lengths)), k=k, weight_scale=1.0)
    every = torch.arange(max(lengths) // 4, dtype=torch.int32)[None, :]
    visible = torch.where(every < (batch.positions[:, None] + 1) // 4, every, -1)
    scores = grad_cache.index_scores(q, weights, keys, visible, batch)
    best = scores.masked_fill(visible < 0, -torch.inf).sort(descending=True, stable=True).indices
    for t in range(sum(lengths)):
        num = min(k, (int(batch.positions[t]) + 1) // 4)
        assert sorted(best[t, :num].tolist()) == chosen[t, :num].tolist()


@pytest.mark.parametrize("kind", ["window", "hca", "csa"])
def test_gradcheck_of_the_smooth_attention(kind: Any) -> None:
    lengths = (129,) if kind == "hca" else (9, 5)
    heads, c = (1, 2) if kind == "hca" else (2, 3)
    _, q, rows, entries, ids, sink, batch = attention_inputs(5, kind, lengths, heads, c, 4, 2).args
    inputs = [x.double().requires_grad_() for x in (q, rows, sink, entries) if x is not None]

    def smooth(q: Tensor, rows: Tensor, sink: Tensor, entries: Tensor | None = None) -> Tensor:
        return grad_cache.attention(q, rows, entries, ids, sink, batch, window=4, scale=0.7)[0]

    assert torch.autograd.gradcheck(smooth, inputs, fast_mode=kind == "hca")


def test_gradcheck_of_the_smooth_scores() -> None:
    q, weights, keys, ids, batch = score_inputs(2, (9, 14), 2, 3, 2).args
    inputs = [x.double().requires_grad_() for x in (q, weights, keys)]
    assert torch.autograd.gradcheck(
        lambda q, weights, keys: grad_cache.index_scores(q, weights, keys, ids, batch), inputs
    )


def directional(loss: Callable[..., Tensor], inputs: list[Tensor], gradients: list[Tensor]) -> None:
    """Central differences along one random direction of each input agree with its gradient."""
    for i, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        near = [[*inputs[:i], x + h * direction, *inputs[i + 1 :]] for h in (1e-6, -1e-6)]
        slope = (loss(*near[0]) - loss(*near[1])) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["window", "hca", "csa"])
def test_the_backward_of_attention_is_its_finite_difference(kind: Any) -> None:
    call = attention_inputs(7, kind, (150, 30), 2, 8, 20, 5)
    d_out, q, rows, entries, ids, sink, batch = call.args
    inputs = [x.double() for x in (q, rows, sink, entries) if x is not None]

    def loss(q: Tensor, rows: Tensor, sink: Tensor, entries: Tensor | None = None) -> Tensor:
        out, _ = grad_cache.attention(q, rows, entries, ids, sink, batch, window=20, scale=0.5)
        return (out * d_out.double()).sum()

    wide = [None if x is None else x.double() for x in (d_out, q, rows, entries)]
    d_q, d_rows, d_entries, d_sink, _ = reference().attention(
        *wide, ids, sink.double(), batch, window=20, scale=0.5
    )
    directional(loss, inputs, [g for g in (d_q, d_rows, d_sink, d_entries) if g is not None])


def test_the_backward_of_the_scores_is_its_finite_difference() -> None:
    q, weights, keys, ids, batch = score_inputs(4, (50, 31), 3, 8, 5).args
    inputs = [x.double() for x in (q, weights, keys)]
    d_scores = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table = reference()

    def loss(*inputs: Tensor) -> Tensor:
        return (table.index_scores(*inputs, ids, batch) * d_scores).sum()

    gradients = table.index_scores_backward(d_scores, *inputs, ids, batch)
    directional(loss, inputs, list(gradients))


def tables() -> list[Any]:
    return [
        pytest.param(reference(), id="ref"),
        pytest.param(cpu(), id="cpu"),
    ]


@pytest.mark.parametrize("table", tables())
def test_the_mass_is_the_probability_of_each_entry(table: SimpleNamespace) -> None:
    """With equal logits and no sink all rows read have the same probability, and absent ids none."""
    batch: Batch = documents((40,))
    ids = torch.tensor([[2, -1, 0, -1]], dtype=torch.int32).expand(40, 4).contiguous()
    ids[:12] = -1
    args = (torch.ones(40, 2, 16), torch.zeros(40, 2, 16), torch.ones(40, 16), torch.ones(10, 16), ids)
    mass = table.attention(*args, torch.full((2,), -torch.inf), batch, window=8, scale=1.0)[4]
    wanted = torch.zeros(40, 4)
    wanted[12:, 0] = wanted[12:, 2] = 2 / 10
    torch.testing.assert_close(mass, wanted)


@pytest.mark.parametrize("table", tables())
def test_relu_has_no_slope_at_zero(table: SimpleNamespace) -> None:
    batch, keys = documents((8,)), torch.ones(2, 16)
    ids = torch.zeros(8, 1, dtype=torch.int32)
    d_q, d_weights, d_keys = table.index_scores_backward(
        torch.ones(8, 1), torch.zeros(8, 2, 16), torch.ones(8, 2), keys, ids, batch
    )
    assert not d_q.any() and not d_weights.any() and not d_keys.any()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_document_alone_has_the_bits_it_has_among_others(order: list[int]) -> None:
    lengths, k = (300, 90), 12
    table = cpu()
    call = attention_inputs(9, "csa", lengths, 4, 64, 128, k)
    alone = [table.attention(*args(call, lengths, [s]), **call.kwargs) for s in (0, 1)]
    both = table.attention(*args(call, lengths, order), **call.kwargs)
    for i in (0, 1, 2, 4):
        assert torch.equal(both[i], torch.cat([alone[s][i] for s in order]))


def args(call: Call, lengths: Sequence[int], chosen: list[int]) -> tuple[Any, ...]:
    """The arguments of a call with only the chosen documents, in their order."""
    d_out, q, rows, entries, ids, sink, _ = call.args
    tokens = [torch.arange(sum(lengths[:s]), sum(lengths[: s + 1])) for s in chosen]
    own = [torch.arange(num_entries(lengths[:s], 4), num_entries(lengths[: s + 1], 4)) for s in chosen]
    t = torch.cat(tokens)
    batch = documents([lengths[s] for s in chosen])
    return d_out[t], q[t], rows[t], entries[torch.cat(own)], ids[t], sink, batch


def test_an_id_of_no_entry_is_refused() -> None:
    table = cpu()
    call = attention_inputs(9, "csa", (40,), 2, 16, 8, 3)
    call.args[4][30, 0] = 10
    with pytest.raises(ValueError, match="attention: an id names no entry of its sequence"):
        table.attention(*call.args, **call.kwargs)
    q, weights, keys, ids, batch = score_inputs(2, (40,), 2, 16, 3).args
    ids[39, 2] = 10
    with pytest.raises(ValueError, match="index_scores: an id names no entry of its sequence"):
        table.index_scores(q, weights, keys, ids, batch)
