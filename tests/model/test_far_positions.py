"""The ends of the ranges: the last of a million positions, and rows that lie gigabytes into a pool."""

import dataclasses
import mmap

import pytest
import torch
from oracles.random_checkpoint import random_checkpoint
from support.models import logits_of, make_runner, random_ids
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.engine.runner import Runner
from bittrue.model.batch import Segment
from bittrue.ops.contracts import LayerCache, OpTable
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import first_difference

LAST = 1_048_576  # the context of the published models
NUM_PAGES = LAST // 128
TAIL = 9  # tokens computed at the end of it: two CSA entries and the last HCA entry close there
LEVELS = {"maths": ("f32", "maths", "f32"), "published": ("fp4", "published", "bf16")}
NORESERVE = 0x4000  # MAP_NORESERVE of Linux: address space alone, memory only where it is touched


def random_rows(ops: OpTable, rows: Tensor, fmt: RowFormat, generator: torch.Generator) -> None:
    """Fills [pages, n, bytes] with rows of normal values. A few thousand differ: packing costs time."""
    flat = rows.view(-1, fmt.bytes)
    packed = ops.pack_rows(torch.randn(4099, fmt.dim, generator=generator), fmt)
    for start in range(0, flat.shape[0], 4099):
        part = flat[start : start + 4099]
        part.copy_(packed[: part.shape[0]])


def long_runner(level: str, ops: OpTable) -> Runner:
    """A runner whose caches hold what a sequence of nearly a million tokens could have left."""
    precision, level_name, act = LEVELS[level]
    raw, tensors = random_checkpoint(
        8,
        precision=precision,
        num_hidden_layers=3,
        compress_ratios=[0, 4, 128, 0],
        head_dim=32,
        qk_rope_head_dim=8,
        index_n_heads=2,
        index_topk=50,
    )
    runner = make_runner(raw, tensors, level=level_name, act=act, ops=ops, pages=NUM_PAGES, slots=1)
    generator = torch.Generator().manual_seed(1)
    for cache in runner.caches:
        random_rows(ops, cache.window, cache.row_format, generator)
        if cache.rows is not None:
            random_rows(ops, cache.rows, cache.row_format, generator)
        if cache.keys is not None and cache.key_format is not None:
            random_rows(ops, cache.keys, cache.key_format, generator)
        for state in (cache.csa, cache.csa_index, cache.hca_fold):
            if state is not None:
                state.copy_(torch.randn(state.shape, generator=generator).abs())
    return runner


def tail_logits(runner: Runner, chunks: tuple[int, ...]) -> Tensor:
    """Logits [TAIL, V] of the last positions, computed in ``chunks``."""
    pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(2)).tolist()
    ids = random_ids(TAIL, runner.model.config.vocab_size, seed=3)
    out, done = [], 0
    for count in chunks:
        start = LAST - TAIL + done
        streams = runner.forward([Segment(ids[done : done + count], start, start, 0, pages)])
        out.append(runner.logits(streams, range(count)))
        done += count
    return torch.cat(out)


@pytest.mark.parametrize("level", LEVELS)
def test_the_last_of_a_million_positions_obey_the_laws(level: str) -> None:
    runner = long_runner(level, select("cpu", threads=1))
    expected = tail_logits(runner, (TAIL,))
    assert torch.isfinite(expected).all()
    for threads, chunks in ((1, (1,) * TAIL), (2, (4, 5)), (2, (1, 7, 1))):
        runner = long_runner(level, select("cpu", threads=threads))
        assert first_difference(expected, tail_logits(runner, chunks)) is None, chunks
    select("cpu", threads=1)


@pytest.mark.parametrize("level", LEVELS)
def test_a_million_positions_agree_with_the_reference(level: str) -> None:
    ours = tail_logits(long_runner(level, select("cpu", threads=1)), (TAIL,))
    theirs = tail_logits(long_runner(level, select("reference")), (TAIL,))
    distance = (ours - theirs).abs().amax(-1)
    if level == "maths":
        assert float(distance.max()) < 2e-5
    else:  # one bf16 rounding that falls the other way moves a row by about 1e-2; see docs/numerics.md
        assert float(distance.median()) < 1e-4


def spread(part: Tensor | None, total: int) -> Tensor | None:
    """A tensor like ``part`` [n, ...] but with ``total`` entries of untouched memory."""
    if part is None:
        return None
    num_bytes = total * part[0].numel() * part.element_size()
    space = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(space, dtype=part.dtype).view(total, *part.shape[1:])


def spread_cache(cache: LayerCache, pages: int, slots: int) -> LayerCache:
    return dataclasses.replace(
        cache,
        window=spread(cache.window, slots),
        rows=spread(cache.rows, pages),
        keys=spread(cache.keys, pages),
        csa=spread(cache.csa, slots),
        csa_index=spread(cache.csa_index, slots),
        hca_fold=spread(cache.hca_fold, slots),
        hca_pending=None if cache.hca_pending is None else cache.hca_pending.expand(slots, -1, -1, -1),
    )


def test_pools_of_many_gigabytes_are_addressed_to_their_end() -> None:
    raw, tensors = random_checkpoint(9, head_dim=512, qk_rope_head_dim=64, index_head_dim=128)
    near = make_runner(raw, tensors, pages=4, slots=1)
    ids = random_ids(300, raw["vocab_size"], seed=4)
    expected = logits_of(near, ids, [300])
    pages, slots = 300_000, 40_000
    far = Runner(near.model, [spread_cache(cache, pages, slots) for cache in near.caches])
    for part in ("rows", "keys", "window", "csa"):
        size = max(t.numel() * t.element_size() for c in far.caches if (t := getattr(c, part)) is not None)
        assert size > 2**32 or (part == "csa" and size > 2**31), part
    got = logits_of(far, ids, [100, 1, 199], slot=slots - 1)  # pages are dealt from the far end
    assert first_difference(expected, got) is None
