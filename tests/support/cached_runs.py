"""Sequences over a runner's caches with shared pages, snapshots, replays, drafts and blobs, driven by hand.

What engine and manager do with integers, without them: every way in which a correct run uses the cache.
"""

import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from oracles.random_checkpoint import random_checkpoint
from support.models import make_runner
from torch import Tensor

from bittrue.config.formats import ActDtype, Level
from bittrue.kv.canary import Canary
from bittrue.kv.identity import BlobName, namespace_digest, page_digest, state_digest
from bittrue.kv.layout import PAGE_TOKENS, KVLayout, pages_for
from bittrue.kv.moves import ClearSlot, CopyPage, CopySlot, LoadPage, LoadState, Move, SavePage, SaveState
from bittrue.kv.pool import KVPool
from bittrue.model.batch import Segment
from bittrue.obs.log import Log

SPACE = namespace_digest({"weights": "w"}, "")


@dataclass(slots=True)
class State:
    """Tokens whose state a slot holds, and the pages behind them. ``kept``: rows before it were there when
    it began; ``done``: tokens computed."""

    tokens: list[int]
    slot: int
    pages: list[int]
    done: int = 0
    fold: int = 0
    kept: int = 0


@dataclass(slots=True)
class Stored:
    """The names of the blobs that make up a cached prefix."""

    tokens: list[int]
    pages: list[BlobName]
    state: BlobName
    fold: int


