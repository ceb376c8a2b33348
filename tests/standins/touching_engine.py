"""The real engine with its whole KV memory touched: as if sequences had filled every page and slot."""

from typing import Any

from bittrue.engine.engine import Engine


class TouchingEngine(Engine):
    """Implements process.ServedEngine."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        for cache in self._runner.caches:
            for part in (cache.window, cache.rows, cache.keys, cache.csa, cache.csa_index):
                if part is not None:
                    part.zero_()
            for part in (cache.hca_fold, cache.hca_pending):
                if part is not None:
                    part.zero_()
