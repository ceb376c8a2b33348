"""What a task is: problems with reference answers, and checkers that accept every right answer."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from bittrue.text.codec import ChatOptions
from bittrue.text.messages import ChatMessage, ThinkingMode, ToolDefinition
from bittrue.text.parser import ParsedAnswer

Split = Literal["train", "validation", "test"]


class Question(Protocol):
    """One question in a conversation, until the model's last answer to it.

    ``prompt`` is the user's text. ``reference`` follows it where everything goes right: messages of the
    assistant and, between them, results of tools; the first and the last are the assistant's.
    """

    @property
    def prompt(self) -> str: ...

    @property
    def reference(self) -> tuple[ChatMessage, ...]: ...

    def follow_up(self, answers: Sequence[ParsedAnswer]) -> ChatMessage | None:
        """What is said to the model after ``answers`` (at least one): the result of a tool, or None at the
        question's end."""
        ...

    def check(self, answers: Sequence[ParsedAnswer]) -> bool:
        """Whether the model's messages answer the question: any text in, in bounded time, without errors."""
        ...


@dataclass(frozen=True, slots=True)
class TextQuestion:
    """A question with exactly one right text; subclasses widen ``accepts``. ``reasoning``: what stands in
    ``<think>`` before the reference answer."""

    prompt: str
    answer: str
    reasoning: str | None = None

    @property
    def reference(self) -> tuple[ChatMessage, ...]:
        return (ChatMessage("assistant", self.answer, reasoning_content=self.reasoning),)

    def follow_up(self, answers: Sequence[ParsedAnswer]) -> ChatMessage | None:
        return None

    def check(self, answers: Sequence[ParsedAnswer]) -> bool:
        if len(answers) != 1 or answers[0].tool_calls:
            return False
        return self.accepts(answers[0].content)

    def accepts(self, content: str) -> bool:
        """Whether the text of the answer, without its reasoning, is right."""
        return content == self.answer


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a task: its questions, asked in one conversation, and how that is rendered.

    ``family`` and ``canonical`` say which problem it is: two problems with equal ones teach the same answer,
    so they fall in the same split.
    """

    family: str
    canonical: str
    questions: tuple[Question, ...]
    tools: tuple[ToolDefinition, ...] = ()
    thinking: ThinkingMode = field(default_factory=ThinkingMode)

    @property
    def split(self) -> Split:
        return split_of(self.family, self.canonical)

    def options(self) -> ChatOptions:
        """How a prompt for the next answer is rendered."""
        return ChatOptions(tools=self.tools, thinking=self.thinking)

    def messages(self) -> list[ChatMessage]:
        """The conversation in which every answer is the reference."""
        return list(_messages(self.questions))


class Task(Protocol):
    """A generator of problems.

    ``longest``: no document of one problem has more tokens, where tokens are bytes.
    ``problems_per_document``: least and most problems of the task that share a training conversation.
    ``is_plain``: neither tools nor thinking, and short: its questions may share one with other plain tasks'.
    """

    @property
    def name(self) -> str: ...

    @property
    def longest(self) -> int: ...

    @property
    def problems_per_document(self) -> tuple[int, int]: ...

    @property
    def is_plain(self) -> bool: ...

    def problem(self, rng: random.Random) -> Problem:
        """A problem drawn with ``rng`` alone."""
        ...


def split_of(family: str, canonical: str) -> Split:
    """The split a problem belongs to, by the hash of what it is: a tenth test, a tenth validation."""
    digest = hashlib.blake2b(f"{family}\n{canonical}".encode(), digest_size=8).digest()
    match int.from_bytes(digest, "little") % 10:
        case 0:
            return "test"
        case 1:
            return "validation"
        case _:
            return "train"


def seeded(*facts: object) -> random.Random:
    """A source of randomness that is a function of ``facts`` (by their text) alone."""
    text = "\n".join(map(str, facts)).encode()
    return random.Random(hashlib.blake2b(text, digest_size=16).digest())


def problem_in(task: Task, split: Split, rng: random.Random) -> Problem:
    """The first problem of ``split`` among those drawn with ``rng``."""
    while True:
        problem = task.problem(rng)
        if problem.split == split:
            return problem


def _messages(questions: Sequence[Question]) -> Iterator[ChatMessage]:
    for question in questions:
        yield ChatMessage("user", question.prompt)
        yield from question.reference
