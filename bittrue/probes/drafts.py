"""Checks law L5: speculation on = off, whatever is drafted."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from torch import Tensor

from bittrue.engine.assembly import Assembly
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, TokenEvent
from bittrue.probes.engines import Change, Engines
from bittrue.probes.result import LawResult
from bittrue.probes.workload import (
    Answers,
    compare,
    random_tokens,
    request_mix,
    run_alone,
    run_requests,
    stopped,
)
from bittrue.spec.proposer import Choose, DraftView

MAX_DRAFT = 8
LENGTHS = (3, 104, 126, 237, 5, 253)  # of prompts: drafts cross the ends of groups and pages
MAX_TOKENS = 40
PATTERNS = ("right", "second", "random", "wrong")  # and "wrong at j", for every place j


@dataclass(frozen=True, slots=True)
class Script:
    """What the plain run drew after a prompt, and the likeliest token it did not draw at each place."""

    num_prompt: int
    tokens: tuple[int, ...]
    seconds: tuple[int, ...]


def scripts_of(requests: Sequence[Request], plain: Answers) -> dict[str, Script]:
    found = {}
    for request in requests:
        entries = plain[request.request_id].entries
        seconds = tuple(next((i for i, _ in e.top if i != e.token_id), e.token_id) for e in entries)
        tokens = plain[request.request_id].tokens
        found[request.request_id] = Script(len(request.prompt), tokens, seconds)
    return found


def patterns_of(length: int) -> tuple[str, ...]:
    return (*PATTERNS, *(f"wrong at {place}" for place in range(length)))


class Adversary:
    """Drafts ``length`` tokens at every step, whether or not that pays, after a known script.

    ``patterns`` are taken in turn: right = what the target will draw; second = what it likes best of the
    others; random; wrong = never right; wrong at j = right but for place j, and right again behind it.
    """

    is_lazy = False

    def __init__(
        self,
        scripts: Mapping[str, Script],
        length: int,
        patterns: Sequence[str],
        *,
        vocab: int,
        seed: int = 0,
    ) -> None:
        self._scripts = scripts
        self._length = length
        self._patterns = patterns
        self._vocab = vocab
        self._draw = random.Random(seed)
        self._turns: Counter[str] = Counter()

    def after_step(
        self, streams: Tensor, views: Sequence[DraftView], choose: Choose
    ) -> list[tuple[int, ...]]:
        return [self._draft(view) for view in views]

    def forget(self, seq_id: str) -> None:
        self._turns.pop(seq_id, None)

    def _draft(self, view: DraftView) -> tuple[int, ...]:
        if view.computed_to != len(view.tokens) - 1:
            return ()  # it prefills
        turn = self._turns[view.seq_id]
        self._turns[view.seq_id] += 1
        script = self._scripts[view.seq_id]
        pattern = self._patterns[(turn + script.num_prompt) % len(self._patterns)]
        first = len(view.tokens) - script.num_prompt
        return tuple(self._token(script, first, place, pattern) for place in range(self._length))

    def _token(self, script: Script, first: int, place: int, pattern: str) -> int:
        at = first + place
        if at >= len(script.tokens) or pattern == "random":
            return self._draw.randrange(self._vocab)
        if pattern == "second":
            return script.seconds[at]
        if pattern in ("wrong", f"wrong at {place}"):
            return (script.tokens[at] + 1) % self._vocab
        return script.tokens[at]


def drafted_by(adversary: Adversary) -> Change:
    def change(parts: Assembly) -> Assembly:
        return replace(parts, proposer=adversary)

    return change


class DraftWatch:
    """Counts what became of drafts, step by step."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._seen: dict[str, tuple[int, int]] = {}

    def __call__(self, engine: Engine, events: Sequence[TokenEvent]) -> None:
        for event in events:
            before = self._seen.get(event.request_id, (0, 0))
            drafted, accepted = event.num_drafted - before[0], event.num_accepted - before[1]
            self._seen[event.request_id] = (event.num_drafted, event.num_accepted)
            self.counts["drafts accepted"] += accepted
            self.counts["drafts rejected"] += drafted - accepted
            if accepted < drafted:
                self.counts[f"drafts rejected at {accepted + 1}"] += 1


def asked(engines: Engines, *, seed: int) -> tuple[list[Request], Answers]:
    """Requests of every kind, some that end at a stop string, and their plain answers."""
    parts = engines.parts
    draw = random.Random(seed)
    room = engines.max_context - MAX_TOKENS
    prompts = [random_tokens(draw, parts, min(n, room)) for n in LENGTHS]
    requests = request_mix(parts, draw, prompts, max_tokens=MAX_TOKENS, name="drafted")
    # A text that repeats: what looking back is for.
    phrase = random_tokens(draw, parts, 9)
    params = msgspec.structs.replace(requests[0].params, logit_bias=dict.fromkeys(phrase[:3], 30.0))
    requests.append(Request(request_id="repeating", prompt=phrase * 4, params=params))
    plain = run_alone(engines.plain, requests)
    stops = [stopped(parts, r, plain[r.request_id].tokens) for r in requests[:2]]
    return [*requests, *stops], plain | run_alone(engines.plain, stops)


def speculation(engines: Engines, *, rounds: int, seed: int) -> Iterator[LawResult]:
    """Every draft length from 1 to 8 with an adversary, then the proposers there are."""
    requests, plain = asked(engines, seed=seed)
    for length in range(1, MAX_DRAFT + 1):
        for turn in range(rounds):
            patterns = list(patterns_of(length))
            random.Random(seed + turn).shuffle(patterns)
            yield adversarial(engines, requests, plain, (length, patterns))
    names = ["ngram", *(["mtp"] if has_draft_module(engines.parts) else [])]
    for name in names:
        with engines.another(speculation=name, max_draft=4, prefix_cache=False) as engine:
            watch = DraftWatch()
            answers = run_requests(engine, requests, watch)
            yield compare("L5", f"drafts by {name}", plain, answers, watch.counts)


def adversarial(
    engines: Engines, requests: Sequence[Request], plain: Answers, how: tuple[int, Sequence[str]]
) -> LawResult:
    """All requests at once under one adversary. ``how``: its length and its patterns."""
    length, patterns = how
    vocab = engines.parts.config.vocab_size
    adversary = Adversary(scripts_of(requests, plain), length, patterns, vocab=vocab)
    knobs: dict[str, Any] = {"speculation": "ngram", "max_draft": length, "prefix_cache": False}
    with engines.another(drafted_by(adversary), **knobs) as engine:
        watch = DraftWatch()
        answers = run_requests(engine, requests, watch)
    shown = patterns[0] if len(patterns) == 1 else "adversarial"
    return compare("L5", f"{length} drafts a step, {shown}", plain, answers, watch.counts)


def has_draft_module(parts: Assembly) -> bool:
    return "mtp.0.e_proj.weight" in parts.loaded.checkpoint.draft_tensors
