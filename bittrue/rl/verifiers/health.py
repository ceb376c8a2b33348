"""How the verifiers of a run are doing, as a value."""

import math
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bittrue.rl.verifiers.verifier import OUTCOMES, Outcome, Verdict

_LATENCIES = 4096  # kept per kind: percentiles are of the latest


@dataclass(frozen=True, slots=True)
class KindHealth:
    """Of the verifiers of one kind since the pool began: verdicts by outcome, how many came from the cache,
    and seconds of the latest that were judged (None before the first)."""

    outcomes: Mapping[Outcome, int]
    cached: int
    p50_seconds: float | None
    p99_seconds: float | None

    @property
    def timeouts(self) -> int:
        return self.outcomes["timeout"]


@dataclass(frozen=True, slots=True)
class Health:
    """Of a pool. ``restarts``: workers started in the place of one that was killed or died."""

    total: KindHealth
    kinds: Mapping[str, KindHealth]
    workers_started: int
    restarts: int


@dataclass(slots=True)
class _Tally:
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    cached: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))


class HealthRecord:
    """Counts verdicts and workers; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tallies: dict[str, _Tally] = {}
        self._started = self._restarts = 0

    def add(self, kind: str, verdict: Verdict) -> None:
        with self._lock:
            tally = self._tallies.setdefault(kind, _Tally())
            tally.outcomes[verdict.outcome] += 1
            if verdict.is_cached:
                tally.cached += 1
            else:
                tally.seconds.append(verdict.seconds)

    def worker_started(self, *, is_restart: bool) -> None:
        with self._lock:
            self._started += 1
            self._restarts += is_restart

    def read(self) -> Health:
        with self._lock:
            kinds = {kind: _health([tally]) for kind, tally in sorted(self._tallies.items())}
            return Health(_health(list(self._tallies.values())), kinds, self._started, self._restarts)


def _health(tallies: Sequence[_Tally]) -> KindHealth:
    seconds = sorted(value for tally in tallies for value in tally.seconds)
    return KindHealth(
        outcomes={outcome: sum(tally.outcomes[outcome] for tally in tallies) for outcome in OUTCOMES},
        cached=sum(tally.cached for tally in tallies),
        p50_seconds=_percentile(seconds, 0.50),
        p99_seconds=_percentile(seconds, 0.99),
    )


def _percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that ``share`` of all do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
