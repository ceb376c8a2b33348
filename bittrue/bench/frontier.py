"""Speed and memory against context: prefill up to each, decode at it, resident bytes beside the ledger.

The decode steps of all contexts are timed in turn, in rounds, so that their ratio does not hang on how busy
the machine was in one minute or another.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bittrue.bench.floor import decode_floor
from bittrue.bench.image import SequenceImage, capture, place, random_image
from bittrue.bench.result import Label, Measurement, measured, percentile
from bittrue.bench.timing import once
from bittrue.config.formats import ceil_div
from bittrue.config.model import ModelConfig
from bittrue.config.run import RunConfig
from bittrue.engine.assembly import numerics
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams, TokenEvent
from bittrue.errors import UsageError
from bittrue.kv.layout import KVLayout, pages_for
from bittrue.obs.resident import resident

WARM_STEPS = 2  # after a placement, not timed: the first step finds cold caches
_MAX_PREFILLS = 5
_LAST_STEPS = 8  # the steps that stand for the speed at the end of a prefill
_REFERENCE_CONTEXT = 4096  # decode elsewhere is compared with decode here

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Frontier:
    """What to measure. Contexts above ``max_real_prefill`` tokens are filled with random rows."""

    contexts: tuple[int, ...]
    batch: int = 1
    max_real_prefill: int = 131072
    rounds: int = 5
    steps: int = 8  # timed decode steps of a context in one round
    prefill_seconds: float = 10.0  # a prefill is repeated (at most 5 times) while all fit in this
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts or min(self.contexts) < 1:
            raise UsageError("contexts are token counts of 1 or more, and at least one is needed")
        for name in ("batch", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.max_real_prefill < 0:
            raise UsageError(f"max_real_prefill is {self.max_real_prefill}; it must be 0 or more")

    @property
    def margin(self) -> int:
        """Tokens a sequence generates at most."""
        return WARM_STEPS + self.steps + 1


def engine_config(model: Path, frontier: Frontier, **knobs: object) -> RunConfig:
    """A run whose KV memory holds ``batch`` sequences of the longest context, and no more."""
    config = ModelConfig.from_file(model / "config.json")
    longest = max(frontier.contexts) + 1 + frontier.margin
    draft = RunConfig.model_validate(
        # Images are placed, not computed: nothing of them belongs in a cache.
        {
            **knobs,
            "model": str(model),
            "max_context": longest,
            "max_running": frontier.batch,
            "prefix_cache": False,
        }
    )
    level, act = numerics(draft, config)
    layout = KVLayout.of(config, level=level, act=act)
    wanted = (frontier.batch * pages_for(longest), frontier.batch)
    budget = layout.pool_bytes(*wanted)
    while layout.fit(budget, max_sequences=frontier.batch, max_context=longest) < wanted:
        budget += budget // 8
    return draft.model_copy(update={"kv_memory": budget})


@dataclass(slots=True)
class OpSeconds:
    """Seconds of each op in every one of some steps; ``rest`` is what a step took outside of its ops."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def timed(self, engine: Engine, step: Callable[[], object]) -> float:
        """Runs a step of the engine and returns its seconds."""
        with engine.parts.runner.trace() as times:
            seconds = once(step)
        self.steps.append({**times.seconds, "rest": max(0.0, seconds - times.total_s)})
        return seconds

    def measurements(self, of: str, labels: Mapping[str, Label]) -> Iterator[Measurement]:
        """One per op, the longest first."""
        by_op = {op: [step.get(op, 0.0) for step in self.steps] for step in self.steps for op in step}
        for op in sorted(by_op, key=lambda op: -_median(by_op[op])):
            yield measured(f"{of}, by op", "s", by_op[op], {**labels, "op": op})


@dataclass(frozen=True, slots=True)
class _Prefill:
    image: SequenceImage
    seconds: float
    last_speed: float  # tokens/s of the last steps
    last_ops: "OpSeconds"


