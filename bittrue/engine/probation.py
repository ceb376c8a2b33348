"""Probation: after an engine's death, who is given back when, and who is to blame."""

import signal
from collections import deque
from dataclasses import dataclass

# Sent from outside, by an operator or for want of memory: they say little about what the engine ran.
_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
_DEATHS = 2  # of a request, at the last of them alone
_DEATHS_FROM_OUTSIDE = 3  # every one of them alone, and nothing else left to try


@dataclass(slots=True)
class _Deaths:
    """Engine deaths that one request was there for since its last sign of life; ``alone``: without any
    other."""

    all: int = 0
    alone: int = 0


class Probation:
    """Decides with names only; lists of names that methods return are to be handed to the engine now.

    While no engine has died requests go through at once. After a death those that were in the engine are
    suspects: the first is given back alone, each next one when the one before has shown a sign of life (a
    token or its end); requests that came later wait behind. Those that have passed run on and batch
    together, so a death may have several candidates. Then the one that was on probation goes first, alone:
    **only a request that had the engine to itself is ever given up**, and its end clears all others.

    Given up is who was there at two deaths in a row without a token between, alone at the second. Signals
    that come from outside are held against a request only where the server would have to give up itself: an
    operator may kill often, and a slow start makes it likely that the same request is hit.
    """

    def __init__(self) -> None:
        self._is_up = False
        self._given: dict[str, bool] = {}  # in the engine, in order -> has shown life there
        self._leaving: set[str] = set()  # aborted, but the engine may not know yet
        self._on_probation: str | None = None
        self._suspects: deque[str] = deque()
        self._waiting: deque[str] = deque()
        self._deaths: dict[str, _Deaths] = {}

    @property
    def is_on(self) -> bool:
        return self._on_probation is not None or bool(self._suspects)

    def started(self) -> list[str]:
        """A new engine is there."""
        self._is_up = True
        return self._next()

    def cut(self) -> None:
        """The engine cannot be reached any more; ``died`` follows once it is known how it ended."""
        self._is_up = False

    def submit(self, name: str) -> list[str]:
        """A request has come."""
        self._waiting.append(name)
        return self._next()

    def lives(self, name: str) -> list[str]:
        """The engine has told a token of it."""
        if name not in self._given:
            return []
        self._given[name] = True
        self._deaths.pop(name, None)
        return self._passed(name)

    def ended(self, name: str) -> list[str]:
        """The engine has finished or refused it."""
        self._given.pop(name, None)
        self._deaths.pop(name, None)
        return self._passed(name)

    def aborted(self, name: str) -> list[str]:
        """Nobody wants it any more. Until ``left`` the engine may still run it."""
        if self._given.pop(name, None) is not None:
            self._leaving.add(name)
        elif name in self._suspects:
            self._suspects.remove(name)
        elif name in self._waiting:
            self._waiting.remove(name)
        self._deaths.pop(name, None)
        return self._passed(name)

    def left(self, name: str) -> None:
        """The engine has taken in the abort."""
        self._leaving.discard(name)

    def died(self, exit_code: int, *, is_last: bool) -> str | None:
        """The engine has gone. Returns the request that is given up, if there is one to blame. ``is_last``:
        without one there will be no engine again."""
        there = list(self._given)
        is_alone = len(there) == 1 and not self._leaving
        for name in there:
            deaths = self._deaths.setdefault(name, _Deaths())
            deaths.all += 1
            deaths.alone = deaths.alone + 1 if is_alone else 0
        first = [name for name in there if name == self._on_probation]
        silent = [name for name in there if not self._given[name] and name not in first]
        others = [name for name in there if self._given[name] and name not in first]
        self._given.clear()
        self._leaving.clear()
        self._on_probation = None
        if is_alone and self._is_to_blame(there[0], exit_code, is_last):
            del self._deaths[there[0]]
            self._waiting.extendleft(reversed(self._suspects))  # the deaths are explained
            self._suspects.clear()
            return there[0]
        # Silent ones first: what kills at the prompt is among them, and then the first death alone tells.
        self._suspects.extendleft(reversed([*first, *silent, *others]))
        return None

    def _is_to_blame(self, name: str, exit_code: int, is_last: bool) -> bool:
        deaths = self._deaths[name]
        if exit_code in _OUTSIDE:
            return is_last and deaths.alone >= _DEATHS_FROM_OUTSIDE
        return deaths.all >= _DEATHS

    def _passed(self, name: str) -> list[str]:
        """``name`` is not, or no longer, the one that others wait for."""
        if name == self._on_probation:
            self._on_probation = None
        return self._next()

    def _next(self) -> list[str]:
        if not self._is_up or self._on_probation is not None:
            return []
        if self._suspects:
            self._on_probation = self._suspects.popleft()
            out = [self._on_probation]
        else:
            out = list(self._waiting)
            self._waiting.clear()
        self._given.update(dict.fromkeys(out, False))
        return out
