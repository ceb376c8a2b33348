"""The compressors: against a float64 pooling, and against themselves under any cut, mix and rollback."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cache_steps import (
    NUM_SLOTS,
    Part,
    chunkings,
    compressor,
    f32_format,
    finish64,
    for_each_thread_count,
    garbage,
    gather,
    ops_under_test,
    page_tables,
    read_entries,
    slot_of,
    step,
    steps_of,
)
from torch import Tensor

from bittrue.config.formats import RowFormat

C, ROPE = 32, 8
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 129, 131, 255, 256, 257)


@dataclass(frozen=True, slots=True)
class Compressor:
    """One kind of compressor with its inputs and what it wrote. CSA width is 2c, HCA width c."""

    ops: dict[str, Callable[..., Any]]
    kind: str
    max_draft: int
    fmt: RowFormat
    act: torch.dtype
    hadamard: bool
    pages: Tensor
    tables: Tensor
    state: tuple[Tensor, ...]

    @property
    def ratio(self) -> int:
        return 4 if self.kind == "csa" else 128

    def run(self, u: Sequence[Tensor], gate: Sequence[Tensor], parts: Sequence[Part]) -> None:
        batch = step(parts, self.tables, max_draft=self.max_draft)
        width = u[0].shape[1]
        weights = compressor(self.ratio, width, self.fmt.dim, ROPE, seed=3)
        args = (gather(u, parts), gather(gate, parts), weights, batch, *self.state, self.pages, self.fmt)
        if self.kind == "csa":
            self.ops["csa_compress"](*args, act=self.act, hadamard=self.hadamard)
        else:
            self.ops["hca_compress"](*args, act=self.act)

    def entries(self, seq: int, length: int) -> Tensor:
        num = length // self.ratio
        if num == 0:
            return torch.empty(0, self.fmt.bytes, dtype=torch.uint8)
        return read_entries(self.pages, self.tables[seq], num)


def make(
    ops: dict[str, Callable[..., Any]],
    kind: str,
    *,
    num_sequences: int = 1,
    max_draft: int = 0,
    fmt: RowFormat | None = None,
    act: torch.dtype = torch.float32,
    hadamard: bool = False,
) -> Compressor:
    fmt = fmt or f32_format(C)
    num_pages = 3
    pages = garbage(num_sequences * num_pages, 32 if kind == "csa" else 1, fmt.bytes, dtype=torch.uint8)
    if kind == "csa":
        state: tuple[Tensor, ...] = (garbage(NUM_SLOTS, 8 + max_draft, 2, 2 * fmt.dim),)
    else:
        state = (garbage(NUM_SLOTS, 3, fmt.dim), garbage(NUM_SLOTS, max_draft, 2, fmt.dim))
    return Compressor(
        ops, kind, max_draft, fmt, act, hadamard, pages, page_tables(num_sequences, num_pages), state
    )


def inputs(
    kind: str, lengths: Sequence[int], dim: int = C, seed: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    width = 2 * dim if kind == "csa" else dim
    u = [torch.randn(length, width, generator=generator) for length in lengths]
    return u, [2 * torch.randn(length, width, generator=generator) for length in lengths]


def pooled64(kind: str, u: Tensor, gate: Tensor, ape: Tensor, i: int) -> Tensor:
    """Entry i pooled in float64 from the whole sequence, by one masked softmax per channel."""
    ratio, dim = ape.shape[0], u.shape[1] // (2 if kind == "csa" else 1)
    g = (gate + ape.repeat(gate.shape[0] // ratio + 1, 1)[: gate.shape[0]]).double()
    values, u = torch.full_like(g, -torch.inf), u.double()
    own = slice(ratio * i, ratio * (i + 1))
    if kind == "hca":
        values[own] = g[own]
        return (values.softmax(0) * u).sum(0)
    values[own, dim:] = g[own, dim:]
    if i > 0:
        before = slice(ratio * (i - 1), ratio * i)
        values[before, :dim] = g[before, :dim]
    values, u = torch.cat((values[:, :dim], values[:, dim:])), torch.cat((u[:, :dim], u[:, dim:]))
    return (values.softmax(0) * u).sum(0)


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize(("kind", "hadamard"), [("csa", False), ("csa", True), ("hca", False)])
def test_entries_equal_a_float64_pooling_of_the_whole_sequence(ops, kind, hadamard):
    u, gate = inputs(kind, [384])
    world = make(ops, kind, hadamard=hadamard)
    world.run(u, gate, [Part(0, 0, 384)])
    found = world.entries(0, 384).view(torch.float32)
    weights = compressor(world.ratio, u[0].shape[1], C, ROPE, seed=3)
    for i in range(384 // world.ratio):
        wanted = finish64(pooled64(kind, u[0], gate[0], weights.ape, i), weights, world.ratio * i, hadamard)
        torch.testing.assert_close(found[i].double(), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("ops", ops_under_test())
def test_half_a_of_a_token_serves_the_next_entry_and_half_b_its_own(ops):
    def entries(half: slice) -> Tensor:
        u, gate = inputs("csa", [16])
        u[0][4:8, half] += 1.0  # the tokens of entry 1
        world = make(ops, "csa")
        world.run(u, gate, [Part(0, 0, 16)])
        return world.entries(0, 16)

    plain = entries(slice(0, 0))
    for half, changed in ((slice(0, C), 2), (slice(C, 2 * C), 1)):
        differs = (entries(half) != plain).any(1)
        assert differs.tolist() == [i == changed for i in range(4)]


FORMATS = {
    "f32": (f32_format(C), torch.float32),
    "bf16": (RowFormat("bf16", C), torch.bfloat16),
    "fp8": (RowFormat("fp8", 80, 8), torch.bfloat16),
    "fp4": (RowFormat("fp4", 64), torch.bfloat16),
}


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("max_draft", [0, 3])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("csa", "f32"), ("csa", "fp8"), ("csa", "fp4"), ("hca", "f32"), ("hca", "bf16"), ("hca", "fp8")],
)
def test_any_cut_and_any_mix_of_sequences_give_the_same_pages_and_state(ops, kind, name, max_draft):
    fmt, act = FORMATS[name]
    lengths = (261, 130, 3)
    u, gate = inputs(kind, lengths, fmt.dim)
    options = dict(num_sequences=3, max_draft=max_draft, fmt=fmt, act=act, hadamard=name == "fp4")
    alone = make(ops, kind, **options)
    for q, length in enumerate(lengths):
        alone.run(u, gate, [Part(q, 0, length)])
    for cuts in zip(*(chunkings(length, seed=q) for q, length in enumerate(lengths)), strict=True):
        mixed = make(ops, kind, **options)
        for parts in steps_of(cuts):
            folds = [max(0, part.start - max_draft) for part in parts]
            rows = [Part(p.seq, p.start, p.end, fold) for p, fold in zip(parts, folds, strict=True)]
            mixed.run(u, gate, rows[::-1])
        assert torch.equal(mixed.pages, alone.pages)
        for ours, theirs in zip(mixed.state, alone.state, strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("kind", ["csa", "hca"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_reused_slot_leaks_nothing_into_a_short_prompt(ops, kind, length):
    """A prompt shorter than a window, then decodes up to the first entries, in a slot another has left."""
    u, gate = inputs(kind, [260, 260])
    world, fresh = (make(ops, kind, num_sequences=2) for _ in range(2))
    world.run(u, gate, [Part(0, 0, 260)])
    world.state[0][slot_of(1)] = world.state[0][slot_of(0)]
    for state in fresh.state:
        state.zero_()
    for w in (world, fresh):
        w.run(u, gate, [Part(1, 0, length)])
        for t in range(length, 260):
            w.run(u, gate, [Part(1, t, t + 1)])
    assert torch.equal(world.entries(1, 260), fresh.entries(1, 260))
    assert not world.entries(1, 260).view(torch.float32).isnan().any()


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("kind", ["csa", "hca"])
@pytest.mark.parametrize("max_draft", [1, 3, 7])
def test_rejected_drafts_leave_no_trace(ops, kind, max_draft):
    """Steps of one sure token and max_draft guesses, some kept: the pages are those of a run without."""
    length = 300
    u, gate = inputs(kind, [length])
    plain = make(ops, kind, max_draft=max_draft)
    plain.run(u, gate, [Part(0, 0, length)])
    drafted = make(ops, kind, max_draft=max_draft)
    generator = torch.Generator().manual_seed(0)
    start, fold = 0, 0
    while start < length - max_draft - 1:
        keep = int(torch.randint(0, max_draft + 1, (), generator=generator))
        end, kept = start + 1 + max_draft, start + 1 + keep
        tried_u, tried_gate = u[0].clone(), gate[0].clone()
        tried_u[kept:] = 9.0
        tried_gate[kept:] = 20.0
        drafted.run([tried_u], [tried_gate], [Part(0, start, end, fold)])
        fold = max(fold, end - max_draft)
        start = kept
    drafted.run(u, gate, [Part(0, start, length, fold)])
    assert torch.equal(drafted.entries(0, length), plain.entries(0, length))


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("max_draft", [0, 3])
@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_entries_that_close_before_kept_stay_as_they_stand(ops, kind, max_draft):
    """Kept lies before, at and behind every edge of a step; what is written is what a plain run writes."""
    length, start = 384, 120
    u, gate = inputs(kind, [length, length])
    plain = make(ops, kind, num_sequences=2, max_draft=max_draft)
    plain.run(u, gate, [Part(0, 0, length), Part(1, 0, length)])
    for kept in (0, 119, 120, 123, 124, 125, 127, 128, 255, 256, 257, 260, 383, 384, 500):
        world = make(ops, kind, num_sequences=2, max_draft=max_draft)
        world.run(u, gate, [Part(q, 0, start) for q in range(2)])
        world.pages.fill_(0xEE)
        world.run(u, gate, [Part(1, start, 131), Part(0, start, length, kept=kept)])
        world.run(u, gate, [Part(1, 131, length, kept=300)])
        for q, first in ((0, max(start, kept)), (1, 300)):
            found, wanted = world.entries(q, length), plain.entries(q, length)
            closes = world.ratio * (1 + torch.arange(found.shape[0])) - 1
            written = closes >= first
            if q == 1:
                written |= (closes >= start) & (closes < 131)
            assert torch.equal(found[written], wanted[written]), (q, kept)
            assert (found[~written] == 0xEE).all(), (q, kept)
        for ours, theirs in zip(world.state, plain.state, strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), kept


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_threads_do_not_change_the_entries(kind):
    lengths = (300, 257)
    u, gate = inputs(kind, lengths)

    def run(ops: dict[str, Callable[..., Any]]) -> Tensor:
        world = make(ops, kind, num_sequences=2)
        world.run(u, gate, [Part(q, 0, length) for q, length in enumerate(lengths)])
        return torch.cat((world.pages.flatten(), world.state[0].view(torch.uint8).flatten()))

    one, *others = for_each_thread_count(run)
    assert all(torch.equal(other, one) for other in others)


@pytest.mark.parametrize("ops", ops_under_test())
@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_a_step_without_tokens_writes_nothing(ops, kind):
    u, gate = inputs(kind, [10, 10])
    world, untouched = make(ops, kind, num_sequences=2), make(ops, kind, num_sequences=2)
    world.run(u, gate, [])
    world.run(u, gate, [Part(0, 4, 4)])
    assert torch.equal(world.pages, untouched.pages)
    assert torch.equal(world.state[0].view(torch.uint8), untouched.state[0].view(torch.uint8))
