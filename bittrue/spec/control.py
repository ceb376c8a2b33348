"""How many drafts pay: chosen for each sequence and step from what was accepted and what steps cost.

Every draft is a row more in the next step and some time before it; it is worth a token with the probability
that it and all before it are accepted. The length chosen maximises the tokens per second of the whole step:
a loaded engine, whose rows cost more, drafts less. Time is told, never read: the same calls give the same
lengths.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from statistics import fmean as mean
from typing import Final

# Counts are multiplied by this before each observation: the last 10 of a sequence count, 200 of the engine.
_SEQUENCE_DECAY: Final = 0.9
_ENGINE_DECAY: Final = 0.995
# How many observations an estimate without any is worth: of a place in the engine, of one in a sequence.
_ENGINE_PRIOR: Final = 4.0
_SEQUENCE_PRIOR: Final = 1.0
_FIRST_GUESS: Final = 0.5  # acceptance where nothing is known
# What must be gained per sequence, as a share of its tokens per second: less is noise.
_MARGIN: Final = 0.02
# Steps without drafts before one draft is tried: in a new sequence; after that, doubled after each time that
# did not pay, up to the last.
NEW_PAUSE: Final = 8
PLAIN_EVERY: Final = 4
FIRST_PAUSE: Final = 32
LAST_PAUSE: Final = 1024
LOOK_EVERY: Final = 8  # steps without drafts between two looks at whether they pay
# A time enters an estimate by this share at least, and counts as at most twice or half of it.
_TIME_SHARE: Final = 1 / 16
_TIME_SHARE_DOWN: Final = 1 / 3
_TIME_CLIP: Final = 2.0
_TIME_FIRST: Final = 4  # values of which the least counts
# Sizes nearer than this are one point: the difference of their times would be noise.
_NEAR: Final = 1.2
_ROW_GUESS: Final = 0.05  # cost of a further row, in steps of one, where only one size was seen
_EXACT_ROWS: Final = 16  # beyond, sizes of a quarter octave share an estimate


class DraftControl:
    """Lengths of 0 to ``max_draft`` for every sequence that decodes.

    After a step: ``observe_step``, then ``observe_drafts`` for each sequence that had any, ``length_for`` for
    each that decodes next, and ``observe_drafting`` once the drafts are made.

    The first step of one sequence in PLAIN_EVERY has no drafts, so that the time of such steps is known; the
    others are drafted for at once, by what was accepted of their predecessors. A sequence whose
    drafts do not pay gets 0, and one draft again after FIRST_PAUSE steps (a new one after NEW_PAUSE), then
    after twice as many each time, up to LAST_PAUSE: under 2 % of a thousand steps and more. When such a draft
    is accepted the text has changed: what was known of the sequence is dropped, and the length rises as
    drafts are accepted. Memory: a few numbers per place and live sequence.
    """

    def __init__(self, max_draft: int) -> None:
        self.max_draft = max_draft
        self._steps = StepTimes()
        self._drafting = (
            StepTimes()
        )  # by the drafts of all sequences: most of it may be the same for any number
        self._engine = _Places(max_draft, _ENGINE_DECAY)
        self._sequences: dict[str, _Sequence] = {}
        self._num_begun = 0
        # Drafts and expected tokens of a sequence in a step, over the latest decisions.
        self._mean_drafts = 0.0
        self._mean_tokens = 1.0

    # ---- what was seen -----------------------------------------------------------------------------------

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """A step of ``num_rows`` tokens took that long, drafting left out."""
        self._steps.observe(num_rows, seconds)

    def observe_drafting(self, num_drafts: int, seconds: float) -> None:
        """Making ``num_drafts`` drafts, of all sequences, took that long."""
        self._drafting.observe(num_drafts, seconds)

    def observe_drafts(self, seq_id: str, num_drafted: int, num_accepted: int) -> None:
        """Of ``num_drafted`` drafts of a step the first ``num_accepted`` became output."""
        assert 0 <= num_accepted <= num_drafted, f"{num_accepted} of {num_drafted} drafts accepted"
        if num_drafted == 0:
            return
        state = self._state(seq_id)
        state.num_idle = 0
        if state.is_trying and num_accepted > 0:
            state.places = _Places(self.max_draft, _SEQUENCE_DECAY)
            state.num_idle = state.pause  # again at once: one good draft is seldom alone
        elif state.is_trying:
            state.pause = min(2 * state.pause, LAST_PAUSE)
        state.is_trying = False
        state.places.observe(num_drafted, num_accepted)
        self._engine.observe(num_drafted, num_accepted)

    def forget(self, seq_id: str) -> None:
        """The sequence has ended; an unknown one is ignored."""
        self._sequences.pop(seq_id, None)

    # ---- what pays ---------------------------------------------------------------------------------------

    def length_for(
        self, seq_id: str, num_decodes: int, free_rows: int | None = None, *, num_steps: int = 1
    ) -> int:
        """How many drafts this sequence should get, one of ``num_decodes`` that decode in the next step; not
        more than ``free_rows``. ``num_steps``: how many it took since it was last asked for."""
        assert num_decodes >= 1, "a sequence that decodes is one of those that do"
        most = self.max_draft if free_rows is None else max(0, min(self.max_draft, free_rows))
        state = self._state(seq_id)
        if 0 < state.num_idle <= state.pause and state.num_idle % LOOK_EVERY:
            state.num_idle += num_steps  # it did not pay a moment ago: no need to work it out in every step
            return 0
        tokens = self._expected_tokens(state, most)
        length = self._best_length(tokens, num_decodes) if self._is_ready(state) else 0
        if length == 0 and most > 0:
            state.num_idle += num_steps
            state.is_trying = state.num_idle > state.pause
            length = int(state.is_trying)
        elif length > 0:
            state.is_trying, state.pause = False, FIRST_PAUSE
            if not self._drafting.is_known:
                length = 1
        state.is_plain = False
        share = 1 / max(4, num_decodes)
        self._mean_drafts += share * (length - self._mean_drafts)
        self._mean_tokens += share * (tokens[length] - self._mean_tokens)
        return length

    def acceptance(self, seq_id: str, place: int) -> float:
        """The probability held for a draft at ``place`` (0 = first) when all before it are accepted."""
        return self._chances(self._state(seq_id), place + 1)[place]

    def _is_ready(self, state: "_Sequence") -> bool:
        return self._steps.is_known and not state.is_plain

    def _best_length(self, tokens: list[float], num_decodes: int) -> int:
        """The length of the most tokens per second, all sequences together; 0 unless it gains the margin."""
        others = num_decodes - 1
        rows, drafts = num_decodes + others * self._mean_drafts, others * self._mean_drafts
        rates = [
            (others * self._mean_tokens + expected)
            / (self._steps.seconds(rows + k) + self._drafting_seconds(drafts + k))
            for k, expected in enumerate(tokens)
        ]
        best = max(range(len(rates)), key=rates.__getitem__)  # the first of equals
        return best if rates[best] > rates[0] * (1 + _MARGIN / num_decodes) else 0

    def _drafting_seconds(self, num_drafts: float) -> float:
        """Nothing until it is known: it is tried then."""
        return self._drafting.seconds(num_drafts) if self._drafting.is_known else 0.0

    def _expected_tokens(self, state: "_Sequence", most: int) -> list[float]:
        """Tokens a step emits with 0 .. ``most`` drafts."""
        tokens, chance = [1.0], 1.0
        for each in self._chances(state, most):
            chance *= each
            tokens.append(tokens[-1] + chance)
        return tokens

    def _chances(self, state: "_Sequence", count: int) -> list[float]:
        """Acceptance at the first ``count`` places. Where little is known a place is like that of other
        sequences, and where nothing is, like the place before it."""
        chances, before = [], _FIRST_GUESS
        for place in range(count):
            prior = self._engine.estimate(place, before, _ENGINE_PRIOR)
            before = state.places.estimate(place, prior, _SEQUENCE_PRIOR)
            chances.append(before)
        return chances

    def _state(self, seq_id: str) -> "_Sequence":
        state = self._sequences.get(seq_id)
        if state is None:
            is_plain = self._num_begun % PLAIN_EVERY == 0
            state = _Sequence(_Places(self.max_draft, _SEQUENCE_DECAY), is_plain=is_plain)
            self._sequences[seq_id] = state
            self._num_begun += 1
        return state


class _Places:
    """Decayed counts by place in a step's drafts: how often one was decided, how often accepted. Behind a
    rejected draft nothing was decided. What is known of a place fades while it is not tried: it is tried
    again."""

    def __init__(self, max_draft: int, decay: float) -> None:
        self._tries = [0.0] * max_draft
        self._hits = [0.0] * max_draft
        self._decay = decay

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        num_decided = min(num_accepted + 1, num_drafted)
        for place in range(len(self._tries)):
            self._tries[place] = self._tries[place] * self._decay + (place < num_decided)
            self._hits[place] = self._hits[place] * self._decay + (place < num_accepted)

    def estimate(self, place: int, prior: float, weight: float) -> float:
        return (self._hits[place] + weight * prior) / (self._tries[place] + weight)


@dataclass(slots=True)
class _Sequence:
    places: _Places
    pause: int = FIRST_PAUSE
    num_idle: int = FIRST_PAUSE - NEW_PAUSE  # steps since the last draft
    is_plain: bool = True  # its next step has no drafts
    is_trying: bool = False  # the draft asked for last does not pay by what is known


class _Time:
    """A running estimate of seconds, nearer to the quick ones: what disturbs a step makes it slower. The
    first value is left out: it pays for what is made once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._num_seen = 0

    @property
    def is_known(self) -> bool:
        return self._num_seen > 1

    def observe(self, seconds: float) -> None:
        self._num_seen += 1
        if self._num_seen == 2:
            self.seconds = seconds
        elif self._num_seen <= _TIME_FIRST:
            self.seconds = min(self.seconds, seconds)  # a rare size is soon believed, and wrong for long
        elif self._num_seen > 2:
            clipped = min(max(seconds, self.seconds / _TIME_CLIP), self.seconds * _TIME_CLIP)
            share = _TIME_SHARE if clipped > self.seconds else _TIME_SHARE_DOWN
            self.seconds += share * (clipped - self.seconds)


