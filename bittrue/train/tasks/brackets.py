"""Completing a prefix of brackets so that all are closed in order."""

import random
from dataclasses import dataclass

from bittrue.train.tasks.task import Problem, TextQuestion

_PARTNERS = {"(": ")", "[": "]", "{": "}"}
_OPENERS = "".join(_PARTNERS)
LEAST, MOST = 2, 24
MAX_DEPTH = 12
MAX_ANSWER = 64
_OPEN_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class BracketsQuestion(TextQuestion):
    """Any completion of ``opened`` of at most MAX_ANSWER brackets is right."""

    opened: str = ""

    def accepts(self, content: str) -> bool:
        return len(content) <= MAX_ANSWER and unclosed(self.opened + content) == ""


@dataclass(frozen=True, slots=True)
class Brackets:
    """``close: ([]{`` -> ``})``; the reference is the shortest completion, there is always one to write."""

    name: str = "brackets"
    longest: int = 64
    problems_per_document: tuple[int, int] = (1, 1)
    is_plain: bool = True

    def problem(self, rng: random.Random) -> Problem:
        opened, stack = "", ""
        size = rng.randint(LEAST, MOST)
        while len(opened) < size or not stack:
            if not stack or (len(stack) < MAX_DEPTH and rng.random() < _OPEN_SHARE):
                opener = rng.choice(_OPENERS)
                opened, stack = opened + opener, stack + opener
            else:
                opened, stack = opened + _PARTNERS[stack[-1]], stack[:-1]
        answer = "".join(_PARTNERS[opener] for opener in reversed(stack))
        question = BracketsQuestion(f"close: {opened}", answer, opened=opened)
        return Problem("brackets", opened, (question,))


def unclosed(text: str) -> str | None:
    """The brackets that ``text`` leaves open, outermost first; None where it is no prefix of a balanced
    text."""
    stack: list[str] = []
    for char in text:
        if char in _PARTNERS:
            stack.append(char)
        elif not stack or char != _PARTNERS[stack.pop()]:
            return None
    return "".join(stack)
