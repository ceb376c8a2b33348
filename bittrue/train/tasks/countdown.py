"""Countdown: reaching a target with three numbers, each used once, in one of many ways."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

from bittrue.train.tasks.expression import parse_expression
from bittrue.train.tasks.task import Problem, TextQuestion

MAX_NUMBER = 20
MAX_TARGET = 99
_OPERATIONS = "+-*"


@dataclass(frozen=True, slots=True)
class CountdownQuestion(TextQuestion):
    """Any expression over + - * and parentheses that uses each of ``numbers`` once and equals ``target``."""

    numbers: tuple[int, ...] = ()
    target: int = 0

    def accepts(self, content: str) -> bool:
        found = parse_expression(content)
        if found is None or found.value != self.target:
            return False
        return sorted(found.numbers) == sorted(self.numbers)


@dataclass(frozen=True, slots=True)
class Countdown:
    """``3 7 5 -> 26`` -> ``3*7+5``. The target is drawn among those that can be reached, the reference
    answer among all solutions. The order of the numbers does not make another problem."""

    name: str = "countdown"
    longest: int = 48
    problems_per_document: tuple[int, int] = (1, 1)
    is_plain: bool = True

    def problem(self, rng: random.Random) -> Problem:
        while True:
            numbers = tuple(rng.randint(1, MAX_NUMBER) for _ in range(3))
            reached = solutions(numbers)
            if reached:
                break
        target = rng.choice(sorted(reached))
        answer = rng.choice(reached[target])
        given = " ".join(map(str, numbers))
        question = CountdownQuestion(f"{given} -> {target}", answer, numbers=numbers, target=target)
        canonical = " ".join(map(str, sorted(numbers))) + f" -> {target}"
        return Problem("countdown", canonical, (question,))


def solutions(numbers: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Every target from 1 to MAX_TARGET that three numbers reach, with its solutions in text order: without
    needless parentheses, each text once."""
    return _solutions(tuple(sorted(numbers)))


@cache  # at most one entry for each three of MAX_NUMBER numbers: 1,540
def _solutions(numbers: tuple[int, ...]) -> dict[int, tuple[str, ...]]:
    found: dict[int, set[str]] = {}
    for value, text in _expressions(numbers):
        if 1 <= value <= MAX_TARGET:
            found.setdefault(value, set()).add(text)
    return {value: tuple(sorted(texts)) for value, texts in found.items()}


def _expressions(numbers: tuple[int, ...]) -> Iterator[tuple[int, str]]:
    """(a op b) op c and a op (b op c), over all orders and operations. Where the parentheses of the second
    change nothing, it is the first."""
    for (a, b, c), (first, second) in product(set(permutations(numbers)), product(_OPERATIONS, repeat=2)):
        left = f"({a}{first}{b})" if second == "*" and first != "*" else f"{a}{first}{b}"
        yield _apply(second, _apply(first, a, b), c), f"{left}{second}{c}"
        inner = _apply(second, b, c)
        if second == "*" and first != "*":
            yield _apply(first, a, inner), f"{a}{first}{b}*{c}"
        elif first == "-" or (first == "*" and second != "*"):
            yield _apply(first, a, inner), f"{a}{first}({b}{second}{c})"


def _apply(operation: str, a: int, b: int) -> int:
    match operation:
        case "+":
            return a + b
        case "-":
            return a - b
        case _:
            return a * b