@dataclass(slots=True)
class FrontierBench:
    """One run over one idle engine. ``tell`` is called with a line when something begins."""

    engine: Engine
    frontier: Frontier
    tell: Tell
    images: dict[int, list[SequenceImage]] = field(default_factory=dict)

    def run(self) -> Iterator[Measurement]:
        contexts = sorted(set(self.frontier.contexts))
        for context in contexts:
            yield from self._prepare(context)
            yield from self._memory(context)
        yield from self._decode(contexts)
        for context in contexts:
            yield from self._where_decode_goes(context)

    # ---- prefill -----------------------------------------------------------------------------------------

    def _prepare(self, context: int) -> Iterator[Measurement]:
        """Images of ``batch`` sequences at ``context``; real prefills give the speed on the way."""
        frontier = self.frontier
        prompts = [self._prompt(context, i) for i in range(frontier.batch)]
        if context > frontier.max_real_prefill:
            self.tell(f"{context} tokens: filling the cache with random rows")
            image = random_image(self.engine, (*prompts[0], 0), seed=frontier.seed)
            self.images[context] = [image] * frontier.batch
            return
        self.tell(f"{context} tokens: prefill")
        runs = [self._prefill(prompt) for prompt in prompts]
        self.images[context] = [run.image for run in runs]
        left_s = frontier.prefill_seconds - sum(run.seconds for run in runs)
        while len(runs) < _MAX_PREFILLS and left_s > runs[-1].seconds:
            runs.append(self._prefill(prompts[0]))
            left_s -= runs[-1].seconds
        labels: dict[str, Label] = {"context": context, "filled": False}
        yield measured("prefill", "tokens/s", [context / run.seconds for run in runs], labels)
        yield measured("prefill, last steps", "tokens/s", [run.last_speed for run in runs], labels)
        yield from runs[-1].last_ops.measurements("prefill, last steps", labels)

    def _prefill(self, prompt: tuple[int, ...]) -> "_Prefill":
        """One sequence, alone, from nothing to its first token."""
        engine, name = self.engine, "prefill"
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        engine.add(Request(request_id=name, prompt=prompt, params=params))
        num_before = max(0, ceil_div(len(prompt), engine.run.max_step_tokens) - _LAST_STEPS)
        before = [once(engine.step) for _ in range(num_before)]
        last, ops = [], OpSeconds()
        events: list[TokenEvent] = []
        while not events:
            last.append(ops.timed(engine, lambda: events.extend(engine.step())))
        image = capture(engine, name)
        self._clear([name])
        last_tokens = len(prompt) - num_before * engine.run.max_step_tokens
        return _Prefill(image, sum(before) + sum(last), last_tokens / sum(last), ops)

    def _prompt(self, num_tokens: int, index: int) -> tuple[int, ...]:
        vocab = self.engine.config.vocab_size
        source = np.random.Generator(np.random.PCG64((self.frontier.seed, num_tokens, index)))
        ids = list(range(vocab))  # equal ids are one object: a long prompt costs 8 bytes a token, not 36
        return tuple(ids[i] for i in source.integers(0, vocab, num_tokens))

    # ---- memory ------------------------------------------------------------------------------------------

    def _memory(self, context: int) -> Iterator[Measurement]:
        """Resident bytes while ``batch`` sequences decode at ``context``, and their share of what the ledger
        says with only the held pages and slots counted.

        Contexts come in ascending order, so no page is resident that the present sequences do not hold.
        """
        names = self._place(context)
        for _ in range(WARM_STEPS):
            self.engine.step()
        now, stats = resident(os.getpid()), self.engine.stats()
        self._clear(names)
        if now is None:
            self.tell("this system does not tell what is resident")
            return
        parts = self.engine.parts
        empty = parts.ledger.total - parts.layout.pool_bytes(parts.num_pages, parts.num_slots)
        expected = empty + parts.layout.pool_bytes(stats.pages_held, stats.slots_held)
        # The images are the benchmark's own.
        images = {id(image): image.num_bytes for each in self.images.values() for image in each}
        held = now.bytes - sum(images.values())
        filled = self.images[context][0].is_filled
        labels: dict[str, Label] = {"context": context, "batch": self.frontier.batch, "filled": filled}
        detail: dict[str, Label] = {"file_bytes": now.file_bytes, "ledger_bytes": expected}
        yield measured("resident", "bytes", [held], {**labels, **detail})
        yield measured("resident over ledger", "ratio", [held / expected], labels)

    # ---- decode ------------------------------------------------------------------------------------------

    def _decode(self, contexts: Sequence[int]) -> Iterator[Measurement]:
        frontier = self.frontier
        rounds: dict[int, list[list[float]]] = {context: [] for context in contexts}
        order = list(contexts)
        for number in range(frontier.rounds):
            self.tell(f"decode, round {number + 1} of {frontier.rounds}")
            for context in order:
                rounds[context].append(self._time_steps(context))
            order.reverse()
        for context in contexts:
            steps = [step for each in rounds[context] for step in each]
            filled = self.images[context][0].is_filled
            labels: dict[str, Label] = {"context": context, "batch": frontier.batch, "filled": filled}
            num_bytes, flops = decode_floor(self.engine, context, frontier.batch)
            yield measured("decode step", "s", steps, labels, num_bytes=num_bytes, flops=flops)
            yield measured("decode", "tokens/s", [frontier.batch / step for step in steps], labels)
            if _REFERENCE_CONTEXT in rounds and context != _REFERENCE_CONTEXT:
                pairs = zip(rounds[_REFERENCE_CONTEXT], rounds[context], strict=True)
                shares = [_median(reference) / _median(here) for reference, here in pairs]
                yield measured("decode over decode at 4096", "ratio", shares, labels)

    def _time_steps(self, context: int) -> list[float]:
        """Seconds of each timed decode step of one round."""
        names = self._place(context)
        for _ in range(WARM_STEPS):
            self.engine.step()
        seconds = [once(self.engine.step) for _ in range(self.frontier.steps)]
        self._clear(names)
        return seconds

    def _where_decode_goes(self, context: int) -> Iterator[Measurement]:
        """Seconds of a decode step by op, in steps of their own: the clocks between the ops take time too."""
        names = self._place(context)
        for _ in range(WARM_STEPS):
            self.engine.step()
        ops = OpSeconds()
        for _ in range(self.frontier.steps):
            ops.timed(self.engine, self.engine.step)
        self._clear(names)
        yield from ops.measurements("decode step", {"context": context, "batch": self.frontier.batch})

    def _place(self, context: int) -> list[str]:
        return place(self.engine, self.images[context], max_tokens=self.frontier.margin)

    def _clear(self, names: Sequence[str]) -> None:
        for name in names:
            self.engine.abort(name)
        self.engine.step()  # takes the events of the aborts
        self.engine.check()


def _median(values: Sequence[float]) -> float:
    return percentile(sorted(values), 0.5)
