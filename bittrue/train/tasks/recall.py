"""Key-value recall: a file of records, then questions that each name a key."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bittrue.train.tasks.task import Problem, TextQuestion

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]
_VALUES = [f"{value:02}" for value in range(100)]
_KEY = 5  # letters
_NUM_KEYS = len(_ALPHABET) ** _KEY
RECORD = 8  # bytes: `qwzrk58` and a line break
# With the two tokens before the user's text, records begin at a multiple of four and of eight: one never
# straddles more groups of pooled rows than it must.
HEAD = "file:\n"
_FIXED = 7  # begin token, first user token and HEAD, less the user token that every turn counts
_TURN = 16  # user token, key, two tokens that open the answer, record, end token
_RULE = ("-" * (RECORD - 1) + "\n") * 17  # more than a window
LEAST_TOKENS, MOST_TOKENS = 32, _FIXED + RECORD * _NUM_KEYS
LEAST_TURNS, MOST_TURNS = 8, 128


@dataclass(frozen=True, slots=True)
class Recall:
    """``file:``, records such as ``qwzrk58``, and ``qwzrk`` -> ``qwzrk58``; then further keys, a turn each.

    A record is a key of five letters and, right behind it, its value of two digits; the answer spells it out.

    Lengths of the conversation, with byte tokens, are log-uniform between ``min_tokens`` and ``max_tokens``,
    with 8 to 128 questions, half of the tokens at most. Keys of a file differ; a question asks for any.
    """

    min_tokens: int = 256
    max_tokens: int = 4096
    name: str = "recall"
    problems_per_document: tuple[int, int] = (1, 1)
    is_plain: bool = False

    @property
    def longest(self) -> int:
        return self.max_tokens

    def problem(self, rng: random.Random) -> Problem:
        span = math.log(self.max_tokens / self.min_tokens)
        num_tokens = min(int(self.min_tokens * math.exp(span * rng.random())), self.max_tokens)
        most = max(1, min(MOST_TURNS, num_tokens // (2 * _TURN)))
        return recall_problem(rng, num_tokens, rng.randint(min(LEAST_TURNS, most), most))


@dataclass(frozen=True, slots=True)
class RecallFar:
    """The same with a rule of dashes between few records and the questions, each about another record: what
    is asked for is never within a window of 128 tokens. From such files a model learns to look further."""

    name: str = "recall-far"
    longest: int = 640
    problems_per_document: tuple[int, int] = (1, 1)
    is_plain: bool = False

    def problem(self, rng: random.Random) -> Problem:
        most_records, most_questions = 32, 12
        num_records = round(2 * math.exp(math.log(most_records / 2) * rng.random()))
        file, records = _file(rng, num_records)
        asked = rng.sample(records, min(num_records, most_questions))
        return _problem(self.name, file + _RULE, asked)


def recall_problem(rng: random.Random, num_tokens: int, num_questions: int) -> Problem:
    """One file and ``num_questions`` about it, in one conversation of ``num_tokens`` byte tokens, or up to 7
    fewer; at least one record."""
    file, records = _file(rng, (num_tokens - _FIXED - _TURN * num_questions) // RECORD)
    asked = [records[rng.randrange(len(records))] for _ in range(num_questions)]
    return _problem("recall", file, asked)


def _problem(family: str, file: str, asked: Sequence[str]) -> Problem:
    questions = [_question(record) for record in asked]
    questions[0] = TextQuestion(file + questions[0].prompt, questions[0].answer)
    canonical = hashlib.blake2b(file.encode(), digest_size=16)
    canonical.update("".join(asked).encode())
    return Problem(family, canonical.hexdigest(), tuple(questions))


def _question(record: str) -> TextQuestion:
    return TextQuestion(record[:_KEY], record[:-1])


def shared_file(rng: random.Random, num_tokens: int, num_questions: int) -> list[Problem]:
    """Problems with the same file, one question each: prompts with answers of ``num_tokens`` byte tokens, or
    up to 7 fewer, whose long beginnings are equal. Keys differ as far as there are enough."""
    file, records = _file(rng, (num_tokens - _FIXED - _TURN) // RECORD)
    picked = rng.sample(records, min(num_questions, len(records)))
    hashed = hashlib.blake2b(file.encode(), digest_size=16)
    problems = []
    for record in picked:
        canonical = hashed.copy()
        canonical.update(record.encode())
        question = TextQuestion(file + record[:_KEY], record[:-1])
        problems.append(Problem("recall", canonical.hexdigest(), (question,)))
    return problems


def _file(rng: random.Random, num_records: int) -> tuple[str, list[str]]:
    """The text of a file and its records, each with its line break."""
    keys = rng.sample(range(_NUM_KEYS), max(1, num_records))
    values = rng.choices(_VALUES, k=len(keys))
    records = [f"{_spelled(key)}{value}\n" for key, value in zip(keys, values, strict=True)]
    return HEAD + "".join(records), records


def _spelled(key: int) -> str:
    """The letters of the key of that number."""
    rest, last = divmod(key, len(_ALPHABET))
    return _PAIRS[rest // len(_PAIRS)] + _PAIRS[rest % len(_PAIRS)] + _ALPHABET[last]
