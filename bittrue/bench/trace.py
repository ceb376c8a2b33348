"""Arrival traces: which request is sent when, the same for the same arguments on every machine."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bittrue.errors import UsageError

TraceKind = Literal["closed", "poisson", "burst"]
FIRST_ID = 10  # lower ids are markers in most vocabularies


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a server.

    closed: ``concurrency`` requests are open at any time, the next is sent when one ends.
    poisson: ``rate`` requests a second on average, independent of each other and of the answers.
    burst: groups of ``concurrency`` at once, spaced so that the mean is ``rate``.
    """

    kind: TraceKind = "closed"
    requests: int = 32
    concurrency: int = 8
    rate: float = 1.0  # requests per second
    prompt_tokens: int = 256
    output_tokens: int = 64
    spread: float = 0.0  # lengths are uniform in (1 - spread) .. (1 + spread) times the above
    vocab: int = 1000  # prompt token ids are below this
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency", "prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.rate > 0:
            raise UsageError(f"rate is {self.rate}; it must be above 0")
        if not 0 <= self.spread < 1:
            raise UsageError(f"spread is {self.spread}; it must be at least 0 and below 1")
        if self.vocab <= FIRST_ID:
            raise UsageError(f"vocab is {self.vocab}; it must be above {FIRST_ID}")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it is sent (seconds from the start; 0 in a closed trace) and what it asks."""

    at_s: float
    prompt: tuple[int, ...]  # token ids
    output_tokens: int


def make_trace(load: Load) -> tuple[Arrival, ...]:
    """The requests of a load, in order of sending."""
    source = np.random.Generator(np.random.PCG64(load.seed))
    times = _times(load, source)
    arrivals = []
    for at_s in times:
        prompt_tokens = _length(load.prompt_tokens, load.spread, source)
        output_tokens = _length(load.output_tokens, load.spread, source)
        prompt = tuple(source.integers(FIRST_ID, load.vocab, prompt_tokens).tolist())
        arrivals.append(Arrival(at_s, prompt, output_tokens))
    return tuple(arrivals)


def _times(load: Load, source: np.random.Generator) -> list[float]:
    if load.kind == "closed":
        return [0.0] * load.requests
    if load.kind == "burst":
        return [i // load.concurrency * (load.concurrency / load.rate) for i in range(load.requests)]
    # The first arrives at once: the clock starts with it.
    gaps = source.exponential(1 / load.rate, load.requests - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def _length(mean: int, spread: float, source: np.random.Generator) -> int:
    return max(1, round(mean * (1 + spread * source.uniform(-1, 1))))
