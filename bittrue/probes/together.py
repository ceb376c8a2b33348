"""Checks L3 to L6 all at once: prefix cache, tiers, offload, speculation, preemption."""

import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bittrue.engine.engine import Engine
from bittrue.engine.types import TokenEvent
from bittrue.probes.drafts import MAX_DRAFT, Adversary, DraftWatch, drafted_by, patterns_of, scripts_of
from bittrue.probes.engines import Engines
from bittrue.probes.preemption import Preemptor
from bittrue.probes.result import LawResult
from bittrue.probes.resume import strategy_of
from bittrue.probes.story import Story, hits
from bittrue.probes.tiers import OffloadWatch, has_csa, hot_bytes


class Everything:
    """Watches and disturbs: preempts now and then, and makes the device forget."""

    def __init__(self, *, seed: int, offloaded: bool) -> None:
        self._draw = random.Random(seed)
        self._drafts = DraftWatch()
        self._preemptor = Preemptor(chance=0.3)
        self._offload = OffloadWatch() if offloaded else None

    def __call__(self, engine: Engine, events: Sequence[TokenEvent]) -> None:
        self._drafts(engine, events)
        self._preemptor(engine, events)
        if self._offload is not None:
            self._offload(engine, events)
        if self._draw.random() < 0.1:
            engine.evict()

    def counts(self, engine: Engine) -> Counter[str]:
        found = hits(engine) + self._drafts.counts + self._preemptor.counts
        if self._offload is not None:
            found += self._offload.counts
        found["tokens resumed"] = sum(engine.stats().cache.hit_tokens.values())
        return found


def together(engines: Engines, story: Story, *, rounds: int, seed: int) -> Iterator[LawResult]:
    """The conversations under everything at once, told twice: the second time by an engine that finds the
    disk cache of the first."""
    with tempfile.TemporaryDirectory(prefix="bittrue-verify-") as directory:
        for turn in range(1 + rounds):
            knobs = everything(engines, story, Path(directory), turn)
            requests = [request for wave in story.waves for request in wave]
            adversary = Adversary(
                scripts_of(requests, story.plain),
                knobs["max_draft"],
                patterns_of(knobs["max_draft"]),
                vocab=engines.parts.config.vocab_size,
                seed=seed + turn,
            )
            with engines.another(drafted_by(adversary), **knobs) as engine:
                all_at_once = Everything(seed=seed + turn, offloaded=bool(knobs["offload_dir"]))
                answers = story.tell(engine, between=all_at_once)
                exercised = all_at_once.counts(engine)
            told = story.without_stranger() if turn else story
            yield told.compare("L3-L6", f"conversations, time {turn + 1}", answers, exercised)


def everything(engines: Engines, story: Story, directory: Path, turn: int) -> dict[str, Any]:
    """All fast paths on; each time with another draft length and another strategy."""
    cache, rows = directory / "cache", directory / "rows"
    for each in (cache, rows):
        each.mkdir(exist_ok=True)
    return {
        "prefix_cache": True,
        "snapshot_every": strategy_of(("full", "recompute", "periodic")[turn % 3], story.longest),
        "host_cache": 1 << 24 if turn % 2 == 0 else 0,
        "cache_dir": str(cache),
        "offload_dir": str(rows) if has_csa(engines) else "",
        "offload_hot": hot_bytes(engines, story.longest),
        "speculation": "ngram",
        "max_draft": (4, MAX_DRAFT, 1)[turn % 3],
        "kv_canary": "raise",
        "max_step_tokens": (512, 100, 33)[turn % 3],
    }
