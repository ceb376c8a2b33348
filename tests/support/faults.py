"""Faults of the cache and its neighbours, planted by replacing a function; each says which law it breaks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bittrue.engine import assembly
from bittrue.engine import engine as engine_module
from bittrue.engine.runner import Runner
from bittrue.kv.blob import BlobFormat
from bittrue.kv.identity import namespace_digest
from bittrue.kv.layout import PAGE_TOKENS, KVLayout
from bittrue.kv.manager import KVManager
from bittrue.kv.pool import KVPool
from bittrue.model.batch import Segment
from bittrue.ops.contracts import OpTable
from bittrue.ops.recorded import Chosen
from bittrue.ops.ref import index

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """``law``: the one that must be found broken, ``variant``: by a comparison so called."""

    name: str
    law: str
    variant: str
    plant: Plant


def lost_on_a_hit(*parts: str) -> Plant:
    """A resumed sequence gets its state without ``parts``: what stood in the slot before stays there."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        honest = KVPool._copy

        def copy(pool: KVPool, per: str, source: int, target: int) -> None:
            kept = [(t, t[target].clone()) for part, t in pool._parts(per) if part.name in parts]
            honest(pool, per, source, target)
            for tensor, before in kept:
                tensor[target] = before

        patch.setattr(KVPool, "_copy", copy)

    return plant


def wrong_page_mapped(patch: pytest.MonkeyPatch) -> None:
    """The first two pages of a hit change places."""
    honest_admit, honest_pages = KVManager.admit, KVManager.page_ids
    resumed: set[tuple[int, str]] = set()

    def admit(kv: KVManager, seq_id: str, *args: Any, **options: Any) -> Any:
        admission = honest_admit(kv, seq_id, *args, **options)
        resumed.discard((id(kv), seq_id))
        if admission is not None and admission.kept >= 2 * PAGE_TOKENS:
            resumed.add((id(kv), seq_id))
        return admission

    def page_ids(kv: KVManager, seq_id: str) -> tuple[int, ...]:
        pages = honest_pages(kv, seq_id)
        return (pages[1], pages[0], *pages[2:]) if (id(kv), seq_id) in resumed else pages

    patch.setattr(KVManager, "admit", admit)
    patch.setattr(KVManager, "page_ids", page_ids)


def open_page_not_copied(patch: pytest.MonkeyPatch) -> None:
    """The page a resumed sequence writes to next lacks the rows it has already."""
    honest = KVPool._copy

    def copy(pool: KVPool, per: str, source: int, target: int) -> None:
        if per != "page":
            honest(pool, per, source, target)

    patch.setattr(KVPool, "_copy", copy)


def version_missing(patch: pytest.MonkeyPatch) -> None:
    """The key of cached content does not say of which weights it is."""

    def without(facts: dict[str, str], salt: str) -> bytes:
        return namespace_digest({k: v for k, v in facts.items() if k != "weight_version"}, salt)

    patch.setattr(engine_module, "namespace_digest", without)


def salt_missing(patch: pytest.MonkeyPatch) -> None:
    """Nor whose it is."""
    patch.setattr(engine_module, "namespace_digest", lambda facts, salt: namespace_digest(facts, ""))


