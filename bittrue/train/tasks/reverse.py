"""Reversing a word of 3 to 16 random letters."""

import random
import string
from dataclasses import dataclass

from bittrue.train.tasks.task import Problem, TextQuestion

LEAST, MOST = 3, 16


@dataclass(frozen=True, slots=True)
class Reverse:
    """``reverse: kqzab`` -> ``bazqk``. A word and its reverse are one problem."""

    name: str = "reverse"
    longest: int = 64
    problems_per_document: tuple[int, int] = (1, 1)
    is_plain: bool = True

    def problem(self, rng: random.Random) -> Problem:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(LEAST, MOST)))
        answer = word[::-1]
        return Problem("reverse", min(word, answer), (TextQuestion(f"reverse: {word}", answer),))
