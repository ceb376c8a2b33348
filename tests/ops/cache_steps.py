"""What the tests of the cache ops share: sequences cut into steps, and caches full of garbage."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.ops.contracts import Batch, CompressorWeights
from bittrue.ops.cpu.cache import cache_ops
from bittrue.ops.cpu.library import available_isas, load_kernels
from bittrue.ops.ref import attention, compress, index, window

REFERENCE: dict[str, Callable[..., Any]] = {
    "store_window": window.store_window,
    "csa_compress": compress.csa_compress,
    "hca_compress": compress.hca_compress,
    "index_topk": index.index_topk,
    "attention": attention.attention,
}


def ops_under_test() -> list[Any]:
    """The reference and the CPU kernels of every instruction set this processor runs."""
    cpu = [pytest.param(cache_ops(load_kernels(isa)), id=isa) for isa in available_isas()]
    return [pytest.param(REFERENCE, id="ref"), *cpu]


def for_each_thread_count(run: Callable[[dict[str, Callable[..., Any]]], Tensor]) -> list[Tensor]:
    """``run`` with the CPU kernels on 1, 2 and 5 threads; the process keeps the number it had."""
    kernels = load_kernels()
    ops, before, results = cache_ops(kernels), kernels.threads, []
    try:
        for threads in (1, 2, 5):
            kernels.set_threads(threads)
            results.append(run(ops))
    finally:
        kernels.set_threads(before)
    return results


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens start..end of sequence ``seq`` in one step; ``fold`` is where its HCA pool stands, entries that
    close before ``kept`` are not written."""

    seq: int
    start: int
    end: int
    fold: int | None = None
    kept: int = 0


def step(parts: Sequence[Part], page_table: Tensor, *, max_draft: int = 0) -> Batch:
    """The Batch of one step. Sequence q has state slot ``slot_of(q)`` and row q of ``page_table``."""
    lengths = [part.end - part.start for part in parts]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    positions = [p for part in parts for p in range(part.start, part.end)]
    folds = [part.start - min(part.start, max_draft) if part.fold is None else part.fold for part in parts]
    seq_ids = [s for s, length in enumerate(lengths) for _ in range(length)]

    def i32(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32)

    return Batch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=i32(positions),
        seq_ids=i32(seq_ids),
        offsets=i32(offsets),
        starts=i32([part.start for part in parts]),
        folds=i32(folds),
        slots=i32([slot_of(part.seq) for part in parts]),
        kept=i32([part.kept for part in parts]),
        page_table=page_table[[part.seq for part in parts]].contiguous(),
    )


def slot_of(seq: int) -> int:
    """Slots are neither dense nor in the order of the sequences."""
    return (5 * seq + 3) % 7


NUM_SLOTS = 7


def page_tables(num_sequences: int, num_pages: int, seed: int = 0) -> Tensor:
    """[num_sequences, num_pages] i32: scattered page ids, no page twice."""
    order = torch.randperm(num_sequences * num_pages, generator=torch.Generator().manual_seed(seed))
    return order.view(num_sequences, num_pages).to(torch.int32)


def gather(values: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """The rows of a step: values[q] [length, ...] cut as ``parts`` says."""
    return torch.cat([values[0][:0], *(values[part.seq][part.start : part.end] for part in parts)])


def chunkings(length: int, seed: int) -> Iterator[list[int]]:
    """Cut points of a sequence of ``length`` tokens: one piece, single tokens, and random pieces."""
    yield [0, length]
    yield list(range(length + 1))
    generator = torch.Generator().manual_seed(seed)
    cuts = [0]
    while cuts[-1] < length:
        cuts.append(min(length, cuts[-1] + int(torch.randint(1, 50, (), generator=generator))))
    yield cuts


def steps_of(cuts: Sequence[Sequence[int]]) -> list[list[Part]]:
    """Each sequence advances by its own cuts; step i holds the i-th piece of every sequence that has one."""
    return [
        [Part(q, own[i], own[i + 1]) for q, own in enumerate(cuts) if i + 1 < len(own)]
        for i in range(max(len(own) for own in cuts) - 1)
    ]


def quarter_turns(positions: Tensor, rope_dim: int) -> tuple[Tensor, Tensor]:
    """cos, sin [T, rope_dim / 2] of quarter turns that differ by position and pair: rotations are exact."""
    turns = (3 * positions[:, None] + 5 * torch.arange(rope_dim // 2)[None, :]) % 4
    cos = torch.tensor([1.0, 0.0, -1.0, 0.0])
    return cos[turns], cos[(turns + 3) % 4]


def garbage(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the last user of a slot or page may have left: NaN, or 0xFF bytes."""
    return (
        torch.full(shape, 0xFF, dtype=dtype)
        if dtype == torch.uint8
        else torch.full(shape, torch.nan, dtype=dtype)
    )


def compressor(ratio: int, width: int, c: int, rope_dim: int, seed: int) -> CompressorWeights:
    generator = torch.Generator().manual_seed(seed)
    return CompressorWeights(
        ape=torch.randn(ratio, width, generator=generator),
        norm=1 + 0.1 * torch.randn(c, generator=generator),
        inv_freq=10000.0 ** -(torch.arange(rope_dim // 2) / (rope_dim // 2)),
        rope_dim=rope_dim,
        eps=1e-6,
    )


def finish64(pooled: Tensor, weights: CompressorWeights, position: int, hadamard: bool) -> Tensor:
    """An entry from its pooled channels in float64, by matrices and complex numbers: [c] -> [c]."""
    x = pooled / (pooled.square().mean() + weights.eps).sqrt() * weights.norm.double()
    kept = x.shape[0] - weights.rope_dim
    angle = (torch.tensor(float(position)) * weights.inv_freq).double()
    turned = torch.view_as_complex(x[kept:].view(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    x = torch.cat((x[:kept], torch.view_as_real(turned).flatten()))
    if hadamard:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < x.shape[0]:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        x = matrix @ x / x.shape[0] ** 0.5
    return x


def f32_format(dim: int) -> RowFormat:
    return RowFormat("f32", dim)


def read_entries(pages: Tensor, table: Tensor, num: int) -> Tensor:
    """The first ``num`` entries of one sequence, bytes [num, bytes]; table [P]."""
    per_page = pages.shape[1]
    return torch.stack([pages[int(table[i // per_page]), i % per_page] for i in range(num)])
