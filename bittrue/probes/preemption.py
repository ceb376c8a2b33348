"""Checks law L6: never preempted = preempted and resumed at any step."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, TokenEvent
from bittrue.kv.layout import PAGE_TOKENS
from bittrue.probes.engines import Engines, with_pages
from bittrue.probes.result import LawResult
from bittrue.probes.workload import Answers, compare, random_tokens, request_mix, run_alone, run_requests

LENGTHS = (4, 90, 124, 260, 17)
MAX_TOKENS = 24
_HOST_BYTES = 1 << 30


class Preemptor:
    """Preempts between steps: each sequence whenever it has advanced, or as often as ``chance`` says.

    One that has not come further than the last time is let run: preempted at every step, a prompt that is
    computed anew each time would never end.
    """

    def __init__(self, *, chance: float = 1.0, then: Callable[[Engine], object] | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._chance = chance
        self._then = then  # done after a preemption
        self._draw = random.Random(0)
        self._reached: dict[str, int] = {}

    def __call__(self, engine: Engine, events: Sequence[TokenEvent]) -> None:
        going = {p.request_id: p.num_done for p in engine.stats().prefills}
        going |= {e.request_id: 10**9 for e in events if e.token_ids and e.finish_reason is None}
        for name, reached in going.items():
            if reached < 10**9 and reached <= self._reached.get(name, 0):
                continue
            self._reached[name] = reached
            if self._draw.random() < self._chance and engine.preempt(name):
                self.counts["preemptions"] += 1
                self.counts["preemptions in a prompt"] += reached < 10**9
                if self._then is not None:
                    self._then(engine)


def asked(engines: Engines, *, seed: int) -> tuple[list[Request], Answers]:
    parts = engines.parts
    draw = random.Random(seed)
    room = engines.max_context - MAX_TOKENS
    prompts = [random_tokens(draw, parts, min(n, room)) for n in LENGTHS]
    requests = request_mix(parts, draw, prompts, max_tokens=MAX_TOKENS, name="preempted")
    return requests, run_alone(engines.plain, requests)


def preemption(engines: Engines, *, rounds: int, seed: int) -> Iterator[LawResult]:
    """At every step: into the cache, out of main memory, with nothing kept; and for want of memory."""
    requests, plain = asked(engines, seed=seed)
    variants: list[tuple[str, Preemptor, dict[str, Any]]] = [
        ("at every step, to a snapshot", Preemptor(), {}),
        ("at every step, to a snapshot, small steps", Preemptor(), {"max_step_tokens": 7}),
        ("at every step, to main memory", Preemptor(then=Engine.evict), {"host_cache": _HOST_BYTES}),
        ("at every step, nothing kept", Preemptor(), {"prefix_cache": False}),
    ]
    for turn in range(rounds):
        half = Preemptor(chance=0.3, then=Engine.evict if turn % 2 else None)
        variants.append((f"now and then, {turn}", half, {"snapshot_every": 0}))
    for variant, preemptor, knobs in variants:
        with engines.another(**{"prefix_cache": True, "snapshot_every": 128, **knobs}) as engine:
            answers = run_requests(engine, requests, preemptor)
            yield compare("L6", variant, plain, answers, preemptor.counts)
    yield from want_of_memory(engines, requests, plain)


def want_of_memory(engines: Engines, requests: Sequence[Request], plain: Answers) -> Iterator[LawResult]:
    """As many pages as the longest request needs, and one: the others come and go."""
    longest = max(len(r.prompt) + r.params.max_tokens for r in requests)
    pages = -(-longest // PAGE_TOKENS) + 1
    for cached in (True, False):
        with engines.another(with_pages(pages), prefix_cache=cached, max_step_tokens=64) as engine:
            answers = run_requests(engine, requests)
            count = engine.stats().num_preempted_total
            variant = f"{pages} pages for {len(requests)} requests" + (", prefix cache" if cached else "")
            yield compare("L6", variant, plain, answers, {"preemptions from memory": count})
