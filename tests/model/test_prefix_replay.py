"""Replay against stored rows: a known number of tokens before a position gives its exact state."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from oracles.random_checkpoint import random_checkpoint
from support.models import make_runner, random_ids
from torch import Tensor

from bittrue.engine.runner import Runner
from bittrue.kv.layout import CSA_RATIO, HCA_RATIO, PAGE_TOKENS, KVLayout
from bittrue.kv.manager import CachePolicy
from bittrue.kv.moves import ClearSlot, CopySlot
from bittrue.kv.pool import KVPool
from bittrue.model.batch import Segment
from bittrue.ops.dispatch import select
from bittrue.ops.numeric import first_difference

WINDOW, MAX_DRAFT = 9, 3
LENGTH = 330
VARIANTS = {
    "maths-f32": ("f32", "maths", "f32"),
    "maths-bf16": ("bf16", "maths", "bf16"),
    "published-fp8": ("fp8", "published", "bf16"),
    "published-fp4": ("fp4", "published", "bf16"),
}
# The first positions, a CSA group, the edges of pages and of what a replay of the model below takes.
POSITIONS = (1, 3, 4, 5, 8, 49, 50, 51, 63, 127, 128, 129, 132, 137, 160, 167, 168, 199, 255, 256, 257, 271)

Chunks = Callable[[int], list[int]]


def one_chunk(count: int) -> list[int]:
    return [count]


def random_chunks(count: int) -> list[int]:
    rng, sizes = random.Random(count), []
    while count:
        sizes.append(min(count, rng.choice((1, 1, 2, 3, 5, 30, 90))))
        count -= sizes[-1]
    return sizes


@dataclass
class World:
    """A runner, and what a plain run of ``tokens`` in slot 0 leaves: logits and page bytes."""

    runner: Runner
    pool: KVPool
    tokens: list[int]
    page_ids: list[int]
    logits: Tensor
    pages: list[Tensor]

    def run(self, slot: int, sizes: Sequence[int], start: int, fold: int, kept: int) -> tuple[Tensor, int]:
        """Runs ``sizes`` tokens a step from ``start`` on. Returns their logits and where the fold stands."""
        parts = []
        for size in sizes:
            segment = Segment(self.tokens[start : start + size], start, fold, slot, self.page_ids, kept)
            streams = self.runner.forward([segment])
            parts += [x.clone() for _, x in self.runner.logits_by_block(streams, range(size))]
            start += size
            fold = max(fold, start - self.runner.max_draft)
        return torch.cat(parts) if parts else self.logits[:0], fold

    def stored(self) -> Iterator[Tensor]:
        for cache in self.runner.caches:
            yield from (part for part in (cache.rows, cache.keys) if part is not None)

    def keep_pages_until(self, position: int) -> None:
        """The pages as the plain run had them at ``position``: what closes later is not there yet."""
        for tensor, plain in zip(self.stored(), self.pages, strict=True):
            tensor.copy_(plain)
            per_page = tensor.shape[1]
            ratio = PAGE_TOKENS // per_page
            for entry in range(position // ratio, per_page * len(self.page_ids)):
                tensor[self.page_ids[entry // per_page], entry % per_page] = 0xFF

    def resume(
        self, position: int, count: int, chunks: Chunks, after: Chunks, *, kept: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Replays ``count`` tokens before ``position`` from nothing, then goes on to the end, all in slot 1.
        Returns the logits of both parts."""
        self.keep_pages_until(position)
        self.pool.apply([ClearSlot(1)])
        start, kept = position - count, position if kept is None else kept
        replayed, fold = self.run(1, chunks(count), start, start, kept)
        logits, _ = self.run(1, after(len(self.tokens) - position), position, fold, kept)
        return replayed, logits

    def difference(self, logits: Tensor) -> str | None:
        """What a run in slot 1 up to the end has other than the plain one, in words. ``logits``: its last."""
        found = first_difference(logits, self.logits[len(self.tokens) - len(logits) :])
        if found is not None:
            return f"logits: {found}"
        for tensor, plain in zip(self.stored(), self.pages, strict=True):
            if not torch.equal(tensor[self.page_ids], plain[self.page_ids]):
                return "page bytes"
        end = len(self.tokens)
        plain, mine = (
            self.pool.state_bytes(slot, self.page_ids[-1], end, end - self.runner.max_draft)
            for slot in (0, 1)
        )
        return None if mine == plain else "state bytes"


def replay_tokens(runner: Runner, position: int) -> int:
    """Tokens before ``position`` to replay from nothing."""
    config = runner.model.config
    policy = CachePolicy(num_layers=config.num_layers, window=config.window)
    return min(position, policy.replay_tokens(position))


def least_replay(runner: Runner, position: int) -> int:
    """The same, layer by layer: layer i is exact from i * (window - 1) tokens on; of the exact rows it needs
    those of a window, of the last two CSA groups, of the open HCA window."""
    window = runner.model.config.window
    least = 0
    for i, cache in enumerate(runner.caches):
        own = {"window": 0, "csa": CSA_RATIO + position % CSA_RATIO, "hca": position % HCA_RATIO}
        least = max(least, i * (window - 1) + max(window - 1, own[cache.kind]))
    return least


