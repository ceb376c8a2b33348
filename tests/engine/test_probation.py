"""Who is to blame for an engine's death: simulated engines with planted poisons."""

import random
import signal
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bittrue.engine.probation import Probation

CRASH = -signal.SIGSEGV
KILL = -signal.SIGKILL
MAX_RESTARTS = 5  # in a row without a token


@dataclass
class Simulation:
    """An engine that runs at most ``max_running`` requests in order, one token each per step.

    ``poisons``: name -> number of tokens at which the engine dies of it, with ``exit_code``.
    """

    lengths: dict[str, int]
    poisons: dict[str, int]
    max_running: int = 4
    exit_code: int = CRASH
    probation: Probation = field(default_factory=Probation)
    tokens: dict[str, int] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    given_up: list[str] = field(default_factory=list)
    num_deaths: int = 0
    num_fruitless: int = 0

    def give(self, names: list[str]) -> None:
        self.inside += names

    def submit(self, name: str) -> None:
        self.tokens[name] = 0
        self.give(self.probation.submit(name))

    def die(self, exit_code: int) -> None:
        self.num_deaths += 1
        self.inside = []
        self.probation.cut()
        blamed = self.probation.died(exit_code, is_last=self.num_fruitless >= MAX_RESTARTS)
        if blamed is not None:
            self.given_up.append(blamed)
            self.ended.add(blamed)
            self.num_fruitless = 0
        assert self.num_fruitless < MAX_RESTARTS, "the server would give up"
        self.num_fruitless += 1
        self.give(self.probation.started())

    def step(self) -> None:
        running = self.inside[: self.max_running]
        if any(self.poisons.get(name) == self.tokens[name] for name in running):
            self.die(self.exit_code)
            return
        for name in running:
            self.num_fruitless = 0
            self.tokens[name] += 1
            if self.tokens[name] == self.lengths[name]:
                self.ended.add(name)
                self.inside.remove(name)
                self.give(self.probation.ended(name))
            else:
                self.give(self.probation.lives(name))

    def run(self) -> None:
        for _ in range(100_000):
            if len(self.ended) == len(self.lengths):
                return
            self.step()
        raise AssertionError(f"never ends: {set(self.lengths) - self.ended} of {self}")


REQUESTS = st.lists(
    st.tuples(st.integers(1, 12), st.one_of(st.none(), st.integers(0, 11)), st.integers(0, 6)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(requests=REQUESTS, max_running=st.integers(1, 6), outside=st.booleans())
def test_exactly_the_poisons_are_given_up_and_all_others_finish(
    requests: list[tuple[int, int | None, int]], max_running: int, outside: bool
) -> None:
    lengths = {f"r{i}": length for i, (length, _, _) in enumerate(requests)}
    poisons = {f"r{i}": at for i, (length, at, _) in enumerate(requests) if at is not None and at < length}
    simulation = Simulation(lengths, poisons, max_running, KILL if outside else CRASH)
    simulation.give(simulation.probation.started())
    for name, (_, _, delay) in zip(lengths, requests, strict=True):
        for _ in range(delay):
            simulation.step()
        simulation.submit(name)
    simulation.run()
    assert set(simulation.given_up) == set(poisons)
    assert len(simulation.given_up) == len(poisons)
    # Two deaths find a poison that was alone; one more where it had company; as many as the server would
    # bear for SIGKILL. Poisons that strike while another is searched for cost one more.
    most = MAX_RESTARTS + 2 if outside else 3
    assert simulation.num_deaths <= (most if len(poisons) == 1 else (most + 1) * len(poisons))
    assert not simulation.probation.is_on


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), num_kills=st.integers(1, 12))
def test_kills_from_outside_are_nobodys_fault(seed: int, num_kills: int) -> None:
    """Kills at random steps, never six in a row without a token: those would end the server."""
    rng = random.Random(seed)
    simulation = Simulation({f"r{i}": 30 for i in range(8)}, {})
    simulation.give(simulation.probation.started())
    for name in simulation.lengths:
        simulation.submit(name)
    for number in range(num_kills):
        for _ in range(rng.randrange(0 if number % 5 else 1, 6)):
            simulation.step()
        simulation.die(KILL)
    simulation.run()
    assert simulation.given_up == []


@pytest.mark.parametrize(("exit_code", "deaths"), [(CRASH, 2), (70, 2), (KILL, MAX_RESTARTS + 1)])
def test_a_poison_alone_is_given_up_after_two_crashes_or_many_kills(exit_code: int, deaths: int) -> None:
    simulation = Simulation({"p": 5}, {"p": 0}, exit_code=exit_code)
    simulation.give(simulation.probation.started())
    simulation.submit("p")
    simulation.run()
    assert (simulation.given_up, simulation.num_deaths) == (["p"], deaths)


def test_a_poison_prompt_among_streams_is_found_at_its_second_crash() -> None:
    simulation = Simulation({"a": 20, "b": 20, "p": 20, "late": 3}, {"p": 0})
    simulation.give(simulation.probation.started())
    simulation.submit("a")
    simulation.submit("b")
    simulation.step()
    simulation.submit("p")
    simulation.step()
    assert simulation.num_deaths == 1
    simulation.submit("late")
    assert simulation.inside == ["p"]  # silent until now: the first suspect, alone; what came later waits
    simulation.step()
    assert simulation.given_up == ["p"]
    assert simulation.inside == ["a", "b", "late"]  # the deaths are explained: all at once
    simulation.run()
    assert simulation.num_deaths == 2


def test_a_token_clears_a_request_of_earlier_deaths() -> None:
    simulation = Simulation({"a": 9}, {})
    simulation.give(simulation.probation.started())
    simulation.submit("a")
    for _ in range(5):
        simulation.die(CRASH)
        simulation.step()
    assert simulation.given_up == []


@pytest.mark.parametrize("has_left", [False, True])
def test_an_aborted_request_is_a_candidate_until_the_engine_has_taken_it_in(has_left: bool) -> None:
    probation = Probation()
    probation.started()
    probation.submit("a")
    probation.submit("p")
    assert probation.died(CRASH, is_last=False) is None
    assert probation.started() == ["a"]
    assert probation.aborted("a") == ["p"]
    if has_left:
        probation.left("a")
    assert probation.died(CRASH, is_last=False) == ("p" if has_left else None)


def test_requests_that_come_while_there_is_no_engine_are_not_suspects() -> None:
    probation = Probation()
    probation.started()
    probation.submit("a")
    probation.cut()
    assert probation.submit("b") == []
    assert probation.died(CRASH, is_last=False) is None
    assert probation.submit("c") == []
    assert probation.started() == ["a"]
    assert probation.lives("a") == ["b", "c"]
