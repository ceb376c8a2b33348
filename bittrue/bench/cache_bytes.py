"""Bytes per cached token under each strategy, as the pools and tiers count them and by arithmetic."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bittrue.bench.engines import Model, ask, at_least, drain, greedy
from bittrue.bench.result import Label, Measurement, measured
from bittrue.config.model import ModelConfig
from bittrue.errors import BittrueError
from bittrue.kv.blob import HEADER_BYTES
from bittrue.kv.identity import STATE_HEAD
from bittrue.kv.layout import CSA_FRONTIER, CSA_RATIO, PAGE_TOKENS, KVLayout

# snapshot_every of each strategy
STRATEGIES = {
    "full": PAGE_TOKENS,
    "periodic 1024": 1024,
    "periodic 4096": 4096,
    "periodic 16384": 16384,
    "recompute": 0,
}
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CachedBytes:
    """Caches a prompt of ``tokens`` tokens once per strategy. Files go to ``folder``."""

    model: Model
    folder: Path
    tell: Tell
    tokens: int = 32768
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(tokens=(self.tokens, 2 * PAGE_TOKENS))

    def run(self) -> Iterator[Measurement]:
        for strategy in STRATEGIES:
            yield from self._strategy(strategy)

    def _strategy(self, strategy: str) -> Iterator[Measurement]:
        """What one prompt and its end leave behind, on every tier."""
        every = STRATEGIES[strategy]
        self.tell(f"bytes per cached token, {strategy}")
        knobs = {"snapshot_every": every, "host_cache": 1 << 40, "cache_dir": str(self.folder / strategy)}
        context = self.tokens + PAGE_TOKENS
        with self.model.engine(
            max_context=context, max_running=1, threads=self.threads, log_level="warning", **knobs
        ) as engine:
            (answer,) = ask(engine, [self.model.prompt(self.tokens, self.seed)], greedy(1))
            stats, layout, tiers = engine.stats(), engine.parts.layout, engine.parts.tiers
            assert tiers is not None
            drain(tiers)
            sizes = tiers.sizes()
        seen = {
            "device": stats.pages_cached * layout.page_bytes + stats.slots_cached * layout.slot_bytes,
            "host": sizes["host"],
            "disk": sum(path.stat().st_size for path in (self.folder / strategy).rglob("*.kv")),
        }
        places = snapshots(self.tokens, every)
        if stats.slots_cached != len(places):
            raise BittrueError(f"{strategy} kept {stats.slots_cached} states of {len(places)}")
        expected = expected_bytes(layout, self.tokens, places)
        labels: dict[str, Label] = {"strategy": strategy, "tokens": self.tokens, "states": len(places)}
        for tier, num_bytes in seen.items():
            each = {**labels, "tier": tier}
            yield measured("bytes per cached token", "bytes", [num_bytes / self.tokens], each)
            yield measured("cached bytes over arithmetic", "ratio", [num_bytes / expected[tier]], each)
        limit = by_arithmetic(layout)[strategy]
        yield measured("bytes per token by arithmetic", "bytes", [limit], {"strategy": strategy})
        yield measured("prefill", "tokens/s", [self.tokens / answer.first_s], {"strategy": strategy})


def snapshots(tokens: int, every: int) -> list[int]:
    """Positions where a prompt of ``tokens`` tokens and one token after it leave a state: the grid, before
    the prompt's last token, and at the end of what was computed."""
    grid = range(every, tokens + 1, every) if every else ()
    return sorted({*grid, tokens - 1, tokens})


def expected_bytes(layout: KVLayout, tokens: int, places: list[int]) -> dict[str, int]:
    """Bytes by tier of the pages of ``tokens`` tokens and the states at ``places``. A page that is not full
    has no blob: its rows are in the blob of the state."""
    full, is_open = divmod(tokens, PAGE_TOKENS)
    states = [state_blob_bytes(layout, position) for position in places]
    blobs = full * layout.page_bytes + sum(states)
    return {
        "device": (full + bool(is_open)) * layout.page_bytes + len(places) * layout.slot_bytes,
        "host": blobs,
        "disk": blobs + (full + len(states)) * HEADER_BYTES,
    }


def state_blob_bytes(layout: KVLayout, position: int) -> int:
    """Bytes of the blob of a state at ``position`` >= window, of a run without drafts
    (docs/kv-disk-format.md)."""
    total = STATE_HEAD.size
    closed = position % PAGE_TOKENS // CSA_RATIO
    for layer in layout.layers:
        for part in layer.parts:
            row = part.bytes // max(1, part.shape[0])
            if part.name == "window":
                total += (layout.window - 1) * row
            elif part.name in ("csa", "csa_index"):
                total += (CSA_FRONTIER - 1) * row
            elif part.name == "hca_fold":
                total += part.bytes
            elif part.per == "page" and part.shape[0] > 1:
                total += closed * row
    return total


def by_arithmetic(layout: KVLayout) -> dict[str, float]:
    """Bytes per token of a long text, on the device: pages, and a state every so many tokens."""
    page = layout.page_bytes / PAGE_TOKENS
    return {name: page + (layout.slot_bytes / every if every else 0.0) for name, every in STRATEGIES.items()}


def of_shape(path: Path) -> Iterator[Measurement]:
    """The arithmetic for a config.json, in its published format."""
    config = ModelConfig.from_file(path)
    level = config.default_level
    layout = KVLayout.of(config, level=level, act="bf16")
    shape: dict[str, Label] = {"shape": path.stem, "level": level}
    for strategy, count in by_arithmetic(layout).items():
        yield measured("bytes per token by arithmetic", "bytes", [count], {**shape, "strategy": strategy})
    yield measured("bytes of a state", "bytes", [layout.slot_bytes], shape)
    yield measured("bytes of a state on disk", "bytes", [state_blob_bytes(layout, 1 << 20)], shape)
    replay = (config.num_layers - 1) * (config.window - 1) + config.window
    yield measured("tokens of a replay from nothing", "count", [replay], shape)
