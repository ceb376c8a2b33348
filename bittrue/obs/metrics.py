"""The one table of metric names, as Prometheus collectors on a registry of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from bittrue.obs.resident import Resident

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One row of the table: counters get ``_total`` appended, histograms ``_bucket`` and so on."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS = (
    MetricSpec(
        "bittrue_requests", "counter", "HTTP requests by endpoint and status.", ("endpoint", "status")
    ),
    MetricSpec("bittrue_sequences", "counter", "Sequences ended, by finish reason.", ("finish_reason",)),
    MetricSpec("bittrue_prompt_tokens", "counter", "Prompt tokens of sequences that produced a first event."),
    MetricSpec(
        "bittrue_prefill_tokens", "counter", "Known tokens computed: prompts, and what preemption lost."
    ),
    MetricSpec("bittrue_prefill_tokens_done", "gauge", "Tokens computed of the prefills that run."),
    MetricSpec(
        "bittrue_prefill_tokens_remaining", "gauge", "Tokens the prefills that run have to compute yet."
    ),
    MetricSpec("bittrue_cached_tokens", "counter", "Prompt tokens taken from the prefix cache."),
    MetricSpec("bittrue_generated_tokens", "counter", "Tokens generated."),
    MetricSpec("bittrue_queue_seconds", "histogram", "Arrival in the engine to the first step."),
    MetricSpec("bittrue_time_to_first_token_seconds", "histogram", "Request received to first token."),
    MetricSpec("bittrue_inter_token_seconds", "histogram", "Time between two tokens of a sequence."),
    MetricSpec("bittrue_request_seconds", "histogram", "Submission of a sequence to its end."),
    MetricSpec("bittrue_tokenize_seconds", "histogram", "Messages or text to token ids."),
    MetricSpec("bittrue_unfinished_sequences", "gauge", "Sequences in the token journal."),
    MetricSpec("bittrue_running_sequences", "gauge", "Sequences running in the engine."),
    MetricSpec("bittrue_waiting_sequences", "gauge", "Sequences waiting in the engine."),
    MetricSpec("bittrue_preempted", "counter", "Sequences preempted because memory ran out."),
    MetricSpec("bittrue_engine_steps", "counter", "Engine steps."),
    MetricSpec("bittrue_engine_restarts", "counter", "Restarts of the engine process."),
    MetricSpec("bittrue_engine_up", "gauge", "1 while there is an engine process, 0 while there is none."),
    MetricSpec("bittrue_poison_requests", "counter", "Requests given up because the engine died of them."),
    MetricSpec("bittrue_kept_responses", "gauge", "Ended responses that can be fetched again."),
    MetricSpec("bittrue_kept_response_bytes", "gauge", "Bytes of their bodies."),
    MetricSpec("bittrue_journal_bytes", "gauge", "Bytes of the segments in journal_dir."),
    MetricSpec("bittrue_journal_errors", "counter", "Times the journal could not be written."),
    MetricSpec("bittrue_cache_lookup_tokens", "counter", "Known tokens of sequences when admitted."),
    MetricSpec(
        "bittrue_cache_hit_tokens",
        "counter",
        "Of them, those not computed again, by where the state was: device, host, disk, or replay.",
        ("tier",),
    ),
    MetricSpec(
        "bittrue_cache_replayed_tokens", "counter", "Tokens replayed against stored rows to rebuild a state."
    ),
    MetricSpec("bittrue_cache_evicted_pages", "counter", "Cached pages evicted from the device."),
    MetricSpec("bittrue_cache_evicted_snapshots", "counter", "Snapshots evicted from the device."),
    MetricSpec("bittrue_cache_tier_bytes", "gauge", "Bytes of cached prefixes, by tier.", ("tier",)),
    MetricSpec(
        "bittrue_cache_tier_events",
        "counter",
        "What host and disk did: saved, hit, evicted, corrupt and so on.",
        ("tier", "event"),
    ),
    MetricSpec("bittrue_drafted", "counter", "Draft tokens, by place in their step (1 = first).", ("place",)),
    MetricSpec("bittrue_draft_accepted", "counter", "Draft tokens that became output, by place.", ("place",)),
    MetricSpec("bittrue_canary_faults", "counter", "Reads of cached content that failed their check."),
    MetricSpec("bittrue_pages", "gauge", "KV pages; free + held + cached = total.", ("state",)),
    MetricSpec(
        "bittrue_state_slots", "gauge", "State slots, likewise; cached ones are snapshots.", ("state",)
    ),
    MetricSpec(
        "bittrue_memory_bytes", "gauge", "The engine's memory ledger: what it may come to hold.", ("kind",)
    ),
    MetricSpec(
        "bittrue_resident_bytes",
        "gauge",
        "Memory resident now: pages of mapped files (weights, libraries), and the process's own.",
        ("process", "pages"),
    ),
)


class PrefillNumbers(Protocol):
    """How far one sequence's prefill is."""

    @property
    def num_done(self) -> int: ...
    @property
    def num_total(self) -> int: ...


class CacheNumbers(Protocol):
    """The fields of engine.types.CacheCounters."""

    @property
    def lookup_tokens(self) -> int: ...
    @property
    def hit_tokens(self) -> Mapping[str, int]: ...
    @property
    def replayed_tokens(self) -> int: ...
    @property
    def evicted_pages(self) -> int: ...
    @property
    def evicted_snapshots(self) -> int: ...
    @property
    def tier_bytes(self) -> Mapping[str, int]: ...
    @property
    def tier_events(self) -> Mapping[str, int]: ...


