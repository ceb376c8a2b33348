"""Mathematical answers that may be written in many ways, compared by math-verify and sympy."""

import importlib
import logging
import re
from typing import Any

from bittrue.errors import VerifierUnavailable
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

MAX_EXPRESSION = 500  # characters
MAX_DEPTH = 32  # of brackets
_BEYOND_ASCII = "π∞√×·÷−≤≥"
_BOX = "\\boxed{"
_WRAPPED = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_ASSIGNMENT = re.compile(r"\s*\\?[A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?\s*=(?!=)")
_RELATION = re.compile(r"[=<>≤≥]|\\(?:leq?|geq?|lt|gt|neq?|approx|equiv|sim)(?![A-Za-z])")
_TWO_NUMBERS = re.compile(r"\d\s+\d")
_THOUSANDS = re.compile(r"(?<!\d)\d{1,3}(?:,\d{3})+(?!\d)")
_LIST = re.compile(r"[,;]|\b(?:and|or)\b")


class Mathematics(Checker, frozen=True, tag="math"):
    r"""Right is any expression equal to ``expected`` (LaTeX, without ``\boxed``), alone or in the one box of
    the text. Decimals count to ``decimal_places``.

    What math-verify takes on good faith is refused: ``43=42`` for 42, ``42%`` for 42, a list for one value,
    boxes that differ, digits that are not ASCII.
    sympy may calculate for ever: the process that does is killed.
    """

    expected: str
    decimal_places: int = 12

    def prepare(self) -> None:
        if not _parsed(self.expected):
            raise VerifierUnavailable(f"the reference {self.expected!r} is no mathematical expression")

    def judge(self, answers: Answers, place: Place) -> Verdict:
        text = final_text(answers)
        expression = None if text is None else final_expression(text)
        if expression is None:
            return unparsable("no single expression, alone or in one box")
        why = refused(expression, self.expected)
        if why is not None:
            return unparsable(why)
        parsed = _parsed(expression)
        if not parsed:
            return unparsable("not a mathematical expression")
        is_equal = _library().verify(
            _parsed(self.expected), parsed, float_rounding=self.decimal_places, timeout_seconds=None
        )
        return right() if is_equal else wrong("not equal")


def final_expression(text: str) -> str | None:
    """What a text gives as its answer: the content of its boxes, all alike, or the whole of a short text."""
    boxes = boxed(text)
    if boxes is None or len(set(boxes)) > 1:
        return None
    expression = boxes[0] if boxes else text.strip()
    for opening, closing in _WRAPPED:
        inner = expression[len(opening) : len(expression) - len(closing)]
        if inner and expression.startswith(opening) and expression.endswith(closing):
            expression = inner.strip()
            break
    return expression if 0 < len(expression) <= MAX_EXPRESSION else None


def boxed(text: str) -> list[str] | None:
    """The contents of every box in the text; None where one is not closed or has a box in it."""
    found = []
    at = text.find(_BOX)
    while at >= 0:
        start = end = at + len(_BOX)
        depth = 1
        while depth and end < len(text) and end - start <= MAX_EXPRESSION:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        content = text[start : end - 1]
        if depth or _BOX in content:
            return None
        found.append(content.strip())
        at = text.find(_BOX, end)
    return found


def refused(expression: str, expected: str) -> str | None:
    """Why an expression is not even compared."""
    if not all(32 <= ord(char) < 127 or char in _BEYOND_ASCII for char in expression):
        return "a character that is no mathematics"
    if _depth(expression) > MAX_DEPTH:
        return "brackets too deep"
    if "%" in expression and "%" not in expected:
        return "a percentage"
    if _TWO_NUMBERS.search(expression):
        return "two numbers side by side"
    if _LIST.search(_THOUSANDS.sub("0", expression)) and not _LIST.search(expected):
        return "several values where one is asked for"
    if not _RELATION.search(expected):
        value = _ASSIGNMENT.sub("", expression, count=1) if _ASSIGNMENT.match(expression) else expression
        if _RELATION.search(value):
            return "a relation where a value is asked for"
    return None


def _depth(expression: str) -> int:
    deepest = depth = 0
    for char in expression:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _parsed(expression: str) -> Any:
    library = _library()
    config = library.LatexExtractionConfig(boxed_match_priority=0)
    return library.parse(
        f"{_BOX}{expression}}}",
        [config],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def _library() -> Any:
    try:
        library = importlib.import_module("math_verify")
    except ImportError as error:
        raise VerifierUnavailable("math-verify is not installed: pip install 'bittrue[rl]'") from error
    # It warns that its own time limits are off: they need the main thread, a killed process needs nothing.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return library
