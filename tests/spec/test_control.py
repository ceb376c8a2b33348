"""Draft lengths: what pays is found, what does not stops, load and success move them."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bittrue.spec.control import FIRST_PAUSE, LAST_PAUSE, NEW_PAUSE, PLAIN_EVERY, DraftControl, StepTimes

Seconds = Callable[[int], float]
MAX_DRAFT = 8


def memory_bound(rows: int) -> float:
    """A row costs little beside the step, as where weights are read once for all."""
    return 0.010 + 0.0008 * rows


def compute_bound(rows: int) -> float:
    return 0.001 + 0.010 * rows


class World:
    """An engine in which a draft of a sequence is accepted with a given chance, and time is made up."""

    def __init__(
        self,
        chance: Callable[[int], float],  # of a sequence's draft; may change between runs
        *,
        count: int = 1,
        seconds: Seconds = memory_bound,
        draft_s: float = 0.0004,
        noise: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.control = DraftControl(MAX_DRAFT)
        self.chance, self.seconds, self.draft_s, self.noise = chance, seconds, draft_s, noise
        self.lengths = [0] * count
        self.rng = random.Random(seed)
        self.history: list[list[int]] = []
        self.num_tokens, self.time_s = 0, 0.0

    def jitter(self) -> float:
        return self.rng.uniform(1 - self.noise, 1 + self.noise)

    def run(self, num_steps: int) -> "World":
        for _ in range(num_steps):
            self.step()
        return self

    def step(self) -> None:
        rows = len(self.lengths) + sum(self.lengths)
        took = self.seconds(rows) * self.jitter()
        self.control.observe_step(rows, took)
        self.time_s += took
        for i, length in enumerate(self.lengths):
            accepted = 0
            while accepted < length and self.rng.random() < self.chance(i):
                accepted += 1
            self.num_tokens += accepted + 1
            if length:
                self.control.observe_drafts(str(i), length, accepted)
        self.lengths = [self.control.length_for(str(i), len(self.lengths)) for i in range(len(self.lengths))]
        took = sum(self.lengths) * self.draft_s * self.jitter()
        self.control.observe_drafting(sum(self.lengths), took)
        self.time_s += took
        self.history.append(self.lengths)

    def mean_length(self, last: int) -> float:
        lengths = [length for step in self.history[-last:] for length in step]
        return sum(lengths) / len(lengths)

    def speed_up(self) -> float:
        """Tokens per second over those without drafts."""
        count = len(self.lengths)
        return self.num_tokens / self.time_s / (count / self.seconds(count))


def best_fixed(chance: float, *, count: int, seconds: Seconds, draft_s: float) -> float:
    """Speed-up of the best length that every sequence always has."""
    rates = [
        count * sum(chance**i for i in range(k + 1)) / (seconds(count * (1 + k)) + count * k * draft_s)
        for k in range(MAX_DRAFT + 1)
    ]
    return max(rates) / rates[0]


def test_repetitive_text_reaches_the_most_drafts() -> None:
    world = World(lambda i: 1.0).run(60)
    assert world.mean_length(40) == MAX_DRAFT


@pytest.mark.parametrize("seconds", [memory_bound, compute_bound])
def test_hopeless_text_stops_with_under_two_percent_of_steps_wasted(seconds: Seconds) -> None:
    world = World(lambda i: 0.0, seconds=seconds).run(1000)
    assert sum(any(step) for step in world.history) < 20
    assert world.speed_up() > 0.98


def test_a_hopeless_text_among_good_ones_stops_too() -> None:
    world = World(lambda i: 0.0 if i == 0 else 0.9, count=3).run(1000)
    lengths = [step[0] for step in world.history]
    assert sum(length > 0 for length in lengths) < 30
    assert world.mean_length(200) > 2


def test_what_does_not_pay_is_tried_again_on_the_stated_schedule() -> None:
    world = World(lambda i: 0.0, noise=0.0).run(3200)
    tried = [step for step, (length,) in enumerate(world.history) if length]
    gaps = [after - before - 1 for before, after in zip(tried, tried[1:], strict=False)]
    waits = [gap for gap in gaps if gap >= FIRST_PAUSE]
    assert waits[:5] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE, 16 * FIRST_PAUSE]
    assert max(waits) <= LAST_PAUSE


def test_a_new_sequence_is_tried_soon_even_where_others_were_hopeless() -> None:
    world = World(lambda i: 0.0).run(500)
    for _ in range(200):
        world.control.observe_drafts("other", 1, 0)
    answers = [world.control.length_for("new", 1) for _ in range(NEW_PAUSE + 1)]
    assert answers == [0] * NEW_PAUSE + [1]
    # Until a draft was made (a proposer may have none) it is asked for again.
    assert world.control.length_for("new", 1) == 1


def test_sequences_after_ones_whose_drafts_paid_are_drafted_for_at_once() -> None:
    """All but one in a few, whose first step tells what a step without drafts takes."""
    world = World(lambda i: 1.0).run(60)
    first = [world.control.length_for(f"new {i}", 1) for i in range(4 * PLAIN_EVERY)]
    assert first.count(0) == 4
    assert all(length == MAX_DRAFT for length in first if length)


def test_text_that_turns_repetitive_is_found_and_rises() -> None:
    hopeful = [False]
    world = World(lambda i: 1.0 if hopeful[0] else 0.0).run(200)
    assert world.mean_length(20) <= 0.1
    hopeful[0] = True
    world.run(300)
    assert world.mean_length(50) == MAX_DRAFT


def test_text_that_stops_repeating_stops_within_some_steps() -> None:
    hopeful = [True]
    world = World(lambda i: 1.0 if hopeful[0] else 0.0).run(100)
    hopeful[0] = False
    world.run(60)
    assert world.mean_length(20) <= 0.1


def test_a_loaded_step_lowers_the_length() -> None:
    def seconds(rows: int) -> float:
        return max(0.010, 0.001 * rows)  # rows are free up to ten

    lengths = [
        World(lambda i: 0.8, count=count, seconds=seconds).run(400).mean_length(100) for count in (1, 4, 32)
    ]
    assert lengths[0] > 4 > lengths[1] > lengths[2]
    assert lengths[2] < 0.3


def test_a_dear_proposer_lowers_the_length() -> None:
    cheap, dear = (World(lambda i: 0.8, draft_s=s).run(400).mean_length(200) for s in (0.0001, 0.006))
    assert cheap > dear + 1


@pytest.mark.parametrize("count", [1, 4, 16])
@pytest.mark.parametrize("chance", [0.0, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("seconds", [memory_bound, compute_bound])
def test_it_is_nearly_as_fast_as_the_best_fixed_length(count: int, chance: float, seconds: Seconds) -> None:
    world = World(lambda i: chance, count=count, seconds=seconds).run(600)
    best = best_fixed(chance, count=count, seconds=seconds, draft_s=world.draft_s)
    assert world.speed_up() > 0.9 * best
    assert world.speed_up() > 0.95


def test_the_first_steps_of_a_size_and_single_outliers_do_not_mislead() -> None:
    times = StepTimes()
    times.observe(1, 0.5)  # a capture
    for _ in range(20):
        times.observe(1, 0.010)
    times.observe(1, 3.0)
    assert times.seconds(1) == pytest.approx(0.010, rel=0.07)


def test_times_between_and_beyond_the_sizes_seen_follow_straight_lines() -> None:
    times = StepTimes()
    for rows, seconds in ((2, 0.010), (4, 0.014), (64, 0.134)):
        for _ in range(3):
            times.observe(rows, seconds)
    assert times.seconds(3) == pytest.approx(0.012)
    assert times.seconds(1) == pytest.approx(0.008)
    assert times.seconds(128) == pytest.approx(0.262)


def test_a_step_of_more_rows_is_never_held_to_be_faster() -> None:
    times = StepTimes()
    for rows, seconds in ((1, 0.010), (2, 0.008), (4, 0.012)):
        for _ in range(3):
            times.observe(rows, seconds)
    assert times.seconds(1) == times.seconds(2) == pytest.approx(0.009)


def test_the_same_calls_give_the_same_lengths() -> None:
    first, second = (World(lambda i: 0.6, count=3, seed=5).run(300).history for _ in range(2))
    assert first == second


calls = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 600), st.floats(0, 10)),
        st.tuples(st.just("drafting"), st.integers(0, 60), st.floats(0, 10)),
        st.tuples(st.just("drafts"), st.integers(0, 5), st.integers(0, 5)),
        st.tuples(st.just("length"), st.integers(1, 40), st.integers(-2, 10)),
        st.tuples(st.just("forget"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(calls, st.integers(1, 5))
def test_lengths_are_within_bounds_whatever_was_seen(
    made: list[tuple[str, int, float]], max_draft: int
) -> None:
    control = DraftControl(max_draft)
    for number, (name, a, b) in enumerate(made):
        seq_id = str(number % 3)
        if name == "step":
            control.observe_step(a, b)
        elif name == "drafting":
            control.observe_drafting(a, b)
        elif name == "drafts":
            drafted = min(a, max_draft)
            control.observe_drafts(seq_id, drafted, min(drafted, int(b)))
        elif name == "length":
            assert 0 <= control.length_for(seq_id, a, int(b)) <= min(max_draft, max(0, int(b)))
        else:
            control.forget(seq_id)
        for place in range(max_draft):
            assert 0.0 <= control.acceptance(seq_id, place) <= 1.0


def test_a_forgotten_sequence_leaves_nothing() -> None:
    world = World(lambda i: 0.5, count=3).run(50)
    for i in range(3):
        world.control.forget(str(i))
    assert not world.control._sequences
    world.control.forget("unknown")


def test_drafting_that_costs_the_same_for_any_number_is_done_for_the_most() -> None:
    """One replay makes all drafts of a sequence: what it costs beside them is no reason for fewer."""
    control = DraftControl(4)
    chosen = []
    length = 0
    for _ in range(200):
        control.observe_step(1 + length, 0.00021 + 0.00005 * length)
        if length:
            control.observe_drafts("a", length, length)
        length = control.length_for("a", 1)
        chosen.append(length)
        control.observe_drafting(length, 0.00025 + 0.00002 * length)
    assert chosen[-100:] == [4] * 100