def not_rolled_back(part: str) -> Plant:
    """What rejected drafts left in one pool stays there when their positions are computed again."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        honest = Runner.forward
        steps: dict[tuple[int, int], tuple[int, int]] = {}  # where the last one of a slot began and ended

        def forward(runner: Runner, segments: Sequence[Segment], chosen: Chosen | None = None) -> Tensor:
            stale = []
            for segment in segments:
                key = (id(runner), segment.slot)
                begin, end = steps.get(key, (0, 0))
                if begin < segment.start < end:
                    stale += [(view, view.clone()) for view in rejected(runner, part, segment, end)]
                steps[key] = (segment.start, segment.start + len(segment.token_ids))
            streams = honest(runner, segments, chosen)
            for view, before in stale:
                view.copy_(before)
            return streams

        patch.setattr(Runner, "forward", forward)

    return plant


def rejected(runner: Runner, part: str, segment: Segment, end: int) -> list[Tensor]:
    """Rows of ``part`` at positions from the segment's start to ``end``, where the step before had ended."""
    views = []
    for cache in runner.caches:
        tensor = getattr(cache, part)
        if tensor is None:
            continue
        for position in range(segment.start, min(end, segment.start + len(segment.token_ids))):
            if part not in ("rows", "keys"):
                views.append(tensor[segment.slot, position % tensor.shape[1]])
                continue
            ratio = PAGE_TOKENS // tensor.shape[1]
            if (position + 1) % ratio == 0:
                page = segment.page_ids[position // PAGE_TOKENS]
                views.append(tensor[page, position % PAGE_TOKENS // ratio])
    return views


def ring_short(part: str, rows: int) -> Plant:
    """One ring of every layer but the first has ``rows`` rows less: one less than drafts need. (Rings of
    windows and frontiers have one to spare.)"""

    def plant(patch: pytest.MonkeyPatch) -> None:
        honest = KVLayout.of.__func__  # type: ignore[attr-defined]

        def of(cls: type[KVLayout], *args: Any, **options: Any) -> KVLayout:
            layout = honest(cls, *args, **options)
            if layout.max_draft <= rows:
                return layout  # what the ops refuse to work on
            first, *rest = layout.layers
            shorter = [
                replace(
                    layer,
                    parts=tuple(
                        replace(p, shape=(p.shape[0] - rows, *p.shape[1:])) if p.name == part else p
                        for p in layer.parts
                    ),
                )
                for layer in rest
            ]
            return replace(layout, layers=(first, *shorter))

        patch.setattr(KVLayout, "of", classmethod(of))

    return plant


def tie_broken_the_other_way(patch: pytest.MonkeyPatch) -> None:
    """A lone row prefers the larger id among entries of equal score."""
    honest = assembly.select

    def select(*args: Any, **options: Any) -> OpTable:
        ops = honest(*args, **options)

        def index_topk(q: Tensor, *rest: Any, **settings: Any) -> Tensor:
            if q.shape[0] > 1:
                return ops.index_topk(q, *rest, **settings)
            sort = torch.sort

            def backwards(scores: Tensor, **how: Any) -> Any:
                found = sort(scores.flip(0), **how)
                return torch.return_types.sort((found.values, len(scores) - 1 - found.indices))

            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(index.torch, "sort", backwards)
                return index.index_topk(q, *rest, **settings)

        return ops.with_ops(index_topk=index_topk)

    patch.setattr(assembly, "select", select)


def checksum_not_compared(patch: pytest.MonkeyPatch) -> None:
    """A file is believed whatever its bytes."""
    patch.setattr(BlobFormat, "is_sound", lambda blob_format, header, payload: True)


FAULTS = (
    Fault("stale window on a hit", "L3", "tokens, full", lost_on_a_hit("window")),
    Fault("wrong page mapped", "L3", "tokens, full", wrong_page_mapped),
    Fault("open page not copied", "L3", "tokens, full", open_page_not_copied),
    Fault("frontier lost: rows", "L3", "tokens, full", lost_on_a_hit("csa")),
    Fault("frontier lost: keys", "L3", "tokens, full", lost_on_a_hit("csa_index")),
    Fault("frontier lost: running pool", "L3", "tokens, full", lost_on_a_hit("hca_fold")),
    Fault("weight version missing from the key", "L4", "other weights", version_missing),
    Fault("salt missing from the key", "L3", "conversations", salt_missing),
    Fault("drafts not rolled back: window", "L5", "adversarial", not_rolled_back("window")),
    Fault("drafts not rolled back: frontier", "L5", "adversarial", not_rolled_back("csa")),
    Fault("drafts not rolled back: frontier of keys", "L5", "adversarial", not_rolled_back("csa_index")),
    Fault("drafts not rolled back: rows", "L5", "adversarial", not_rolled_back("rows")),
    Fault("drafts not rolled back: keys", "L5", "adversarial", not_rolled_back("keys")),
    Fault("drafts not rolled back: pending", "L5", "adversarial", not_rolled_back("hca_pending")),
    Fault("ring one row short: window", "L5", "adversarial", ring_short("window", 2)),
    Fault("ring one row short: frontier", "L5", "adversarial", ring_short("csa", 2)),
    Fault("ring one row short: pending", "L5", "adversarial", ring_short("hca_pending", 1)),
    Fault("tie broken the other way", "L1", "one by one", tie_broken_the_other_way),
    Fault("disk byte flipped, checksum not compared", "L4", "flipped", checksum_not_compared),
)