def make_world(variant: str = "maths-f32", *, captured: bool = True, **overrides: Any) -> World:
    precision, level, act = VARIANTS[variant]
    raw, tensors = random_checkpoint(3, precision=precision, **{"sliding_window": WINDOW, **overrides})
    ops = select("cpu", threads=1)
    if not captured:
        ops = replace(ops, capture=None)
    runner = make_runner(raw, tensors, level=level, act=act, pages=4, slots=3, max_draft=MAX_DRAFT, ops=ops)
    layout = KVLayout.of(runner.model.config, level=level, act=act, max_draft=MAX_DRAFT)
    tokens = random_ids(LENGTH, raw["vocab_size"], seed=1)
    world = World(runner, KVPool(layout, runner.caches), tokens, [2, 0, 3], torch.empty(0), [])
    world.logits, _ = world.run(0, [LENGTH], 0, 0, 0)
    assert not world.logits.isnan().any()
    world.pages = [tensor.clone() for tensor in world.stored()]
    return world


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "direct"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_from_nothing_goes_on_as_if_nothing_had_been_lost(variant: str, captured: bool) -> None:
    world = make_world(variant, captured=captured)
    ways = [(one_chunk, one_chunk), (random_chunks, random_chunks), (one_chunk, random_chunks)]
    for i, position in enumerate(POSITIONS):
        chunks, after = ways[i % 3]
        replayed, logits = world.resume(position, replay_tokens(world.runner, position), chunks, after)
        assert replayed.isfinite().all(), position
        assert world.difference(logits) is None, (position, world.difference(logits))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_from_nothing_is_exact_at_every_position(variant: str) -> None:
    world = make_world(variant)
    for position in range(1, LENGTH):
        for chunks in (one_chunk, random_chunks):
            _, logits = world.resume(position, replay_tokens(world.runner, position), chunks, one_chunk)
            assert world.difference(logits) is None, (position, world.difference(logits))


@pytest.mark.parametrize(
    "compress_ratios",
    [[0, 4, 128, 4, 0, 128, 0], [4, 128, 0, 4, 128, 4, 0], [4, 128, 0, 4, 128, 0, 0]],
    ids=["hca last", "csa last", "window last"],
)
def test_a_replay_one_token_shorter_than_the_least_is_noticed(compress_ratios: list[int]) -> None:
    world = make_world(compress_ratios=compress_ratios)
    for position in (129, 135, 138, 180, 200, 240, 255, 256, 263, 270):
        least = least_replay(world.runner, position)
        assert least <= replay_tokens(world.runner, position)
        for count, differs in ((least, False), (least - 1, True)):
            _, logits = world.resume(position, count, one_chunk, one_chunk)
            assert (world.difference(logits) is not None) == differs, (position, count)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_kept_a_replay_spoils_the_rows_that_stand(variant: str) -> None:
    world = make_world(variant)
    for position in (130, 200, 257):
        world.resume(position, replay_tokens(world.runner, position), one_chunk, one_chunk, kept=0)
        assert not all(torch.equal(a, b) for a, b in zip(world.stored(), world.pages, strict=True)), position


@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_from_the_first_token_or_from_a_state_is_exact_from_there(variant: str) -> None:
    world = make_world(variant)
    for position in (5, 50, 130, 257):
        replayed, logits = world.resume(position, position, random_chunks, one_chunk)
        assert first_difference(replayed, world.logits[:position]) is None, position
        assert world.difference(logits) is None, position
    for snapshot, position in ((1, 3), (40, 41), (100, 128), (126, 131), (128, 257), (200, 290)):
        world.keep_pages_until(0)
        _, fold = world.run(2, [snapshot], 0, 0, 0)
        world.keep_pages_until(position)
        world.pool.apply([CopySlot(2, 1)])
        replayed, fold = world.run(1, random_chunks(position - snapshot), snapshot, fold, position)
        rest, _ = world.run(1, [LENGTH - position], position, fold, position)
        assert world.difference(torch.cat((replayed, rest))) is None, (snapshot, position)


def test_replay_beside_another_sequence_gives_the_same_bits() -> None:
    """The replayed tokens share their steps with a sequence that is decoded."""
    world = make_world("published-fp8")
    position = 200
    count = replay_tokens(world.runner, position)
    world.keep_pages_until(position)
    world.pool.apply([ClearSlot(1)])
    start = fold = position - count
    other = 0
    for size in (*random_chunks(count), LENGTH - position):
        mine = Segment(world.tokens[start : start + size], start, fold, 1, world.page_ids, position)
        theirs = Segment(world.tokens[other : other + 2], other, max(0, other - MAX_DRAFT), 2, [1])
        streams = world.runner.forward([theirs, mine])
        rows = [x.clone() for _, x in world.runner.logits_by_block(streams, range(2 + size))]
        logits = torch.cat(rows)
        assert first_difference(logits[:2], world.logits[other : other + 2]) is None
        start, other = start + size, other + 2
        fold = max(fold, start - MAX_DRAFT)
    assert world.difference(logits[2:]) is None, world.difference(logits[2:])
