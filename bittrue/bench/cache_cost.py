"""What the prefix cache costs where it gains nothing: prefill without hits, and decode steps, over off."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittrue.bench.engines import Model, ask, at_least, greedy
from bittrue.bench.result import Label, Measurement, measured, percentile
from bittrue.bench.timing import REST_S, once
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request

_STEPS = 16  # of one engine before it is the next one's turn
_MARGIN = 64

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CacheCost:
    """Engines without a cache, with one, and with tiers behind it, in turn. Files go to ``folder``."""

    model: Model
    folder: Path
    tell: Tell
    prompt_tokens: int = 4096
    prefills: int = 5
    step_rounds: int = 40
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(prompt_tokens=(self.prompt_tokens, 2), prefills=(self.prefills, 1))
        at_least(step_rounds=(self.step_rounds, 1))

    def run(self) -> Iterator[Measurement]:
        with ExitStack() as stack:
            tiers = {"host_cache": 1 << 30, "cache_dir": str(self.folder), "log_level": "warning"}
            kinds: dict[str, dict[str, Any]] = {
                "off": {"prefix_cache": False},
                "on": {},
                "on, with tiers": tiers,
            }
            context = self.prompt_tokens + _MARGIN + _STEPS * (self.step_rounds + 1)
            engines = {
                name: stack.enter_context(
                    self.model.engine(max_context=context, max_running=8, threads=self.threads, **knobs)
                )
                for name, knobs in kinds.items()
            }
            yield from self._prefill(engines)
            for batch in (1, 8):
                yield from self._decode(engines, batch)

    def _prefill(self, engines: dict[str, Engine]) -> Iterator[Measurement]:
        self.tell(f"prefill of {self.prompt_tokens} tokens, without a hit")
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        order = list(engines)
        for number in range(-1, self.prefills):
            prompt = self.model.prompt(self.prompt_tokens, self.seed, number + 1)
            for name in order:
                engines[name].evict()
                time.sleep(REST_S)
                (answer,) = ask(engines[name], [prompt], greedy(1))
                if number >= 0:
                    seconds[name].append(answer.first_s)
            order.reverse()
        yield from _against_off("prefill without a hit", seconds, {"tokens": self.prompt_tokens})

    def _decode(self, engines: dict[str, Engine], batch: int) -> Iterator[Measurement]:
        """Steps at the same positions of the same texts; a round's seconds are those of its median step."""
        self.tell(f"decode steps, batch {batch}")
        prompts = [self.model.prompt(256, self.seed, batch, i) for i in range(batch)]
        for engine in engines.values():
            for i, prompt in enumerate(prompts):
                params = greedy(_STEPS * (self.step_rounds + 1) + batch)
                engine.add(Request(request_id=f"step-{i}", prompt=prompt, params=params))
            while len(engine.step()) < batch:
                pass  # until all of them decode
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        order = list(engines)
        for _ in range(self.step_rounds):
            for name in order:
                time.sleep(REST_S)
                steps = sorted(once(engines[name].step) for _ in range(_STEPS))
                seconds[name].append(percentile(steps, 0.5))
            order.reverse()
        for engine in engines.values():
            for i in range(batch):
                engine.abort(f"step-{i}")
            engine.step()
        yield from _against_off("decode step", seconds, {"batch": batch})


def _against_off(
    name: str, seconds: dict[str, list[float]], labels: dict[str, Label]
) -> Iterator[Measurement]:
    for kind, values in seconds.items():
        yield measured(name, "s", values, {"cache": kind, **labels})
        if kind != "off":
            shares = [on / off for on, off in zip(values, seconds["off"], strict=True)]
            yield measured(f"{name}, over off", "ratio", shares, {"cache": kind, **labels})
