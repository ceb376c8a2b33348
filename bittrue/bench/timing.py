"""Times calls: one alone, or several in turn so that a slow moment of the machine meets all of them alike."""

import time
from collections.abc import Callable, Mapping

Call = Callable[[], object]

# Before a call in turn with others: by then the threads of the one before no longer spin for more work.
REST_S = 0.02


def time_call(call: Call, *, seconds: float, least: int = 5) -> list[float]:
    """Timings in seconds: at least ``least``, more while they fit in ``seconds``. One warm-up is dropped."""
    call()
    timings: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(timings) < least or time.perf_counter() < end_s:
        timings.append(once(call))
    return timings


def time_in_turn(calls: Mapping[str, Call], *, seconds: float, least: int = 5) -> dict[str, list[float]]:
    """Timings in seconds of every call, taken in rounds A B C, C B A, A B C, ...: as many of each.

    At least ``least`` rounds, more while they fit in ``seconds``; one warm-up round is dropped. Timing ``i``
    of every call belongs to round ``i``, so ratios may be taken round by round.
    """
    order = list(calls)
    for name in order:
        calls[name]()
    timings: dict[str, list[float]] = {name: [] for name in calls}
    end_s = time.perf_counter() + seconds
    while len(timings[order[0]]) < least or time.perf_counter() < end_s:
        for name in order:
            time.sleep(REST_S)
            timings[name].append(once(calls[name]))
        order.reverse()
    return timings


def once(call: Call) -> float:
    """Seconds of one call."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s
