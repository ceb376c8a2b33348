"""Finds stop strings in text that arrives in pieces."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopResult:
    """``text`` may be shown now; ``matched`` is the stop string that ended the text, or None."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Passes text through up to the first stop string, the same for any split of the text.

    The stop string that is *complete* first wins (of two complete at the same character the longer), as if
    the text came one character at a time. Text that may still become a stop string is held back.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = tuple(sorted({s for s in stop_strings if s}))
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string found so far."""
        return self._matched

    def feed(self, piece: str) -> StopResult:
        """Text that is now safe to show. After a match every further piece gives an empty text."""
        if self._matched is not None:
            return StopResult("", self._matched)
        text = self._held + piece
        found = self._first_complete(text)
        if found is not None:
            start, self._matched = found
            self._held = ""
            return StopResult(text[:start], self._matched)
        keep = self._open_prefix(text)
        self._held = text[keep:]
        return StopResult(text[:keep])

    def flush(self) -> StopResult:
        """The end of the text: what was held back can be shown."""
        rest, self._held = self._held, ""
        return StopResult(rest, self._matched)

    def _first_complete(self, text: str) -> tuple[int, str] | None:
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not hits:
            return None
        _, start, stop = min(hits)
        return start, stop

    def _open_prefix(self, text: str) -> int:
        """The first position from which the rest of the text is a proper prefix of a stop string."""
        first = len(text)
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    first = min(first, len(text) - length)
                    break
        return first
