"""Addition and subtraction, answered at once or after column-wise reasoning."""

import random
from dataclasses import dataclass
from typing import Literal

from bittrue.text.messages import Effort, ThinkingMode
from bittrue.train.tasks.task import Problem, TextQuestion

Operation = Literal["add", "sub"]

# Efforts other than low put 450 to 500 bytes of instructions before the question: enough to be known, few
# enough that most of what is read is arithmetic.
_EFFORTS: tuple[Effort, ...] = ("low", "high", "max")
_EFFORT_WEIGHTS = (85, 12, 3)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """``48+371=`` -> ``419``, ``48-371=`` -> ``-323``; operands of up to ``max_digits`` digits.

    With ``thinks`` the reference answer comes after a scratchpad, one line a column, the lowest first: the
    column's digits, the carry or borrow and their result, and the digits of the whole result so far.
    """

    operation: Operation
    max_digits: int = 3
    thinks: bool = False
    problems_per_document: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        return f"{self.operation}-think" if self.thinks else self.operation

    @property
    def longest(self) -> int:
        return 768 if self.thinks else 32

    @property
    def is_plain(self) -> bool:
        return not self.thinks

    def problem(self, rng: random.Random) -> Problem:
        a, b = _operand(rng, self.max_digits), _operand(rng, self.max_digits)
        thinking = ThinkingMode()
        if self.thinks:
            thinking = ThinkingMode(True, rng.choices(_EFFORTS, _EFFORT_WEIGHTS)[0])
        if self.operation == "add":
            canonical = f"{min(a, b)}+{max(a, b)}"
            prompt, answer, spelled = f"{a}+{b}=", str(a + b), addition_columns
        else:
            canonical = f"{a}-{b}"
            prompt, answer, spelled = f"{a}-{b}=", str(a - b), subtraction_columns
        question = TextQuestion(prompt, answer, spelled(a, b) if self.thinks else None)
        return Problem(self.operation, canonical, (question,), thinking=thinking)


def addition_columns(a: int, b: int) -> str:
    """The scratchpad of a + b: ``8+1+0=9 9``, ``4+7+0=11 19``, ``0+3+1=4 419`` in lines for 48 + 371."""
    tops, bottoms = _columns(a, b)
    lines, carry, result = [], 0, ""
    for place, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):
        total = top + bottom + carry
        is_last = place == len(tops) - 1
        result = (str(total) if is_last else str(total % 10)) + result
        lines.append(f"{top}+{bottom}+{carry}={total} {result}")
        carry = total // 10
    return "\n".join(lines)


def subtraction_columns(a: int, b: int) -> str:
    """The scratchpad of a - b; the smaller is subtracted from the larger, a first line ``-`` says that the
    result is negative. A column that borrows shows ten more at its top."""
    lines = ["-"] if a < b else []
    tops, bottoms = _columns(max(a, b), min(a, b))
    borrow, result = 0, ""
    for top, bottom in zip(tops, bottoms, strict=True):
        is_short = top < bottom + borrow
        top += 10 * is_short
        digit = top - bottom - borrow
        result = f"{digit}{result}"
        lines.append(f"{top}-{bottom}-{borrow}={digit} {result}")
        borrow = int(is_short)
    return "\n".join(lines)


def _columns(a: int, b: int) -> tuple[list[int], list[int]]:
    """The digits of both, lowest first, as many."""
    width = max(len(str(a)), len(str(b)))
    return ([int(c) for c in f"{a:0{width}}"[::-1]], [int(c) for c in f"{b:0{width}}"[::-1]])


def _operand(rng: random.Random, max_digits: int) -> int:
    """A number of any length, longer ones likelier: there are few short ones."""
    lengths = range(1, max_digits + 1)
    digits = rng.choices(lengths, [3 ** (n - 1) for n in lengths])[0]
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
