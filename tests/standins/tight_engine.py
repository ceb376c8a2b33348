"""The real engine with so few pages that sequences preempt each other."""

from collections.abc import Callable
from dataclasses import replace

from bittrue.config.run import RunConfig
from bittrue.engine.assembly import assemble
from bittrue.engine.engine import Engine

NUM_PAGES, NUM_SLOTS = 8, 6


class TightEngine(Engine):
    """Implements process.ServedEngine."""

    def __init__(
        self,
        model: str,
        run: RunConfig,
        *,
        progress: Callable[[int, int, str], None] | None = None,
        verified: str = "",
    ) -> None:
        parts = assemble(run, progress=progress, verified=verified)
        super().__init__(model, run, parts=replace(parts, num_pages=NUM_PAGES, num_slots=NUM_SLOTS))
