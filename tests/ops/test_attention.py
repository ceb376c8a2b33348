"""Attention: against a dense float64 softmax of whole sequences, and against itself under any cut and mix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from cache_steps import (
    NUM_SLOTS,
    REFERENCE,
    Part,
    chunkings,
    f32_format,
    for_each_thread_count,
    garbage,
    gather,
    ops_under_test,
    page_tables,
    quarter_turns,
    slot_of,
    step,
    steps_of,
)
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.ops.contracts import LayerCache
from bittrue.ops.cpu.cache import cache_ops
from bittrue.ops.cpu.library import available_isas, load_kernels
from bittrue.ops.cpu.vector import vector_ops
from bittrue.ops.ref.norm import rms_norm
from bittrue.ops.ref.quant import pack_rows, unpack_rows
from bittrue.ops.ref.rope import rope, rope_angles

C, HEADS, SCALE, ROPE, EPS = 80, 3, 3 * 80**-0.5, 24, 1e-6
FORMATS = {"f32": f32_format(C), "bf16": RowFormat("bf16", C), "fp8": RowFormat("fp8", C, 16)}
Kind = Literal["window", "csa", "hca"]
RATIO = {"csa": 4, "hca": 128}


@dataclass(frozen=True, slots=True)
class Layer:
    """Whole sequences of one layer: queries, rows, entries and chosen ids, and the cache the op reads."""

    ops: dict[str, Callable[..., Any]]
    kind: Kind
    fmt: RowFormat
    window: int
    q: list[Tensor]  # [n, N, c] each
    rows: list[Tensor]  # [n, bytes] u8 each
    entries: list[Tensor]  # [n / ratio, bytes] u8 each
    ids: list[Tensor]  # [n, k] i32 each
    sink: Tensor
    tables: Tensor
    cache: LayerCache

    def run(self, parts: Sequence[Part], *, round_probs: bool = False) -> Tensor:
        """One step: attention, then the window is stored, as in a layer."""
        batch = step(parts, self.tables)
        rows = gather(self.rows, parts)
        ids = gather(self.ids, parts) if self.kind == "csa" else None
        q = gather(self.q, parts)
        out = self.ops["attention"](
            q,
            rows,
            batch,
            self.cache,
            ids,
            self.sink,
            *quarter_turns(batch.positions, ROPE),
            window=self.window,
            scale=SCALE,
            norm_eps=EPS,
            round_probs=round_probs,
        )
        self.ops["store_window"](rows, batch, self.cache.window)
        return out

    def fresh(self) -> "Layer":
        """The same layer with nothing but garbage in its window."""
        window = garbage(*self.cache.window.shape, dtype=torch.uint8)
        cache = LayerCache(self.kind, self.fmt, None, window, self.cache.rows)
        return replace(self, cache=cache)


def make(
    ops: dict[str, Callable[..., Any]],
    kind: Kind,
    lengths: Sequence[int],
    *,
    name: str = "f32",
    window: int = 128,
    max_draft: int = 0,
    k: int = 12,
) -> Layer:
    generator = torch.Generator().manual_seed(11)
    act, fmt = torch.float32 if name == "f32" else torch.bfloat16, FORMATS[name]

    def rows(num: int) -> Tensor:
        return pack_rows(torch.randn(num, C, generator=generator).to(act), fmt)

    def picks(length: int) -> Tensor:
        ids = torch.full((length, k), -1, dtype=torch.int32)
        for t in range(length):
            visible = (t + 1) // 4
            some = torch.randperm(visible, generator=generator)[:k].sort().values
            ids[t, : some.numel()] = some
        return ids

    tables = page_tables(len(lengths), 4)
    entries = [rows(length // RATIO.get(kind, length + 1)) for length in lengths]
    pages = garbage(tables.numel(), 32 if kind == "csa" else 1, fmt.bytes, dtype=torch.uint8)
    for s, own in enumerate(entries):
        for i, row in enumerate(own):
            pages[int(tables[s, i // pages.shape[1]]), i % pages.shape[1]] = row
    ring = garbage(NUM_SLOTS, window + max_draft, fmt.bytes, dtype=torch.uint8)
    return Layer(
        ops=ops,
        kind=kind,
        fmt=fmt,
        window=window,
        # Multiples of 1/4: sums of squares are exact in any order, so every norm is the same.
        q=[(12 * torch.randn(n, HEADS, C, generator=generator)).round().to(act) / 4 for n in lengths],
        rows=[rows(n) for n in lengths],
        entries=entries,
        ids=[picks(n) for n in lengths],
        sink=torch.randn(HEADS, generator=generator),
        tables=tables,
        cache=LayerCache(kind, fmt, None, ring, None if kind == "window" else pages),
    )


def dense(layer: Layer, s: int, *, round_probs: bool = False) -> Tensor:
    """[n, N, c] f64: one masked softmax with sink over all rows and all entries of sequence s."""
    rows = torch.cat([unpack_rows(x, layer.fmt).double() for x in (layer.rows[s], layer.entries[s])])
    num, num_entries = layer.rows[s].shape[0], layer.entries[s].shape[0]
    at, other = torch.arange(num)[:, None], torch.arange(num)[None, :]
    seen = torch.zeros(num, rows.shape[0], dtype=torch.bool)
    seen[:, :num] = (other <= at) & (other > at - layer.window)
    if layer.kind == "hca":
        seen[:, num:] = torch.arange(num_entries)[None, :] < (at + 1) // 128
    if layer.kind == "csa":
        for t in range(num):
            chosen = layer.ids[s][t]
            seen[t, num + chosen[chosen >= 0].long()] = True
    angles = quarter_turns(torch.arange(num), ROPE)
    q = rope(rms_norm(layer.q[s], None, EPS), *angles, False)
    logits = torch.einsum("tnc,rc->tnr", q.double(), rows) * SCALE
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    top = logits.amax(-1, keepdim=True)
    probs = torch.exp(logits - top)
    total = probs.sum(-1, keepdim=True) + torch.exp(layer.sink.double()[None, :, None] - top)
    if round_probs:
        probs = probs.float().bfloat16().double()
    out = torch.einsum("tnr,rc->tnc", probs, rows) / total
    out[..., -ROPE:] = torch.view_as_real(
        torch.view_as_complex(out[..., -ROPE:].unflatten(-1, (-1, 2)).contiguous())
        * torch.complex(angles[0].double(), -angles[1].double())[:, None]
    ).flatten(-2)
    return out


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_equals_a_dense_softmax_with_sink_over_the_whole_sequence(ops, kind):
    layer = make(ops, kind, [300])
    torch.testing.assert_close(layer.run([Part(0, 0, 300)]).double(), dense(layer, 0), atol=5e-6, rtol=0)


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_rounds_only_the_numerators_of_the_value_product(ops, kind):
    """The tolerance is the rounding of the bf16 output; the next test tells numerators from denominator."""
    layer = make(ops, kind, [260], name="fp8")
    out = layer.run([Part(0, 0, 260)], round_probs=True)
    wanted = dense(layer, 0, round_probs=True)
    torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize("ops", ops_under_test())
def test_a_rounded_numerator_is_not_renormalised(ops):
    """Of two rows equal in a feature the output is (sum of rounded) / (sum of unrounded), not the value."""
    fmt = f32_format(32)
    rows = torch.zeros(2, 32)
    rows[:, 1] = 1.0
    rows[0, 0] = 1.0
    q = torch.zeros(2, 1, 32)
    q[:, 0, 0] = -(32**0.5)  # the norm of a row is sqrt(32): the scale makes the logit -0.7
    cache = LayerCache("window", fmt, None, torch.zeros(NUM_SLOTS, 4, fmt.bytes, dtype=torch.uint8))
    sink = torch.full((1,), -1e4)
    run = ops["attention"]
    batch, still = step([Part(0, 0, 2)], page_tables(1, 1)), (torch.ones(2, 4), torch.zeros(2, 4))
    args = (q, pack_rows(rows, fmt), batch, cache, None, sink, *still)
    options = {"window": 4, "scale": 0.7 * 32**-0.5, "norm_eps": 0.0}
    exact = run(*args, **options, round_probs=False)[1, 0, 1]
    rounded = run(*args, **options, round_probs=True)[1, 0, 1]
    p = torch.exp(torch.tensor(-0.7))
    wanted = (1 + float(p.bfloat16())) / (1 + float(p))
    assert abs(float(exact) - 1.0) < 1e-6
    assert abs(float(rounded) - wanted) < 1e-6
    assert abs(wanted - 1.0) > 1e-4


@pytest.mark.parametrize("ops", ops_under_test())
def test_the_sink_stays_outside_the_maximum(ops):
    """M is the largest real logit: with a sink far above, exp(sink - M) overflows and the output is 0."""
    layer = make(ops, "window", [4])
    layer.sink.fill_(500.0)
    assert torch.equal(layer.run([Part(0, 0, 4)]), torch.zeros(4, HEADS, C))
    layer.sink.fill_(-torch.inf)
    out = layer.fresh().run([Part(0, 0, 4)])
    torch.testing.assert_close(out.double(), dense(layer, 0), atol=5e-6, rtol=0)
    first = unpack_rows(layer.rows[0][:1], layer.fmt)
    turned = rope(first.expand(1, HEADS, C), *quarter_turns(torch.arange(1), ROPE), True)
    assert torch.equal(out[0], turned[0])


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("name", ["f32", "bf16", "fp8"])
@pytest.mark.parametrize(
    ("kind", "window", "max_draft"), [("window", 5, 2), ("csa", 128, 0), ("hca", 128, 3), ("hca", 7, 0)]
)
def test_any_cut_and_any_mix_of_sequences_give_the_same_bits(ops, name, kind, window, max_draft):
    lengths = (261, 131, 3)
    layer = make(ops, kind, lengths, name=name, window=window, max_draft=max_draft)
    whole = [layer.run([Part(s, 0, n)], round_probs=name == "fp8") for s, n in enumerate(lengths)]
    assert not any(out.isnan().any() for out in whole)
    for cuts in zip(*(chunkings(length, seed=s) for s, length in enumerate(lengths)), strict=True):
        again = layer.fresh()
        for parts in steps_of(cuts):
            out = again.run(parts[::-1], round_probs=name == "fp8")
            assert torch.equal(out, gather(whole, parts[::-1]))


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("max_draft", [1, 3])
def test_rejected_drafts_leave_no_trace_in_the_window(ops, max_draft):
    layer = make(ops, "window", [60], window=8, max_draft=max_draft)
    whole = layer.fresh().run([Part(0, 0, 60)])
    generator = torch.Generator().manual_seed(5)
    rows, start = layer.rows[0], 0
    while start < 50:
        keep = 1 + int(torch.randint(0, max_draft + 1, (), generator=generator))
        layer.rows[0] = torch.cat(
            (rows[: start + keep], garbage(60 - start - keep, layer.fmt.bytes, dtype=torch.uint8))
        )
        out = layer.run([Part(0, start, start + 1 + max_draft)])
        assert torch.equal(out[:keep], whole[start : start + keep])
        start += keep
    assert slot_of(0) != 0


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("name", ["f32", "bf16", "fp8"])
@pytest.mark.parametrize("bad", [24, 25])
def test_a_row_that_a_token_may_not_see_cannot_reach_it_even_if_it_is_nan(ops, name, bad):
    """Before its position and from a window later on, in the same pair, vector, step or ring."""
    layer = make(ops, "window", [60], name=name, window=7)
    whole = layer.fresh().run([Part(0, 0, 60)], round_probs=name == "fp8")
    layer.rows[0][bad] = 0xFF
    assert unpack_rows(layer.rows[0][bad], layer.fmt).isnan().any()
    for cuts in chunkings(60, seed=bad):
        again = layer.fresh()
        outs = [again.run(parts, round_probs=name == "fp8") for parts in steps_of([cuts])]
        out = torch.cat(outs)
        assert torch.equal(out[:bad], whole[:bad])
        assert out[bad : bad + 7].isnan().any(-1).all()
        assert torch.equal(out[bad + 7 :], whole[bad + 7 :])


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_values_too_small_to_matter_keep_the_bits_of_every_instruction_set(name):
    """Subnormal products would be flushed by one processor and kept by another."""
    runs = []
    for ops in (REFERENCE, *(cache_ops(load_kernels(isa)) for isa in available_isas())):
        layer = make(ops, "window", [40], name=name)
        generator = torch.Generator().manual_seed(1)
        size = 10.0 ** -torch.randint(0, 45, (40, C), generator=generator).float()
        layer.q[0].mul_(size[:, None].to(layer.q[0].dtype))
        layer.rows[0] = pack_rows((torch.randn(40, C, generator=generator) * size).bfloat16(), layer.fmt)
        layer.sink.fill_(-torch.inf)
        runs.append(layer.run([Part(0, 0, 40)], round_probs=name == "fp8"))
    reference, first, *others = runs
    assert all(torch.equal(other, first) for other in others)
    torch.testing.assert_close(first, reference, atol=2.0**-7, rtol=2.0**-7)


@pytest.mark.parametrize("name", ["f32", "fp8"])
def test_a_list_too_long_to_be_kept_decoded_has_the_same_bits(name):
    """6,000 entries: blocks are decoded for the logits and again for the values, by one thread or several."""
    kind, num = "hca", 6_000
    fmt, generator = FORMATS[name], torch.Generator().manual_seed(2)
    act = torch.float32 if name == "f32" else torch.bfloat16
    parts, tables = [Part(0, 128 * num, 128 * num + 3)], page_tables(1, num + 1)
    pages = pack_rows(torch.randn(num + 1, C, generator=generator).to(act), fmt)[:, None]
    ring = pack_rows(torch.randn(NUM_SLOTS * 128, C, generator=generator).to(act), fmt)
    cache = LayerCache(kind, fmt, None, ring.view(NUM_SLOTS, 128, -1), pages)
    q = (12 * torch.randn(3, HEADS, C, generator=generator)).round().to(act) / 4
    rows = pack_rows(torch.randn(3, C, generator=generator).to(act), fmt)
    batch = step(parts, tables)
    args = (batch, cache, None, torch.zeros(HEADS), *quarter_turns(batch.positions, ROPE))
    options = {"window": 128, "scale": SCALE, "norm_eps": EPS, "round_probs": name == "fp8"}
    one, *others = for_each_thread_count(lambda ops: ops["attention"](q, rows, *args, **options))
    for isa in available_isas():
        others.append(cache_ops(load_kernels(isa))["attention"](q, rows, *args, **options))
    assert all(torch.equal(other, one) for other in others)
    wanted = REFERENCE["attention"](q, rows, *args, **options)
    torch.testing.assert_close(one, wanted, atol=2e-6 if name == "f32" else 4e-3, rtol=2**-7)


@pytest.mark.parametrize("parts", [[Part(0, 255, 256)], [Part(0, 100, 200)]])
def test_threads_do_not_change_the_bits(parts):
    """One token splits its heads over the threads, many are split between them; 16 of 200 heads per unit or
    more."""
    generator = torch.Generator().manual_seed(3)
    layer = make({}, "hca", [256], name="fp8")
    q = torch.randn(parts[0].end - parts[0].start, 200, C, generator=generator).bfloat16()
    layer.cache.window.copy_(layer.rows[0][:128].expand(NUM_SLOTS, 128, -1))
    batch = step(parts, layer.tables)
    angles = quarter_turns(batch.positions, ROPE)
    args = (q, gather(layer.rows, parts), batch, layer.cache, None, torch.zeros(200), *angles)

    def run(ops: dict[str, Callable[..., Any]]) -> Tensor:
        return ops["attention"](*args, window=128, scale=SCALE, norm_eps=EPS, round_probs=True)

    one, *others = for_each_thread_count(run)
    assert not one.isnan().any()
    assert all(torch.equal(other, one) for other in others)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("name", ["f32", "bf16", "fp8"])
def test_norm_and_rotations_have_the_bits_of_their_own_ops(isa, name):
    """Norm and rope before, inverse rope after: as rms_norm and rope of the same kernels do them."""
    kernels = load_kernels(isa)
    ops = cache_ops(kernels) | vector_ops(kernels)
    layer = make(ops, "hca", [200], name=name)
    batch = step([Part(0, 0, 200)], layer.tables)
    angles = rope_angles(batch.positions, 0.2 ** torch.arange(ROPE // 2))
    still = (torch.ones_like(angles[0]), torch.zeros_like(angles[1]))
    rest = (gather(layer.rows, [Part(0, 0, 200)]), batch, layer.cache, None, layer.sink)
    options = {"window": 128, "round_probs": name == "fp8"}
    q = torch.randn(200, HEADS, C, generator=torch.Generator().manual_seed(8)).to(layer.q[0].dtype)
    fused = ops["attention"](q, *rest, *angles, **options, scale=SCALE, norm_eps=EPS)
    turned = ops["rope"](ops["rms_norm"](q, None, EPS), *angles, False)
    # 2^30 swallows the mean square: this norm is a factor of 2^-15, which the scale takes back.
    alone = ops["attention"](turned, *rest, *still, **options, scale=SCALE * 2**15, norm_eps=2.0**30)
    assert torch.equal(fused, ops["rope"](alone, *angles, True))


@pytest.mark.parametrize("ops", ops_under_test()[1:])
def test_a_tensor_of_the_wrong_form_is_named(ops):
    layer = make(ops, "window", [4])
    with pytest.raises(ValueError, match="attention: sink must have shape"):
        replace(layer, sink=layer.sink[:2]).run([Part(0, 0, 4)])
    with pytest.raises(ValueError, match="attention: a window of 129 rows in a ring of 128"):
        replace(make(ops, "window", [4]), window=129).run([Part(0, 0, 4)])


@pytest.mark.parametrize("ops", ops_under_test())
def test_no_tokens_no_output(ops):
    assert make(ops, "hca", [4]).run([]).shape == (0, HEADS, C)
