"""Long prefills are seen in the log, short ones are not, and no line comes per step."""

import io

import pytest

from bittrue.obs.log import Log
from bittrue.obs.prefill import PrefillLog


def lines_of(stream: io.StringIO) -> list[str]:
    return [line.split(maxsplit=2)[2] for line in stream.getvalue().splitlines()]


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_a_long_prefill_is_told_after_two_seconds_then_every_five_and_at_its_end(stream: io.StringIO) -> None:
    log = PrefillLog(Log(stream))
    for tenth in range(131):  # a step every 0.1 s, 100 tokens each
        log.note("r", 100 * tenth, 20_000, 50.0 + tenth / 10)
    log.end("r", 63.5)
    lines = lines_of(stream)
    assert lines == [
        "prefill id=r tokens=2000/20000 tokens_per_s=1000 left_s=18",
        "prefill id=r tokens=7000/20000 tokens_per_s=1000 left_s=13",
        "prefill id=r tokens=12000/20000 tokens_per_s=1000 left_s=8",
        "prefilled id=r tokens=20000 seconds=13.5 tokens_per_s=1481.48",
    ]


def test_the_expected_time_is_of_the_recent_speed(stream: io.StringIO) -> None:
    log = PrefillLog(Log(stream))
    log.note("r", 0, 10_000, 0.0)
    log.note("r", 4_000, 10_000, 2.0)  # 2000 tokens/s
    log.note("r", 5_000, 10_000, 7.0)  # then 200 tokens/s
    assert lines_of(stream)[-1] == "prefill id=r tokens=5000/10000 tokens_per_s=200 left_s=25"


def test_a_short_prefill_leaves_no_line(stream: io.StringIO) -> None:
    log = PrefillLog(Log(stream))
    log.note("r", 512, 1500, 0.0)
    log.note("r", 1024, 1500, 1.9)
    log.end("r", 2.5)
    log.end("unknown", 3.0)
    assert lines_of(stream) == []


def test_an_ended_or_preempted_prefill_starts_anew(stream: io.StringIO) -> None:
    log = PrefillLog(Log(stream))
    log.note("r", 0, 1000, 0.0)
    log.note("r", 500, 1000, 1.5)
    log.note("r", 100, 1000, 1.9)  # preempted: its time begins here
    log.note("r", 200, 1000, 3.8)
    log.note("s", 0, 1000, 0.0)
    log.forget("s")
    log.note("s", 100, 1000, 3.0)
    assert lines_of(stream) == []
    log.note("r", 300, 1000, 3.95)
    assert lines_of(stream) == ["prefill id=r tokens=300/1000 tokens_per_s=97.561 left_s=7.175"]
    log.forget_all()
    log.end("r", 9.0)
    assert len(lines_of(stream)) == 1


def test_a_prefill_that_stands_still_divides_by_nothing(stream: io.StringIO) -> None:
    log = PrefillLog(Log(stream))
    log.note("r", 5, 1000, 0.0)
    log.note("r", 5, 1000, 3.0)
    assert lines_of(stream) == ["prefill id=r tokens=5/1000 tokens_per_s=0 left_s=unknown"]
