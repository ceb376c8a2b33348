"""`bittrue verify`: the laws that a checkpoint must obey on this machine, checked through the engine that
serves it."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bittrue.engine.engine import Engine
from bittrue.errors import BittrueError
from bittrue.ops.contracts import CSA_RATIO
from bittrue.probes import cache, crash, drafts, preemption, tiers, together
from bittrue.probes.engines import Engines
from bittrue.probes.laws import LawProbe, Prompt
from bittrue.probes.result import LAWS, LawResult
from bittrue.probes.story import Story, write_story
from bittrue.probes.workload import compare, random_tokens, request_mix, run_alone, run_requests

# Either side of the compression ratios, the window and a page.
SHORT_LENGTHS = (1, 2, 3, 5, 8, 127, 128, 129, 257)
MIXED_REQUESTS = 8
_ANSWERS = 512  # tokens that answers, and turns of a conversation, add to the longest prompt


@dataclass(frozen=True, slots=True)
class Options:
    """``max_tokens`` bounds the longest prompt, ``rounds`` the random variants of each law; ``kills`` of the
    engine process with ``streams`` open."""

    max_tokens: int = 2400
    rounds: int = 2
    seed: int = 0
    threads: tuple[int, ...] = (1, 2)
    laws: tuple[str, ...] = tuple(LAWS)
    kills: int = 3
    streams: int = 8


def selection_length(engine: Engine) -> int:
    """Tokens after which the index leaves rows out: before that, its order is never exercised."""
    return CSA_RATIO * engine.config.index_topk + 67


def probe_lengths(engine: Engine, *, max_tokens: int) -> tuple[int, ...]:
    """Prompt lengths to check, at most ``max_tokens`` each; the longest makes the index choose where it
    can."""
    longest = min(selection_length(engine), max_tokens, engine.max_context)
    return tuple(sorted({min(n, longest) for n in SHORT_LENGTHS} | {longest}))


def verify_laws(engine: Engine, options: Options) -> Iterator[LawResult]:
    """Checks the laws chosen and yields each result as it is known.

    ``engine`` is the plain one: idle, without prefix cache, tiers and drafts.
    """
    assert not engine.run.prefix_cache and engine.run.speculation == "off", (
        "the plain engine takes no fast path"
    )
    room = max(options.max_tokens, 2) + _ANSWERS
    yield from _Verification(Engines(engine, min(engine.max_context, room)), options).results()


@dataclass(slots=True)
class _Verification:
    """One run; what several laws are checked with is made when the first needs it."""

    engines: Engines
    options: Options
    _prompts: tuple[LawProbe, list[Prompt]] | None = field(default=None)
    _story: Story | None = field(default=None)

    def results(self) -> Iterator[LawResult]:
        probes: dict[str, Callable[[], Iterator[LawResult]]] = {
            "L1": self._chunking,
            "L2": self._batching,
            "L3": self._prefix_cache,
            "L4": self._tiers,
            "L5": self._speculation,
            "L6": self._preemption,
            "L7": self._crash,
            "L8": self._threading,
            "L3-L6": self._together,
        }
        for law in self.options.laws:
            yield from _survived(law, probes[law]())

    def _chunking(self) -> Iterator[LawResult]:
        probe, prompts = self._probe()
        return probe.chunking(prompts, rounds=self.options.rounds)

    def _batching(self) -> Iterator[LawResult]:
        probe, prompts = self._probe()
        yield from probe.batching(prompts, rounds=self.options.rounds)
        yield sampled_alone_and_together(self.engines, seed=self.options.seed)

    def _threading(self) -> Iterator[LawResult]:
        probe, prompts = self._probe()
        return probe.threading(prompts, counts=self.options.threads)

    def _prefix_cache(self) -> Iterator[LawResult]:
        options = self.options
        yield from cache.resumed_at_positions(
            self.engines, max_tokens=options.max_tokens, rounds=options.rounds, seed=options.seed
        )
        yield from cache.conversations(self.engines, self._told())

    def _tiers(self) -> Iterator[LawResult]:
        yield from tiers.tiers(self.engines, self._told())
        yield from tiers.offload(self.engines, self._told())

    def _speculation(self) -> Iterator[LawResult]:
        return drafts.speculation(self.engines, rounds=self.options.rounds, seed=self.options.seed)

    def _preemption(self) -> Iterator[LawResult]:
        return preemption.preemption(self.engines, rounds=self.options.rounds, seed=self.options.seed)

    def _crash(self) -> Iterator[LawResult]:
        options = self.options
        return crash.crash(self.engines, kills=options.kills, streams=options.streams, seed=options.seed)

    def _together(self) -> Iterator[LawResult]:
        options = self.options
        return together.together(self.engines, self._told(), rounds=options.rounds, seed=options.seed)

    def _probe(self) -> tuple[LawProbe, list[Prompt]]:
        if self._prompts is None:
            plain, parts = self.engines.plain, self.engines.parts
            probe = LawProbe(
                parts.runner, num_pages=parts.num_pages, num_slots=parts.num_slots, seed=self.options.seed
            )
            lengths = probe_lengths(plain, max_tokens=self.options.max_tokens)
            self._prompts = (probe, probe.random_prompts(lengths))
        return self._prompts

    def _told(self) -> Story:
        if self._story is None:
            plain = self.engines.plain
            longest = min(self.options.max_tokens, cache.replay_length(plain.parts), plain.max_context - 1)
            self._story = write_story(plain, longest=longest, seed=self.options.seed)
        return self._story


def _survived(law: str, results: Iterator[LawResult]) -> Iterator[LawResult]:
    """The results; a failure on the way is one too: no request may end in an error, whatever path it took."""
    try:
        yield from results
    except (BittrueError, AssertionError, ValueError, LookupError, RuntimeError) as error:
        yield LawResult(law, "failed", 0, f"{type(error).__name__}: {error}")


def sampled_alone_and_together(engines: Engines, *, seed: int) -> LawResult:
    """L2 through the scheduler: requests sampled one after the other = all at once, tokens and
    log-probabilities."""
    draw = random.Random(seed)
    parts = engines.parts
    room = engines.max_context - 24
    lengths = [min(draw.choice([1, 3, 40, 130]), room) for _ in range(MIXED_REQUESTS)]
    prompts = [random_tokens(draw, parts, n) for n in lengths]
    requests = request_mix(parts, draw, prompts, max_tokens=24, name="sampled")
    alone = run_alone(engines.plain, requests)
    together = run_requests(engines.plain, requests)
    exercised = {"batched sequences": len(requests)}
    return compare("L2", f"{MIXED_REQUESTS} sampled requests", alone, together, exercised)


def law_numbers(text: str) -> tuple[str, ...]:
    """ "L3,L5" as laws, in their order. Raises ValueError naming what is none."""
    asked = [part.strip().upper() for part in text.split(",") if part.strip()]
    unknown = [part for part in asked if part not in LAWS]
    if unknown or not asked:
        raise ValueError(f"{', '.join(unknown) or 'nothing'} is no law; choose of {', '.join(LAWS)}")
    return tuple(number for number in LAWS if number in asked)


def notes(engine: Engine, options: Options) -> Sequence[str]:
    """What ``options`` leave unexercised on this model, and the remedy."""
    found = []
    selection, replay = selection_length(engine), cache.replay_length(engine.parts)
    if selection > options.max_tokens:
        found.append(
            f"the index of this model leaves rows out only beyond {selection} tokens; raise --max-tokens to "
            "exercise it"
        )
    if replay > options.max_tokens and "L3" in options.laws:
        found.append(
            f"resuming without a snapshot replays some {replay - 130} tokens of this model; L3 is "
            f"inconclusive unless --max-tokens is {replay} or more"
        )
    return found
