"""Arithmetic texts over + - * and parentheses, read without eval and in bounded time."""

from dataclasses import dataclass

MAX_CHARACTERS = 64
_DIGITS = "0123456789"


@dataclass(frozen=True, slots=True)
class Expression:
    """What a text computes, and the numbers it is written with, from left to right."""

    value: int
    numbers: tuple[int, ...]


def parse_expression(text: str) -> Expression | None:
    """The expression a text spells, or None where it spells none.

    Numbers are decimal without leading zeros; ``*`` binds tighter, equals go from left to right; there is no
    sign before a number. Spaces are free between what belongs together. At most MAX_CHARACTERS.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    reader = _Reader(text)
    try:
        value = reader.sum()
    except _Malformed:
        return None
    return Expression(value, tuple(reader.numbers)) if reader.peek() == "" else None


class _Malformed(Exception):
    """The text is no expression."""


class _Reader:
    """One pass over a text; recursion is as deep as parentheses nest, so at most MAX_CHARACTERS / 2."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while self._at < len(self._text) and self._text[self._at] == " ":
            self._at += 1
        return self._text[self._at : self._at + 1]

    def sum(self) -> int:
        value = self._product()
        while (sign := self.peek()) in ("+", "-"):
            self._at += 1
            term = self._product()
            value = value + term if sign == "+" else value - term
        return value

    def _product(self) -> int:
        value = self._factor()
        while self.peek() == "*":
            self._at += 1
            value *= self._factor()
        return value

    def _factor(self) -> int:
        if self.peek() == "(":
            self._at += 1
            value = self.sum()
            if self.peek() != ")":
                raise _Malformed
            self._at += 1
            return value
        self.peek()
        begin = self._at
        while self._at < len(self._text) and self._text[self._at] in _DIGITS:
            self._at += 1
        digits = self._text[begin : self._at]
        if not digits or (digits[0] == "0" and len(digits) > 1):
            raise _Malformed
        self.numbers.append(int(digits))
        return self.numbers[-1]