class DraftNumbers(Protocol):
    """The fields of engine.types.DraftCounters."""

    @property
    def drafted_at(self) -> Sequence[int]: ...
    @property
    def accepted_at(self) -> Sequence[int]: ...


class EngineNumbers(Protocol):
    """What ``Metrics.update_engine`` reads: the fields of engine.types.EngineStats."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_preempted_total(self) -> int: ...
    @property
    def num_steps_total(self) -> int: ...
    @property
    def num_prefill_tokens_total(self) -> int: ...
    @property
    def prefills(self) -> Sequence[PrefillNumbers]: ...
    @property
    def pages_total(self) -> int: ...
    @property
    def pages_free(self) -> int: ...
    @property
    def pages_held(self) -> int: ...
    @property
    def pages_cached(self) -> int: ...
    @property
    def slots_total(self) -> int: ...
    @property
    def slots_free(self) -> int: ...
    @property
    def slots_held(self) -> int: ...
    @property
    def slots_cached(self) -> int: ...
    @property
    def num_canary_faults_total(self) -> int: ...
    @property
    def cache(self) -> CacheNumbers: ...
    @property
    def drafts(self) -> DraftNumbers: ...


@dataclass(slots=True)
class Metrics:
    """Every collector of METRICS, by name. One instance per server."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    counters: dict[str, Counter] = field(init=False, default_factory=dict)
    gauges: dict[str, Gauge] = field(init=False, default_factory=dict)
    histograms: dict[str, Histogram] = field(init=False, default_factory=dict)
    _last_totals: dict[tuple[str, ...], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for spec in METRICS:
            if spec.kind == "counter":
                self.counters[spec.name] = Counter(spec.name, spec.help, spec.labels, registry=self.registry)
            elif spec.kind == "gauge":
                self.gauges[spec.name] = Gauge(spec.name, spec.help, spec.labels, registry=self.registry)
            else:
                self.histograms[spec.name] = Histogram(
                    spec.name, spec.help, spec.labels, registry=self.registry, buckets=_LATENCY_S
                )

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        counter = self.counters[name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        gauge = self.gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def update_engine(self, stats: EngineNumbers) -> None:
        """Takes over the engine's numbers. Totals go on over ``engine_changed``."""
        self.set("bittrue_running_sequences", stats.num_running)
        self.set("bittrue_waiting_sequences", stats.num_waiting)
        for state, pages, slots in (
            ("free", stats.pages_free, stats.slots_free),
            ("held", stats.pages_held, stats.slots_held),
            ("cached", stats.pages_cached, stats.slots_cached),
            ("total", stats.pages_total, stats.slots_total),
        ):
            self.set("bittrue_pages", pages, state=state)
            self.set("bittrue_state_slots", slots, state=state)
        done = sum(prefill.num_done for prefill in stats.prefills)
        self.set("bittrue_prefill_tokens_done", done)
        self.set("bittrue_prefill_tokens_remaining", sum(p.num_total for p in stats.prefills) - done)
        self._add_total("bittrue_prefill_tokens", stats.num_prefill_tokens_total)
        self._add_total("bittrue_preempted", stats.num_preempted_total)
        self._add_total("bittrue_engine_steps", stats.num_steps_total)
        self._add_total("bittrue_canary_faults", stats.num_canary_faults_total)
        self._update_cache(stats.cache)
        for name, totals in (
            ("bittrue_drafted", stats.drafts.drafted_at),
            ("bittrue_draft_accepted", stats.drafts.accepted_at),
        ):
            for place, total in enumerate(totals, start=1):
                self._add_total(name, total, place=str(place))

    def _update_cache(self, cache: CacheNumbers) -> None:
        for tier, num_bytes in cache.tier_bytes.items():
            self.set("bittrue_cache_tier_bytes", num_bytes, tier=tier)
        self._add_total("bittrue_cache_lookup_tokens", cache.lookup_tokens)
        self._add_total("bittrue_cache_replayed_tokens", cache.replayed_tokens)
        self._add_total("bittrue_cache_evicted_pages", cache.evicted_pages)
        self._add_total("bittrue_cache_evicted_snapshots", cache.evicted_snapshots)
        for tier, total in cache.hit_tokens.items():
            self._add_total("bittrue_cache_hit_tokens", total, tier=tier)
        for name, total in cache.tier_events.items():
            tier, _, event = name.partition(".")
            self._add_total("bittrue_cache_tier_events", total, tier=tier, event=event)

    def engine_changed(self) -> None:
        """The numbers to come are a new engine's, whose totals began at zero."""
        self._last_totals.clear()

    def update_memory(self, ledger: Mapping[str, int], now: Mapping[str, Resident | None]) -> None:
        """Takes over the engine's ledger, and what is resident by process: nothing of one that has gone."""
        for kind, num_bytes in ledger.items():
            self.set("bittrue_memory_bytes", num_bytes, kind=kind)
        for process, held in now.items():
            for pages, num_bytes in (
                ("file", held.file_bytes if held else 0),
                ("own", held.own_bytes if held else 0),
            ):
                self.set("bittrue_resident_bytes", num_bytes, process=process, pages=pages)

    def _add_total(self, name: str, total: int, **labels: str) -> None:
        key = (name, *labels.values())
        self.count(name, total - self._last_totals.get(key, 0), **labels)
        self._last_totals[key] = total

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