@dataclass(slots=True)
class _Size:
    """Steps of about one size."""

    rows: float
    time: _Time = field(default_factory=_Time)


class StepTimes:
    """Seconds of a step by its rows, or of drafting by its drafts: estimates of the sizes seen, never falling
    with the size, and straight lines between them."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._points: tuple[list[float], list[float]] | None = None  # rows, seconds; None: to be made

    @property
    def is_known(self) -> bool:
        """Whether any size has an estimate."""
        return any(size.time.is_known for size in self._sizes.values())

    def observe(self, num_rows: int, seconds: float) -> None:
        if num_rows <= 0 or seconds <= 0:
            return  # a clock too coarse to say anything
        size = self._sizes.setdefault(_size_of(num_rows), _Size(num_rows))
        size.time.observe(seconds)
        size.rows += _TIME_SHARE * (num_rows - size.rows)
        self._points = None

    def seconds(self, rows: float) -> float:
        """What a step of ``rows`` rows is expected to take; in steps of one row where none was seen."""
        if rows <= 0:
            return 0.0
        if self._points is None:
            self._points = self._fit()
        at, times = self._points
        if len(at) < 2:
            first, time = (at[0], times[0]) if at else (1.0, 1.0)
            return time * (1 + _ROW_GUESS * rows) / (1 + _ROW_GUESS * first)
        place = min(max(bisect_left(at, rows), 1), len(at) - 1)
        (x0, x1), (y0, y1) = at[place - 1 : place + 1], times[place - 1 : place + 1]
        straight = y0 + (y1 - y0) * (rows - x0) / (x1 - x0)
        # Below the smallest size seen: no row costs more than its share.
        return max(straight, y0 * rows / x0) if rows < x0 else straight

    def _fit(self) -> tuple[list[float], list[float]]:
        """The estimates: near sizes joined, then neighbours averaged until none falls with the rows."""
        points: list[tuple[float, float]] = []
        for size in sorted(self._sizes.values(), key=lambda size: size.rows):
            if not size.time.is_known:
                continue
            point = (size.rows, size.time.seconds)
            if points and point[0] < _NEAR * points[-1][0]:
                point = (mean((points[-1][0], point[0])), mean((points.pop()[1], point[1])))
            points.append(point)
        runs: list[list[float]] = []  # seconds of neighbours that share a value
        for _, seconds in points:
            runs.append([seconds])
            while len(runs) > 1 and mean(runs[-2]) > mean(runs[-1]):
                runs[-2:] = [runs[-2] + runs[-1]]
        return [rows for rows, _ in points], [mean(run) for run in runs for _ in run]


def _size_of(num_rows: int) -> int:
    if num_rows <= _EXACT_ROWS:
        return num_rows
    return _EXACT_ROWS + math.ceil(4 * math.log2(num_rows / _EXACT_ROWS))
