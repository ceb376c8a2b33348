"""The protocol of a verifier, and the verdict it gives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, TypeAlias

import msgspec

from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.sandbox import IsolationKind
from bittrue.text.parser import ParsedAnswer

Outcome = Literal["right", "wrong", "unparsable", "timeout", "crash"]
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "unparsable", "timeout", "crash")
# Where a verifier runs: in the caller's process; in a worker without network; in one with network; in one
# that starts a sandbox for each program it is given.
Room = Literal["here", "sealed", "network", "keeper"]
Answers: TypeAlias = tuple[ParsedAnswer, ...]  # the model's messages in one conversation, the last one last

_MAX_DETAIL = 400


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier found. ``score``: 1 for right and else 0, or, from a verifier built with
    ``is_strict=False``, its own value; None where there is no verdict, and not by the answer's fault: a
    reward function gives none, a verifier elsewhere cannot be asked. ``sub_scores``: what it measured
    besides. ``detail``: why, for people.
    ``seconds``: from handing the answer over to the verdict."""

    outcome: Outcome
    score: float | None
    detail: str = ""
    sub_scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    is_cached: bool = False

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.score or 0.0, self.seconds, *self.sub_scores.values()))):
            raise ValueError("a score is no number")
        if self.outcome not in ("right", "wrong") and self.score not in (0, None):
            raise ValueError(f"a score of {self.score} for {self.outcome}")


def right(sub_scores: Mapping[str, float] | None = None) -> Verdict:
    return Verdict("right", 1.0, sub_scores=sub_scores or {})


def wrong(detail: str, sub_scores: Mapping[str, float] | None = None) -> Verdict:
    return Verdict("wrong", 0.0, detail[:_MAX_DETAIL], sub_scores or {})


def unparsable(detail: str) -> Verdict:
    return Verdict("unparsable", 0.0, detail[:_MAX_DETAIL])


def timed_out(detail: str, sub_scores: Mapping[str, float] | None = None) -> Verdict:
    return Verdict("timeout", 0.0, detail[:_MAX_DETAIL], sub_scores or {})


def crashed(detail: str, sub_scores: Mapping[str, float] | None = None) -> Verdict:
    return Verdict("crash", 0.0, detail[:_MAX_DETAIL], sub_scores or {})


def no_verdict(outcome: Outcome, detail: str) -> Verdict:
    """What an answer cannot be blamed for: it counts neither as right nor as wrong."""
    return Verdict(outcome, None, detail[:_MAX_DETAIL])


def graded(value: object, *, is_strict: bool, sub_scores: Mapping[str, float] | None = None) -> Verdict:
    """The verdict of a scorer that gives a number: right from 1 on. Part of it counts only if not strict."""
    if isinstance(value, bool):
        value = float(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return unparsable(f"the scorer gave {value!r}, which is no number")
    measured = {**(sub_scores or {}), "value": float(value)}
    outcome: Outcome = "right" if value >= 1 else "wrong"
    score = float(outcome == "right") if is_strict else float(value)
    return Verdict(outcome, score, sub_scores=measured)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a verifier judges. ``directory``: the only one it may write in, emptied after each answer."""

    isolation: IsolationKind
    limits: Limits
    directory: str


class Verifier(Protocol):
    """The check of answers to one problem.

    ``judge`` runs in a process of its own (but for the room "here"), where it may be killed at any moment;
    an exception is a crash, but for Killed. ``prepare`` runs in the worker before that, outside the limits of
    an answer: it loads libraries once, and raises VerifierUnavailable.
    """

    room: ClassVar[Room]

    @property
    def kind(self) -> str: ...

    @property
    def visible(self) -> tuple[str, ...]:
        """Paths that it reads besides the system, Python and this package."""
        ...

    def prepare(self) -> None: ...

    def judge(self, answers: Answers, place: Place) -> Verdict: ...


class Checker(msgspec.Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True):
    """A verifier that is data: it can be sent to a worker, and written in a file. Its kind is its tag."""

    room: ClassVar[Room] = "sealed"

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def visible(self) -> tuple[str, ...]:
        return ()

    def prepare(self) -> None:
        return


def answer_of(text: str) -> Answers:
    """A conversation in which the model only said ``text``."""
    return (ParsedAnswer(None, text, ()),)


def final_text(answers: Answers) -> str | None:
    """The text of the last message, without its reasoning; None where it calls a tool or there is none."""
    if not answers or answers[-1].tool_calls:
        return None
    return answers[-1].content


def num_characters(answers: Answers) -> int:
    """How long the answers are, tool calls included."""
    called = sum(len(c.name) + len(c.arguments) for answer in answers for c in answer.tool_calls)
    return called + sum(len(answer.content) + len(answer.reasoning or "") for answer in answers)
