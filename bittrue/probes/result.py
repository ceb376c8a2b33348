"""What the probes of a law found: comparisons, what they exercised, and the verdict that follows."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

Verdict = Literal["holds", "broken", "inconclusive"]


@dataclass(frozen=True, slots=True)
class LawResult:
    """One comparison of a fast path with the plain run. ``law`` is its number, as L3.

    ``exercised`` counts what the fast path really did (tokens from each tier, drafts rejected by place, ...):
    a comparison that took no fast path proves nothing.
    """

    law: str
    variant: str
    num_positions: int
    first_difference: str | None
    exercised: Mapping[str, int] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.first_difference is None and self.num_positions > 0


@dataclass(frozen=True, slots=True)
class Law:
    """A law, and what must have been exercised before it can be said to hold."""

    number: str
    name: str
    needs: tuple[str, ...]


LAWS: Mapping[str, Law] = {
    law.number: law
    for law in (
        Law("L1", "chunking", ("chunks",)),
        Law("L2", "batching", ("batched sequences",)),
        Law(
            "L3",
            "prefix cache",
            ("resumed, full", "resumed, periodic", "resumed, recompute", "tokens from device"),
        ),
        Law(
            "L4",
            "tiers",
            (
                "tokens from host",
                "tokens from disk",
                "tokens from disk after a restart",
                "flipped files missed",
                "steps with rows off memory",
            ),
        ),
        Law("L5", "speculation", ("drafts accepted", "drafts rejected at 1", "drafts rejected at 8")),
        Law("L6", "preemption", ("preemptions", "preemptions from memory")),
        Law("L7", "crash", ("kills",)),
        Law("L8", "threads", ("thread counts",)),
        Law(
            "L3-L6",
            "all at once",
            (
                "tokens resumed",
                "drafts accepted",
                "drafts rejected",
                "preemptions",
                "steps with rows off memory",
            ),
        ),
    )
}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What all comparisons of one law say together. ``missing``: what should have been exercised."""

    law: str
    name: str
    variants: int
    positions: int
    exercised: dict[str, int]
    missing: tuple[str, ...]
    first_difference: str | None
    verdict: Verdict


def summary(results: Iterable[LawResult]) -> list[Row]:
    """One row per law that was probed, in the order of LAWS."""
    by_law: dict[str, list[LawResult]] = {number: [] for number in LAWS}
    for result in results:
        by_law[result.law].append(result)
    return [_row(LAWS[number], found) for number, found in by_law.items() if found]


def _row(law: Law, results: Sequence[LawResult]) -> Row:
    exercised: Counter[str] = Counter()
    for result in results:
        exercised.update(result.exercised)
    missing = tuple(need for need in law.needs if exercised[need] == 0)
    broken = next((r for r in results if r.first_difference is not None), None)
    empty = next((r.variant for r in results if r.num_positions == 0), None)
    if empty is not None:
        missing = (*missing, f"positions in: {empty}")
    return Row(
        law=law.number,
        name=law.name,
        variants=len(results),
        positions=sum(r.num_positions for r in results),
        exercised={key: count for key, count in sorted(exercised.items()) if count},
        missing=missing,
        first_difference=None if broken is None else f"{broken.variant}: {broken.first_difference}",
        verdict="broken" if broken is not None else "inconclusive" if missing else "holds",
    )


def overall(rows: Sequence[Row]) -> Verdict:
    """Broken if one is; else inconclusive if one is, or there is none."""
    verdicts = {row.verdict for row in rows}
    if "broken" in verdicts:
        return "broken"
    return "inconclusive" if "inconclusive" in verdicts or not rows else "holds"
