"""Engines of several runs over one loaded checkpoint, and requests timed on them."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bittrue.bench.trace import FIRST_ID
from bittrue.config.run import RunConfig
from bittrue.engine.assembly import Loaded, assemble_on, context_limit, load, max_snapshots, numerics
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams
from bittrue.errors import BittrueError, UsageError
from bittrue.kv.layout import KVLayout, pages_for
from bittrue.kv.tiers import TierStore

_DRAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint directory and what is loaded of it."""

    directory: Path
    loaded: Loaded

    @classmethod
    def of(cls, directory: Path) -> "Model":
        return cls(directory, load(directory))

    @property
    def vocab_size(self) -> int:
        return self.loaded.checkpoint.config.vocab_size

    @property
    def has_draft_module(self) -> bool:
        return "mtp.0.e_proj.weight" in self.loaded.checkpoint.draft_tensors

    def prompt(self, num_tokens: int, *seed: int, ids: int = 0) -> tuple[int, ...]:
        """Random token ids, the same for the same numbers; ``ids``: of the first so many alone."""
        source = np.random.Generator(np.random.PCG64(seed))
        end = min(FIRST_ID + ids, self.vocab_size) if ids else self.vocab_size
        return tuple(source.integers(FIRST_ID, end, num_tokens).tolist())

    @contextmanager
    def engine(self, *, max_context: int, max_running: int = 2, **knobs: Any) -> Iterator[Engine]:
        """An engine with pages for every sequence at the whole context, and a slot for every snapshot of
        use."""
        given = {**knobs, "max_context": max_context, "max_running": max_running}
        run = RunConfig.model_validate({**given, "model": str(self.directory)})
        run = run.model_copy(update={"kv_memory": self._kv_memory(run)})
        engine = Engine(self.directory, run, parts=assemble_on(self.loaded, run))
        try:
            yield engine
        finally:
            engine.close()

    def _kv_memory(self, run: RunConfig) -> int:
        config = self.loaded.checkpoint.config
        level, act = numerics(run, config)
        max_draft = 0 if run.speculation == "off" else run.max_draft
        layout = KVLayout.of(config, level=level, act=act, max_draft=max_draft, num_draft_layers=1)
        context = context_limit(run, config)
        slots = run.max_running + max_snapshots(run, context) + 1
        # At most a quarter of a budget becomes slots of one kind, and at least half of it pages.
        return 4 * layout.pool_bytes(run.max_running * (pages_for(context) + 1), slots)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request got. ``times``: of each token, seconds from asking."""

    token_ids: tuple[int, ...]
    times: tuple[float, ...]
    num_cached: int

    @property
    def first_s(self) -> float:
        return self.times[0]

    @property
    def last_s(self) -> float:
        return self.times[-1]


def ask(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Answer]:
    """The answers to ``prompts``, asked together of an engine that has nothing else to do.

    Raises BittrueError where one ends for another reason than its length.
    """
    assert not engine.has_work(), "the engine is busy"
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    requests = {
        f"bench-{i}": Request(request_id=f"bench-{i}", prompt=tuple(prompt), params=wanted)
        for i, (prompt, wanted) in enumerate(zip(prompts, each, strict=True))
    }
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    times: dict[str, list[float]] = {name: [] for name in requests}
    cached = dict.fromkeys(requests, 0)
    begun_s = time.perf_counter()
    for request in requests.values():
        engine.add(request)
    while engine.has_work():
        events = engine.step()
        now_s = time.perf_counter() - begun_s
        for event in events:
            tokens[event.request_id] += event.token_ids
            times[event.request_id] += [now_s] * len(event.token_ids)
            cached[event.request_id] = event.num_cached_tokens
            if event.finish_reason not in (None, "length"):
                raise BittrueError(f"a request ended with {event.finish_reason!r}: {event.error}")
    return [Answer(tuple(tokens[n]), tuple(times[n]), cached[n]) for n in requests]


def decode_speed(answers: Sequence[Answer]) -> float:
    """Tokens per second of all answers together, from when each of them had its first token."""
    begin_s, end_s = max(a.first_s for a in answers), max(a.last_s for a in answers)
    return sum(t > begin_s for a in answers for t in a.times) / (end_s - begin_s)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def drain(tiers: TierStore) -> None:
    """Waits until the disk has what was saved. Raises BittrueError where it does not take it."""
    if not tiers.drain(_DRAIN_S):
        raise BittrueError(f"the disk did not take the cache within {_DRAIN_S:g} s; use a faster one")


def at_least(**values: tuple[int, int]) -> None:
    """Raises UsageError for a value below its bound: name=(value, least)."""
    for name, (value, least) in values.items():
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
