"""A session of an agent that calls tools, branches and edits its history: what the prefix cache has of it."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from bittrue.bench.engines import Answer, Model, ask, at_least, greedy
from bittrue.bench.result import Label, Measurement, measured
from bittrue.bench.trace import FIRST_ID
from bittrue.errors import KVCorrupted
from bittrue.kv.prefix import common_length

Tell = Callable[[str], None]
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a history that came together."""

    kind: Literal["system", "question", "call", "tool", "answer"]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """How long things are, in tokens, and how often they happen.

    A turn is a question, one to ``most_calls`` calls of a tool, each with what the tool said, and the answer:
    a request for each call and one for the answer. After turn ``fork_at`` a second branch goes on from what
    was there after turn ``fork_from``, and the two take turns. Every ``edit_every``-th turn begins by cutting
    short what one of the last four tools said.
    """

    turns: int = 20
    system: int = 4096
    question: Range = (16, 64)
    tool: Range = (32, 160)
    output: Range = (8, 32)
    most_calls: int = 3
    fork_at: int = 8
    fork_from: int = 5
    edit_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(turns=(self.turns, 1), system=(self.system, 1))

    @property
    def most_tokens(self) -> int:
        """No history of the session is longer."""
        turn = self.question[1] + self.most_calls * self.tool[1] + (self.most_calls + 1) * self.output[1]
        return self.system + self.turns * turn

    def requests(self, vocab: int) -> "Generator[tuple[tuple[int, ...], int], tuple[int, ...], None]":
        """(prompt, tokens wanted) of each request; is sent what came back for it."""
        source = np.random.Generator(np.random.PCG64(self.seed))

        def piece(kind: Literal["system", "question", "tool"], bounds: Range) -> Piece:
            return Piece(kind, tuple(source.integers(FIRST_ID, vocab, length(bounds)).tolist()))

        def length(bounds: Range) -> int:
            return int(source.integers(bounds[0], bounds[1] + 1))

        branches = [[piece("system", (self.system, self.system))]]
        ends: list[list[Piece]] = []  # the history after each turn
        for turn in range(self.turns):
            if turn == self.fork_at:
                branches.append(list(ends[self.fork_from]))
            history = branches[turn % len(branches)]
            tools = [place for place, each in enumerate(history) if each.kind == "tool"]
            if tools and turn % self.edit_every == self.edit_every - 1:
                place = tools[-1 - int(source.integers(0, min(4, len(tools))))]
                history[place] = Piece("tool", history[place].token_ids[: self.tool[0] // 2])
            history.append(piece("question", self.question))
            for _ in range(length((1, self.most_calls))):
                call = yield _joined(history), length(self.output)
                history += [Piece("call", call), piece("tool", self.tool)]
            answer = yield _joined(history), length(self.output)
            history.append(Piece("answer", answer))
            ends.append(list(history))


def _joined(history: Sequence[Piece]) -> tuple[int, ...]:
    return tuple(chain.from_iterable(each.token_ids for each in history))


def bench_session(model: Model, session: Session, *, threads: int, tell: Tell) -> Iterator[Measurement]:
    """Every request goes to an engine without a cache and to one with it, in turn; both must say the same.

    Raises KVCorrupted where they do not.
    """
    knobs: dict[str, Any] = {"max_context": session.most_tokens, "threads": threads}
    answers: dict[str, list[Answer]] = {"off": [], "on": []}
    prompts: list[int] = []
    ideal: list[int] = []
    known: list[tuple[int, ...]] = []
    with model.engine(prefix_cache=False, **knobs) as off, model.engine(**knobs) as on:
        engines = {"off": off, "on": on}
        requests = session.requests(model.vocab_size)
        step = next(requests, None)
        while step is not None:
            prompt, max_tokens = step
            tell(f"request {len(prompts) + 1}, {len(prompt)} tokens")
            for name, engine in engines.items():
                answers[name] += ask(engine, [prompt], greedy(max_tokens))
            token_ids = answers["on"][-1].token_ids
            if token_ids != answers["off"][-1].token_ids:
                raise KVCorrupted(f"request {len(prompts) + 1} got other tokens with the prefix cache")
            prompts.append(len(prompt))
            ideal.append(max((common_length(prompt[:-1], each) for each in known), default=0))
            known.append((*prompt, *token_ids[:-1]))
            try:
                step = requests.send(token_ids)
            except StopIteration:
                step = None
    yield from _rates(prompts, [answer.num_cached for answer in answers["on"]], ideal)
    yield from _times(answers)


def _rates(prompts: Sequence[int], cached: Sequence[int], ideal: Sequence[int]) -> Iterator[Measurement]:
    labels: dict[str, Label] = {"requests": len(prompts), "prompt_tokens": sum(prompts)}
    for of, hits in (("cache", cached), ("ideal", ideal)):
        rate = sum(hits) / sum(prompts)
        yield measured("token hit rate", "ratio", [rate], {"of": of, **labels})
        if len(prompts) > 1:
            later = sum(hits[1:]) / sum(prompts[1:])
            yield measured("token hit rate after the first request", "ratio", [later], {"of": of, **labels})


def _times(answers: dict[str, list[Answer]]) -> Iterator[Measurement]:
    totals = {name: sum(answer.last_s for answer in each) for name, each in answers.items()}
    for name, each in answers.items():
        yield measured("session", "s", [totals[name]], {"cache": name, "requests": len(each)})
        yield measured("time to first token", "s", [answer.first_s for answer in each], {"cache": name})
    yield measured("session, on over off", "ratio", [totals["on"] / totals["off"]], {})
