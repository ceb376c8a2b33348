"""The crew of workers: results in order, nothing left running after an error, kernel threads as before."""

import threading
import time

import pytest

from bittrue.ops.dispatch import select
from bittrue.ops.threads import set_kernel_threads, threads_of
from bittrue.train.crew import Crew


@pytest.fixture
def crew_of_two() -> Crew:
    ops = select("cpu")
    set_kernel_threads(ops, 2)
    return Crew(ops)


def test_results_come_in_order_whoever_ends_first(crew_of_two: Crew) -> None:
    def work(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0.0)
        return 10 * item

    assert list(crew_of_two.map(work, range(5))) == [0, 10, 20, 30, 40]


def test_an_error_is_raised_when_those_under_way_ended(crew_of_two: Crew) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(item: int) -> None:
        if item == 0:
            begun.wait(5)
            raise ValueError("the first")
        begun.set()
        time.sleep(0.1)
        ended.set()

    with pytest.raises(ValueError, match="the first"):
        list(crew_of_two.map(work, range(2)))
    assert begun.is_set() and ended.is_set()


def test_kernels_have_a_thread_each_while_the_crew_is_full(crew_of_two: Crew) -> None:
    ops = select("cpu")
    assert list(crew_of_two.map(lambda item: threads_of(ops), range(3))) == [1, 1, 1]
    assert list(crew_of_two.map(lambda item: threads_of(ops), range(1))) == [2]
    assert threads_of(ops) == 2
