"""A checkpoint with a window of 8 tokens and layers of every kind: all paths of the cache, cheaply."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bittrue.engine.engine import Engine
from bittrue.model.inventory import DraftKind
from bittrue.model.presets import Precision, make_checkpoint
from bittrue.probes.engines import Engines

# Level -> the precision of the checkpoint that has it by default.
LEVELS: dict[str, Precision] = {"maths": "bf16", "published": "fp4"}
MAX_CONTEXT = 1024


def small_checkpoint(
    directory: Path, *, precision: Precision = "bf16", seed: int = 0, draft: DraftKind = "none"
) -> Path:
    shape = {
        "num_hidden_layers": 5,
        "compress_ratios": [0, 4, 128, 4, 128],
        "sliding_window": 8,
        "vocab_size": 512,
    }
    return make_checkpoint("tiny", seed, precision, directory, draft=draft, **shape)


@contextmanager
def plain_engines(model: Path, **knobs: Any) -> Iterator[Engines]:
    """The plain engine of ``model`` and what makes others."""
    settings = {"kv_memory": "32MiB", "max_running": 16, "threads": 1, "log_level": "error", **knobs}
    engine = Engine(model, prefix_cache=False, **settings)
    yield Engines(engine, MAX_CONTEXT)
    engine.close()
