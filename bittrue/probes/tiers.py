"""Checks law L4: what is cached on the device = in main memory = on disk = with rows kept off the device."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bittrue.engine.engine import Engine
from bittrue.engine.types import TokenEvent
from bittrue.kv.layout import CSA_RATIO, PAGE_TOKENS, KVLayout
from bittrue.probes.engines import Engines, altered
from bittrue.probes.result import LawResult
from bittrue.probes.resume import strategy_of
from bittrue.probes.story import Story, hits, told_plainly

_DRAIN_S = 60.0
_HOST_BYTES = 1 << 30


def tiers(engines: Engines, story: Story) -> Iterator[LawResult]:
    """Each tier behind a device that forgets everything between two turns."""
    every = strategy_of("periodic", story.longest)
    with engines.another(prefix_cache=True, snapshot_every=every, host_cache=_HOST_BYTES) as engine:
        answers = story.tell(engine, Engine.evict)
        yield story.compare("L4", "from main memory", answers, hits(engine))
    with tempfile.TemporaryDirectory(prefix="bittrue-verify-") as directory:
        yield from _disk(engines, story, directory)
        yield _beside_other_weights(engines, story.first(2), directory)


def _disk(engines: Engines, story: Story, directory: str) -> Iterator[LawResult]:
    knobs: dict[str, Any] = {
        "prefix_cache": True,
        "cache_dir": directory,
        "host_cache": 0,
        "snapshot_every": 0,
    }

    def forget(engine: Engine) -> None:
        assert engine.parts.tiers is not None and engine.parts.tiers.drain(_DRAIN_S), "the disk is too slow"
        engine.evict()

    with engines.another(**knobs) as engine:
        answers = story.tell(engine, forget)
        yield story.compare("L4", "from disk", answers, hits(engine))
    with engines.another(**knobs) as engine:
        answers = story.tell(engine)
        exercised = hits(engine)
        exercised["tokens from disk after a restart"] = exercised["tokens from disk"]
        # The stranger's own prompt is on disk by now.
        yield story.without_stranger().compare("L4", "from disk, restarted", answers, exercised)
    flip_files(Path(directory))
    with engines.another(**knobs) as engine:
        answers = story.tell(engine)
        events = engine.stats().cache.tier_events
        exercised = Counter({"flipped files missed": events.get("disk.corrupt", 0)})
        yield story.without_stranger().compare("L4", "a bit of every file flipped", answers, exercised)


def flip_files(directory: Path) -> int:
    """Flips one bit in the payload of every cached blob; how many there were."""
    files = list(directory.rglob("*.kv"))
    for path in files:
        with open(path, "r+b") as file:
            file.seek(-max(1, os.path.getsize(path) // 8), os.SEEK_END)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes((byte ^ 0x10,)))
    return len(files)


def _beside_other_weights(engines: Engines, story: Story, directory: str) -> LawResult:
    """Another model that finds this one's disk cache, for the same prompts."""
    other = altered(engines.parts.loaded)
    with engines.another(loaded=other, prefix_cache=False) as engine:
        plain = told_plainly(engine, story)
    with engines.another(loaded=other, prefix_cache=True, cache_dir=directory) as engine:
        answers = plain.tell(engine)
        exercised = {"requests of other weights": len(answers)}
        return plain.compare("L4", "other weights, the same directory", answers, exercised)


# ---- rows off the device ---------------------------------------------------------------------------------


def offload(engines: Engines, story: Story) -> Iterator[LawResult]:
    """CSA rows in a file, a tenth of them in memory, with and without a prefix cache that shares them."""
    if not has_csa(engines):
        return
    for cached in (False, True):
        with tempfile.TemporaryDirectory(prefix="bittrue-verify-") as directory:
            knobs: dict[str, Any] = {
                "offload_dir": directory,
                "offload_hot": hot_bytes(engines, story.longest),
            }
            with engines.another(prefix_cache=cached, snapshot_every=0, **knobs) as engine:
                watch = OffloadWatch()
                answers = story.tell(engine, between=watch)
                variant = "a tenth of the rows in memory" + (", prefix cache" if cached else "")
                yield story.compare("L4", variant, answers, hits(engine) + watch.counts)


def has_csa(engines: Engines) -> bool:
    return any(layer.kind == "csa" for layer in engines.parts.layout.layers)


def hot_bytes(engines: Engines, num_tokens: int) -> int:
    """A tenth of the CSA rows of one sequence of ``num_tokens``."""
    return max(1, row_bytes(engines.parts.layout, num_tokens) // 10)


def row_bytes(layout: KVLayout, num_tokens: int) -> int:
    """Bytes of the CSA rows of ``num_tokens`` tokens, all layers."""
    rows = num_tokens // CSA_RATIO
    return sum(layer.row_format.bytes * rows for layer in layout.layers if layer.kind == "csa")


class OffloadWatch:
    """Counts the steps after which most rows of what runs were not in memory."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, engine: Engine, events: Sequence[TokenEvent]) -> None:
        rows = engine.parts.row_store
        assert rows is not None
        held = engine.stats().pages_held + engine.stats().pages_cached
        per_page = row_bytes(engine.parts.layout, PAGE_TOKENS)
        self.counts["steps with rows off memory"] += rows.resident_bytes() * 4 < held * per_page
