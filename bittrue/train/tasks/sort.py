"""Sorting two to eight numbers below 100."""

import random
from dataclasses import dataclass

from bittrue.train.tasks.task import Problem, TextQuestion

LEAST, MOST = 2, 8
BELOW = 100


@dataclass(frozen=True, slots=True)
class Sort:
    """``sort: 52 7 91`` -> ``7 52 91``. Problems with the same numbers are one problem."""

    name: str = "sort"
    longest: int = 64
    problems_per_document: tuple[int, int] = (1, 1)
    is_plain: bool = True

    def problem(self, rng: random.Random) -> Problem:
        numbers = [rng.randrange(BELOW) for _ in range(rng.randint(LEAST, MOST))]
        answer = " ".join(map(str, sorted(numbers)))
        prompt = "sort: " + " ".join(map(str, numbers))
        return Problem("sort", answer, (TextQuestion(prompt, answer),))
