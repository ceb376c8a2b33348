"""What drafts gain on what a model has learned: held-out problems of its tasks, asked one at a time."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from bittrue.bench.engines import Model, at_least
from bittrue.bench.result import Label, Measurement, measured
from bittrue.bench.speculation import OFF, Tell, Way, acceptance, fix_length, since
from bittrue.bench.tasks import Dialogue, Voice, answer_limit, held_out
from bittrue.bench.timing import REST_S
from bittrue.engine.engine import Engine
from bittrue.engine.types import DraftCounters, SamplingParams
from bittrue.errors import BittrueError, KVCorrupted
from bittrue.train.tasks.catalogue import TASK_NAMES, all_tasks
from bittrue.train.tasks.task import Problem

MIX = "tasks"  # the text of all tasks together
LENGTHS = (1, 2, 3, 4)
_CONTEXT = 4096 + 512  # the longest conversation of recall, and the longest answer


@dataclass(slots=True)
class Turn:
    """What one way to draft did with the problems of one task in one round. The first token of an answer
    comes of its prompt: ``tokens``, ``steps`` and ``decode_s`` begin after it, ``whole_s`` with the asking.
    """

    tokens: int = 0
    steps: int = 0
    decode_s: float = 0.0
    whole_s: float = 0.0
    said: list[int] = field(default_factory=list)
    drafts: DraftCounters = field(default_factory=DraftCounters)


@dataclass(frozen=True, slots=True)
class TaskSpeculation:
    """Engines that draft in different ways answer the same problems in turn, greedily, batch 1: ``count``
    problems of every task.

    With a number a way drafts as many tokens in every step, with *up to* a number as many as pay."""

    model: Model
    tell: Tell
    tasks: tuple[str, ...] = TASK_NAMES
    count: int = 10
    rounds: int = 5
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(tasks=(self.count, 1), rounds=(self.rounds, 1))

    def run(self) -> Iterator[Measurement]:
        """The measurements of the mix, then those of each task. Raises KVCorrupted where drafts changed an
        answer."""
        known = all_tasks()
        problems = {
            name: held_out(known[name], self.count, split="test", seed=self.seed) for name in self.tasks
        }
        with ExitStack() as stack:
            engines: dict[Way, Engine] = {}
            for way, knobs in self._ways().items():
                engine = engines[way] = stack.enter_context(
                    self.model.engine(
                        max_context=_CONTEXT,
                        max_running=1,
                        threads=self.threads,
                        prefix_cache=False,
                        **knobs,
                    )
                )
                if isinstance(way[1], int):
                    fix_length(engine, way[1])
            turns = self._turns(engines, problems)
        yield from _measurements(MIX, _summed(turns))
        for name in self.tasks:
            yield from _measurements(name, {way: by_task[name] for way, by_task in turns.items()})

    def _ways(self) -> dict[Way, dict[str, Any]]:
        """Knobs by (proposer, length)."""
        most = LENGTHS[-1]
        ways: dict[Way, dict[str, Any]] = {OFF: {}}
        ways["ngram", f"up to {most}"] = {"speculation": "ngram", "max_draft": most}
        if self.model.has_draft_module:
            for length in LENGTHS:
                knobs = {"speculation": "mtp", "max_draft": length}
                ways["mtp", f"up to {length}"] = knobs
                ways["mtp", length] = knobs
        return ways

    def _turns(
        self, engines: Mapping[Way, Engine], problems: Mapping[str, Sequence[Problem]]
    ) -> dict[Way, dict[str, list[Turn]]]:
        """By way and task, a turn for every round; one round before them is dropped."""
        voice = Voice(self.model.loaded.tokenizer)
        turns: dict[Way, dict[str, list[Turn]]] = {way: {name: [] for name in problems} for way in engines}
        for number in range(-1, self.rounds):
            for place, (name, asked) in enumerate(problems.items()):
                self.tell(f"round {max(number, 0) + 1} of {self.rounds}: {name}")
                order = list(engines)
                if (number + place) % 2:
                    order.reverse()
                found: dict[Way, Turn] = {}
                for way in order:
                    time.sleep(REST_S)
                    found[way] = take_turn(engines[way], asked, voice)
                wrong = [way for way, turn in found.items() if turn.said != found[OFF].said]
                if wrong:
                    raise KVCorrupted(f"drafts changed answers to {name}: {wrong}")
                if number >= 0:
                    for way, turn in found.items():
                        turns[way][name].append(turn)
        return turns


def take_turn(engine: Engine, problems: Sequence[Problem], voice: Voice) -> Turn:
    """Every problem asked to its end, one after the other."""
    turn, before = Turn(), engine.stats().drafts
    for problem in problems:
        params = SamplingParams(temperature=0.0, max_tokens=answer_limit(problem))
        dialogue = Dialogue(problem, params, voice)
        while _answer(engine, dialogue, turn):
            pass
    turn.drafts = since(before, engine.stats().drafts)
    return turn


def _answer(engine: Engine, dialogue: Dialogue, turn: Turn) -> bool:
    """One answer, added to ``turn``; whether there is more to ask. Raises BittrueError where the request ends
    in an error."""
    prompt, reason = dialogue.prompt(), ""
    begun_s = time.perf_counter()
    first_s = last_s = 0.0
    for event in engine.stream(prompt, dialogue.params):
        last_s = time.perf_counter()
        if event.finish_reason in ("error", "abort"):
            raise BittrueError(f"a request ended with {event.finish_reason!r}: {event.error}")
        dialogue.feed(event.token_ids)
        turn.said += event.token_ids
        if not first_s:
            first_s = last_s
        else:
            turn.tokens += len(event.token_ids)
            turn.steps += 1
        reason = event.finish_reason or ""
    turn.decode_s += last_s - first_s
    turn.whole_s += last_s - begun_s
    return dialogue.ended(reason)


def _summed(turns: Mapping[Way, Mapping[str, Sequence[Turn]]]) -> dict[Way, list[Turn]]:
    """Of all tasks together, by way and round."""
    return {
        way: [_sum(each) for each in zip(*by_task.values(), strict=True)] for way, by_task in turns.items()
    }


def _sum(turns: Sequence[Turn]) -> Turn:
    return Turn(
        tokens=sum(turn.tokens for turn in turns),
        steps=sum(turn.steps for turn in turns),
        decode_s=sum(turn.decode_s for turn in turns),
        whole_s=sum(turn.whole_s for turn in turns),
        drafts=DraftCounters(
            drafted_at=tuple(map(sum, zip(*(turn.drafts.drafted_at for turn in turns), strict=True))),
            accepted_at=tuple(map(sum, zip(*(turn.drafts.accepted_at for turn in turns), strict=True))),
        ),
    )


def _measurements(text: str, turns: Mapping[Way, Sequence[Turn]]) -> Iterator[Measurement]:
    """Speed of every way, over that of none round by round; tokens a decode step gave; what was accepted."""
    if not all(turn.tokens for each in turns.values() for turn in each):
        return  # every answer had one token: there was nothing to decode
    for way, each in turns.items():
        labels: dict[str, Label] = {"text": text, "batch": 1, "by": way[0], "drafts": str(way[1])}
        yield measured("decode", "tokens/s", [turn.tokens / turn.decode_s for turn in each], labels)
        if way == OFF:
            continue
        pairs = list(zip(each, turns[OFF], strict=True))
        yield measured("decode over off", "ratio", [off.decode_s / on.decode_s for on, off in pairs], labels)
        whole = [off.whole_s / on.whole_s for on, off in pairs]
        yield measured("whole answers over off", "ratio", whole, labels)
        lengths = [turn.tokens / turn.steps for turn in each]
        yield measured("acceptance length", "ratio", lengths, labels)
        yield from acceptance(_sum(each).drafts, labels)
