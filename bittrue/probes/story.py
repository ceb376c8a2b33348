"""A set of conversations that grow, branch, repeat and are edited in the middle, with their plain answers."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from bittrue.engine.assembly import Assembly
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request
from bittrue.probes.result import LawResult
from bittrue.probes.workload import (
    Answer,
    Answers,
    Between,
    compare,
    random_tokens,
    request_mix,
    run_alone,
    run_requests,
)

_ANSWER = 8  # tokens of an answer
STRANGER = "stranger"  # asks with another salt


@dataclass(frozen=True, slots=True)
class Story:
    """``waves`` are told one after the other, the requests of a wave at once. ``plain``: what the plain
    engine answers to each request, alone."""

    waves: tuple[tuple[Request, ...], ...]
    plain: Answers

    @property
    def longest(self) -> int:
        return max(len(request.prompt) for wave in self.waves for request in wave)

    def tell(
        self,
        engine: Engine,
        between_waves: Callable[[Engine], object] = lambda engine: None,
        between: Between | None = None,
    ) -> Answers:
        answers: Answers = {}
        for wave in self.waves:
            answers |= run_requests(engine, wave, between)
            between_waves(engine)
        return answers

    def first(self, count: int) -> "Story":
        """Its first waves."""
        waves = self.waves[:count]
        names = [request.request_id for wave in waves for request in wave]
        return replace(self, waves=waves, plain={name: self.plain[name] for name in names})

    def without_stranger(self) -> "Story":
        """To be compared where what the stranger asked has been cached for itself."""
        return replace(self, plain={name: x for name, x in self.plain.items() if name != STRANGER})

    def compare(
        self, law: str, variant: str, answers: Mapping[str, Answer], exercised: Mapping[str, int]
    ) -> LawResult:
        """With the plain answers; nor may the stranger have been spared a token by what others cached."""
        result = compare(law, variant, self.plain, answers, exercised)
        spared = answers[STRANGER].num_cached if STRANGER in self.plain else 0
        if spared and result.first_difference is None:
            return replace(result, first_difference=f"{spared} tokens cached for others served another salt")
        return result


def hits(engine: Engine) -> Counter[str]:
    """Tokens that the engine's cache has spared its sequences so far, by where they came from."""
    cache = engine.stats().cache
    found = Counter({f"tokens from {tier}": count for tier, count in cache.hit_tokens.items()})
    found["tokens replayed"] = cache.replayed_tokens
    return found


def write_story(plain: Engine, *, longest: int, seed: int) -> Story:
    """``longest``: tokens of its longest first prompt. The plain engine answers as the story goes."""
    parts = plain.parts
    draw = random.Random(seed)
    lengths = (7, 130, longest)
    prompts = [random_tokens(draw, parts, min(n, longest)) for n in lengths]
    waves: list[tuple[Request, ...]] = []
    answers: Answers = {}
    for turn in range(3):
        room = parts.max_context - _ANSWER
        asked = [prompt[:room] for prompt in prompts]
        wave = request_mix(parts, draw, asked, max_tokens=_ANSWER, name=f"turn-{turn}")
        waves.append(tuple(wave))
        answers |= run_alone(plain, wave)
        prompts = _next_turn(parts, draw, wave, answers)
    # The first words of the longest, to somebody else: nothing of the others' is to be used.
    alike = waves[0][-1]
    stranger = msgspec.structs.replace(alike, request_id=STRANGER, cache_salt=STRANGER)
    answers[STRANGER] = answers[alike.request_id]
    waves[1] = (*waves[1], stranger)
    return Story(tuple(waves), answers)


def told_plainly(engine: Engine, story: Story) -> Story:
    """The same requests with the answers of another plain engine."""
    answers = run_alone(engine, [request for wave in story.waves for request in wave])
    return replace(story, plain=answers)


def _next_turn(
    parts: Assembly, draw: random.Random, wave: Sequence[Request], answers: Answers
) -> list[tuple[int, ...]]:
    """Each conversation goes on; one is asked again, one is edited in its middle, one is cut short."""
    grown = [
        (
            *request.prompt,
            *answers[request.request_id].tokens,
            *random_tokens(draw, parts, draw.choice((1, 5, 33))),
        )
        for request in wave[:3]
    ]
    last = wave[2].prompt
    middle = draw.randrange(len(last))
    edited = (*last[:middle], *random_tokens(draw, parts, 3), *last[middle + 3 :])
    short = last[: draw.randrange(1, len(last) + 1)]
    return [*grown, wave[1].prompt, edited, short]
