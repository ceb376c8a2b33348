"""Answers that are one text, or one letter among choices."""

import re

from bittrue.rl.verifiers.verifier import (
    Answers,
    Checker,
    Place,
    Verdict,
    final_text,
    right,
    unparsable,
    wrong,
)

_CHOICE = re.compile(
    r"(?i:(?:the )?(?:correct |final )?(?:answer|choice|option)(?: is)?:?\s*)?"
    r"(?:\\boxed\{([A-Z])\}|\(([A-Z])\)|\[([A-Z])\]|([A-Z])[.)]?)\.?",
    re.ASCII,
)
_MAX_LINE = 80


class Exact(Checker, frozen=True, tag="exact"):
    """Right is exactly ``expected``, but for white space around it."""

    expected: str

    def judge(self, answers: Answers, place: Place) -> Verdict:
        text = final_text(answers)
        if text is None:
            return unparsable("the last message is no text")
        return right() if text.strip() == self.expected else wrong("another text")


class Choice(Checker, frozen=True, tag="choice"):
    """Right is the letter ``expected``, alone on the last line or after "the answer is"; whoever also puts
    another letter on a line of its own has chosen none."""

    expected: str
    letters: str = "ABCD"

    def judge(self, answers: Answers, place: Place) -> Verdict:
        lines = [line.strip(" \t*") for line in (final_text(answers) or "").split("\n") if line.strip()]
        chosen = [chosen_letter(line) for line in lines]
        if not chosen or chosen[-1] is None or chosen[-1] not in self.letters:
            return unparsable("the last line names no letter")
        if len(set(chosen) - {None}) > 1:
            return unparsable("more than one letter is chosen")
        return right() if chosen[-1] == self.expected else wrong(f"{chosen[-1]} is chosen")


def chosen_letter(line: str) -> str | None:
    """The letter that a line names and does nothing else."""
    found = _CHOICE.fullmatch(line) if len(line) <= _MAX_LINE else None
    return next(filter(None, found.groups()), None) if found else None
