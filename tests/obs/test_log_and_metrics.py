import io
import re

import pytest

from bittrue.engine.types import EngineStats
from bittrue.obs.log import Log
from bittrue.obs.metrics import METRICS, Metrics
from bittrue.obs.progress import LoadProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def loaded_on(stream: io.StringIO) -> str:
    with LoadProgress(Log(stream), "tiny") as progress:
        progress(5, 10, "a")
        progress(10, 10, "b")
    return stream.getvalue()


def test_loading_is_a_bar_on_a_terminal_and_two_lines_elsewhere() -> None:
    lines = loaded_on(io.StringIO()).splitlines()
    assert [line.split()[2] for line in lines] == ["loading", "loaded"]
    assert " model=tiny bytes=10 seconds=" in lines[1]
    assert "10/10 bytes" in loaded_on(Terminal())


def line_of(**fields: object) -> str:
    stream = io.StringIO()
    Log(stream).info("event", **fields)
    return stream.getvalue()


def test_one_line_per_event_with_time_level_and_fields() -> None:
    line = line_of(id="r1", seconds=0.25, count=3)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    event id=r1 seconds=0.25 count=3\n", line
    )


@pytest.mark.parametrize("value", ["two words", "a=b", 'say "x"', "back\\slash", "new\nline", "\x1b[31m", ""])
def test_no_value_can_forge_another_field_or_line(value: str) -> None:
    line = line_of(key=value, last=1)
    assert line.count("\n") == 1
    assert line.endswith(" last=1\n")
    assert re.search(r' key="([^"\\]|\\.)*" last=1\n$', line)
    assert "\x1b" not in line


def test_events_below_the_level_are_dropped() -> None:
    stream = io.StringIO()
    log = Log(stream, "warning")
    log.debug("a")
    log.info("b")
    log.warning("c")
    log.error("d")
    assert [line.split()[2] for line in stream.getvalue().splitlines()] == ["c", "d"]


def test_every_metric_of_the_table_is_exposed_and_nothing_else() -> None:
    metrics = Metrics()
    names = {
        line.split()[2] for line in metrics.exposition().decode().splitlines() if line.startswith("# TYPE")
    }
    told = {re.sub("(_total|_created)$", "", name) for name in names}
    assert told == {spec.name for spec in METRICS}
    assert len({spec.name for spec in METRICS}) == len(METRICS)


def test_engine_totals_go_on_counting_over_a_restart() -> None:
    metrics = Metrics()
    for totals in ((5, 9, 9), (9, 12)):  # the second engine has come as far when it is first seen
        for total in totals:
            metrics.update_engine(
                EngineStats(num_steps_total=total, pages_total=4, pages_free=1, pages_held=3)
            )
        metrics.engine_changed()
    assert metrics.registry.get_sample_value("bittrue_engine_steps_total") == 21
    assert metrics.registry.get_sample_value("bittrue_pages", {"state": "held"}) == 3


def test_two_servers_in_one_process_do_not_share_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.count("bittrue_generated_tokens", 7)
    assert other.registry.get_sample_value("bittrue_generated_tokens_total") == 0
