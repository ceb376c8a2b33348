"""Requests of every kind, what an engine answers to them, and the comparison of two such answers."""

import random
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from bittrue.engine.assembly import Assembly
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams, TokenEvent, TokenLogprob
from bittrue.probes.result import LawResult
from bittrue.text.grammar import GrammarCompiler
from bittrue.text.messages import ResponseFormat

# Of each token drawn, the log-probabilities of so many likeliest tokens are compared beside its own.
MOST_LOGPROBS = 128

# Called after a step with what it gave.
Between = Callable[[Engine, Sequence[TokenEvent]], None]


@dataclass(slots=True)
class Answer:
    """All that the events of one request said."""

    entries: list[TokenLogprob] = field(default_factory=list)
    end: tuple[object, ...] | None = None
    num_cached: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(entry.token_id for entry in self.entries)

    def take(self, event: TokenEvent) -> None:
        assert self.end is None, f"{event.request_id} had an event after its last"
        assert len(event.logprobs) == len(event.token_ids), "a token came without its log-probabilities"
        self.entries += event.logprobs
        self.num_cached = event.num_cached_tokens
        if event.finish_reason is not None:
            self.end = (event.finish_reason, event.stop_match, event.error)


Answers = dict[str, Answer]


def run_requests(engine: Engine, requests: Sequence[Request], between: Between | None = None) -> Answers:
    """Runs all ``requests`` at once. ``between`` may do what is done between two steps."""
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        events = engine.step()
        for event in events:
            answers[event.request_id].take(event)
        if between is not None:
            between(engine, events)
            engine.check()
    engine.check()
    return answers


def run_alone(engine: Engine, requests: Iterable[Request]) -> Answers:
    """The plain run: one request after the other."""
    answers: Answers = {}
    for request in requests:
        answers |= run_requests(engine, [request])
    return answers


def difference(plain: Answers, fast: Mapping[str, Answer]) -> str | None:
    """The first thing in ``fast`` that is not, bit for bit, what the plain run has; in words."""
    for name, want in plain.items():
        got = fast[name]
        for place, (a, b) in enumerate(zip(want.entries, got.entries, strict=False)):
            if _bits(a) != _bits(b):
                return f"{name}, generated token {place}: {_shown(a, b)}"
        if (len(want.entries), want.end) != (len(got.entries), got.end):
            ends = [f"{len(x.entries)} tokens, {x.end}" for x in (want, got)]
            return f"{name}: {ends[0]} in the plain run, {ends[1]} here"
    return None


def _bits(entry: TokenLogprob) -> tuple[int, bytes, tuple[int, ...]]:
    values = [entry.logprob, *(value for _, value in entry.top)]
    return entry.token_id, struct.pack(f"{len(values)}d", *values), tuple(i for i, _ in entry.top)


def _shown(want: TokenLogprob, got: TokenLogprob) -> str:
    if (want.token_id, want.logprob) != (got.token_id, got.logprob):
        left, right = (f"token {x.token_id}, log-probability {x.logprob!r}" for x in (want, got))
        return f"{left} in the plain run, {right} here"
    at = next(i for i, (a, b) in enumerate(zip(want.top, got.top, strict=False)) if a != b)
    return f"of its rivals, number {at} is {want.top[at]} in the plain run, {got.top[at]} here"


def compare(
    law: str,
    variant: str,
    plain: Answers,
    fast: Mapping[str, Answer],
    exercised: Mapping[str, int] | None = None,
) -> LawResult:
    """Bit for bit: tokens, log-probabilities of them and of their rivals, and how each answer ended."""
    positions = sum(len(answer.entries) for answer in plain.values())
    return LawResult(law, variant, positions, difference(plain, fast), exercised or {})


# ---- what is asked ---------------------------------------------------------------------------------------


def logprobs_of(parts: Assembly) -> int:
    return min(MOST_LOGPROBS, parts.config.vocab_size)


def random_tokens(draw: random.Random, parts: Assembly, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(parts.config.vocab_size) for _ in range(count))


def kinds(compiler: GrammarCompiler) -> Iterator[dict[str, Any]]:
    """Sampling of every kind, again and again."""
    text = compiler.compile(ResponseFormat(kind="regex", pattern="[a-z ]{3,200}"))
    while True:
        yield {"temperature": 0.0}
        yield {"temperature": 1.0}
        yield {"temperature": 0.8, "top_p": 0.9, "min_p": 0.001}
        yield {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
        yield {"temperature": 0.9, "presence_penalty": 0.7}
        yield {"temperature": 1.0, "grammar": text, "ignore_eos": False}
        yield {"temperature": 1.3, "top_k": 50, "logit_bias": {3: 2.5}, "min_tokens": 4, "ignore_eos": False}


def request_mix(
    parts: Assembly, draw: random.Random, prompts: Sequence[tuple[int, ...]], *, max_tokens: int, name: str
) -> list[Request]:
    """One request per prompt, each of another kind."""
    each = kinds(parts.compiler)
    requests = []
    for index, prompt in enumerate(prompts):
        settings = {"ignore_eos": True, **next(each)}
        params = SamplingParams(
            seed=draw.randrange(2**40), max_tokens=max_tokens, logprobs=logprobs_of(parts), **settings
        )
        requests.append(Request(request_id=f"{name}-{index}", prompt=prompt, params=params))
    return requests


def stopped(parts: Assembly, request: Request, tokens: Sequence[int]) -> Request:
    """The same request with something to stop at, in the middle of ``tokens``, its plain answer: a string
    where the tokens there are text, else a token id."""
    middle = len(tokens) // 2
    text = parts.tokenizer.decode(tokens[middle : middle + 2], skip_special=True)
    is_text = bool(text.strip()) and "\ufffd" not in text
    stop = {"stop": (text,)} if is_text else {"stop_token_ids": (tokens[middle],)}
    params = msgspec.structs.replace(request.params, **stop)
    return Request(request_id=f"{request.request_id}-stopped", prompt=request.prompt, params=params)
