"""Engines of other runs beside the plain one: one loaded checkpoint, another cache and other knobs."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bittrue.engine.assembly import Assembly, Loaded, assemble_on
from bittrue.engine.engine import Engine

Change = Callable[[Assembly], Assembly]


def unchanged(parts: Assembly) -> Assembly:
    return parts


def with_pages(num_pages: int) -> Change:
    """Only so many pages are dealt out."""

    def change(parts: Assembly) -> Assembly:
        return replace(parts, num_pages=min(num_pages, parts.num_pages))

    return change


@dataclass(frozen=True, slots=True)
class Engines:
    """``plain`` computes everything from its first token: no cache, no tiers, no drafts, roomy memory.

    What it answers is what all others are held to.
    """

    plain: Engine
    max_context: int  # of the others: bounds what they reserve

    @property
    def parts(self) -> Assembly:
        return self.plain.parts

    @contextlib.contextmanager
    def another(
        self, change: Change = unchanged, *, loaded: Loaded | None = None, **knobs: Any
    ) -> Iterator[Engine]:
        """An engine with other knobs, over what ``change`` makes of its parts; closed at the end. The knobs
        are not checked again: a probe may go below what a user may."""
        gc.freeze()  # what is there already is not to be searched for garbage at the end
        run = self.plain.run.model_copy(update={"max_context": self.max_context, **knobs})
        parts = change(assemble_on(loaded or self.parts.loaded, run))
        engine = Engine(run.model, run, parts=parts)
        try:
            yield engine
        finally:
            engine.close()
            del engine, parts
            gc.collect()  # an engine's objects know each other: its memory is not to wait for its turn
            gc.unfreeze()


def altered(loaded: Loaded) -> Loaded:
    """The same model with the norm before its first attention scaled: other rows, another weight version."""
    first, *rest = loaded.parameters.blocks
    scaled = replace(first, attn_norm=first.attn_norm * 1.5)
    parameters = replace(loaded.parameters, blocks=(scaled, *rest))
    return replace(loaded, parameters=parameters, weight_version=f"{loaded.weight_version}-altered")