@dataclass
class CachedRuns:
    """A small model (four layers, a window of 16) and its cache under a canary."""

    seed: int
    precision: str = "f32"
    level: Level = "maths"
    act: ActDtype = "f32"
    mode: Literal["log", "raise"] = "raise"
    num_pages: int = 40
    num_slots: int = 12
    max_draft: int = 3
    window: int = 16
    blobs: dict[BlobName, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape: dict[str, Any] = {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4, 0]}
        raw, tensors = random_checkpoint(5, precision=self.precision, sliding_window=self.window, **shape)
        made = {"level": self.level, "act": self.act, "max_draft": self.max_draft}
        self.runner = make_runner(raw, tensors, pages=self.num_pages, slots=self.num_slots, **made)
        self.plain = make_runner(raw, tensors, level=self.level, act=self.act)
        self.vocab = int(raw["vocab_size"])
        self.layout = KVLayout.of(self.runner.model.config, **made)
        self.pool = KVPool(self.layout, self.runner.caches, lambda *blob: self._save(blob))
        self.lines = io.StringIO()
        self.canary = Canary(self.layout, self.runner.caches, self.mode, Log(self.lines))
        self.rng = random.Random(self.seed)
        self.owners: Counter[int] = Counter()
        self.free_slots = list(range(self.num_slots))

    def _save(self, blob: Sequence[Any]) -> None:
        """``KVPool.save``: the last two are name and data."""
        self.blobs[blob[-2]] = blob[-1]

    # ---- steps -------------------------------------------------------------------------------------------

    def step(self, states: Sequence[State], counts: Sequence[int], wrong: Sequence[int] = ()) -> Tensor:
        """Advances each state by its count of tokens, and ``wrong`` more that are not accepted. Returns the
        streams of the accepted tokens."""
        wrong = wrong or [0] * len(states)
        segments, rows, offset = [], [], 0
        for state, count, extra in zip(states, counts, wrong, strict=True):
            self.reserve(state, state.done + count + extra)
            tokens = state.tokens[state.done : state.done + count]
            drafts = [self.rng.randrange(self.vocab) for _ in range(extra)]
            pages = tuple(state.pages)
            segments.append(
                Segment([*tokens, *drafts], state.done, state.fold, state.slot, pages, state.kept)
            )
            rows += range(offset, offset + count)
            offset += count + extra
        self.canary.before(segments, [state.tokens for state in states])
        streams = self.runner.forward(segments)
        self.canary.after(segments)
        for state, count, segment in zip(states, counts, segments, strict=True):
            state.done += count
            state.fold = max(state.fold, segment.start + len(segment.token_ids) - self.max_draft)
        return streams[rows].clone()

    def move(self, *moves: Move) -> None:
        self.pool.apply(moves)
        self.canary.moves(moves)

    def run(self, tokens: Sequence[int], chunk: int = 1 << 20) -> State:
        """A fresh sequence, computed to its end."""
        state = self.begin(tokens)
        while state.done < len(tokens):
            self.step([state], [min(chunk, len(tokens) - state.done)])
        return state

    def begin(self, tokens: Sequence[int]) -> State:
        return State(list(tokens), self.free_slots.pop(0), [])

    def drop(self, state: State) -> None:
        for page in state.pages:
            self.owners[page] -= 1
        self.free_slots.append(state.slot)
        self.free_slots.sort()

    def reserve(self, state: State, num_tokens: int) -> None:
        while len(state.pages) < pages_for(num_tokens):
            state.pages.append(self.new_page())

    def new_page(self) -> int:
        page = next(p for p in range(self.num_pages) if not self.owners[p])
        self.owners[page] += 1
        return page

    @property
    def num_free_pages(self) -> int:
        return sum(not self.owners[page] for page in range(self.num_pages))

    # ---- reuse -------------------------------------------------------------------------------------------

    def snapshot(self, state: State) -> State:
        """A copy of a state in a slot of its own; full pages are shared, the open one is copied."""
        copy = State(
            state.tokens[: state.done], self.free_slots.pop(0), [], state.done, state.fold, state.done
        )
        moves = self._share(state, copy, state.done)
        self.move(CopySlot(state.slot, copy.slot), *moves)
        return copy

    def resume(self, snapshot: State, rows: State, tokens: Sequence[int], kept: int) -> State:
        """``tokens`` from a snapshot on, replayed to ``kept`` against the pages of ``rows``."""
        state = State(
            list(tokens), self.free_slots.pop(0), [], snapshot.done, snapshot.fold, max(kept, snapshot.done)
        )
        moves = self._share(rows, state, state.kept)
        self.move(CopySlot(snapshot.slot, state.slot), *moves)
        return state

    def recompute(self, rows: State, tokens: Sequence[int], kept: int, late: int = 0) -> State:
        """``tokens`` with pages of ``rows``, replayed to ``kept`` from nothing; ``late`` tokens too few."""
        reach = (len(self.layout.layers) - 1) * (self.window - 1) + max(self.window, kept % PAGE_TOKENS)
        start = max(0, kept - reach) + late
        state = State(list(tokens), self.free_slots.pop(0), [], start, start, kept)
        moves = self._share(rows, state, kept)
        self.move(ClearSlot(state.slot), *moves)
        return state

    def _share(self, source: State, target: State, kept: int) -> list[Move]:
        full = kept // PAGE_TOKENS
        target.pages = source.pages[:full]
        self.owners.update(target.pages)
        if kept % PAGE_TOKENS == 0:
            return []
        target.pages.append(self.new_page())
        return [CopyPage(source.pages[full], target.pages[full])]

    def store(self, state: State) -> Stored:
        """Writes a prefix into ``blobs``."""
        parent, names, moves = SPACE, [], []
        full, offset = divmod(state.done, PAGE_TOKENS)
        for i in range(full):
            digest = page_digest(parent, state.tokens[PAGE_TOKENS * i : PAGE_TOKENS * (i + 1)])
            names.append(BlobName("page", parent, PAGE_TOKENS, digest))
            moves.append(SavePage(state.pages[i], SPACE, names[-1]))
            parent = digest
        tail = state.tokens[PAGE_TOKENS * full : state.done]
        name = BlobName("state", parent, offset, state_digest(parent, tail))
        page = state.pages[full] if offset else None
        self.move(*moves, SaveState(state.slot, page, state.done, state.fold, SPACE, name))
        return Stored(state.tokens[: state.done], names, name, state.fold)

    def load(self, stored: Stored, tokens: Sequence[int]) -> State:
        """``tokens`` from a stored prefix on."""
        done = len(stored.tokens)
        state = State(list(tokens), self.free_slots.pop(0), [], done, stored.fold, done)
        self.reserve(state, done)
        pages = [
            LoadPage(name, self.blobs[name], page)
            for name, page in zip(stored.pages, state.pages, strict=False)
        ]
        open_page = state.pages[-1] if done % PAGE_TOKENS else None
        state_blob = self.blobs[stored.state]
        self.move(*pages, LoadState(stored.state, state_blob, state.slot, open_page, done))
        return state

    def random_tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(self.vocab) for _ in range(count)]

    def expected(self, tokens: Sequence[int]) -> Tensor:
        """Streams [n, M, D] of ``tokens`` by a run that caches nothing."""
        segment = Segment(list(tokens), 0, 0, 0, tuple(range(pages_for(len(tokens)))))
        return self.plain.forward([segment]).clone()

    def caches_of(self, part: str) -> list[tuple[int, Tensor]]:
        """(layer, tensor) of every cache part of a name: csa_rows, hca_rows, or a name of LayerCache."""
        kind, name = (part[:3], "rows") if part.endswith("_rows") else (None, part)
        found = [
            (i, getattr(cache, name))
            for i, cache in enumerate(self.runner.caches)
            if kind in (None, cache.kind)
        ]
        return [(i, tensor) for i, tensor in found if isinstance(tensor, torch.Tensor)]
