"""Ops are timed once per case, in turn with what they are held against, and the verb prints the record."""

import pytest

from bittrue.bench import linear as linear_bench
from bittrue.bench import machine
from bittrue.bench.linear import bench_many_rows, bench_one_row
from bittrue.bench.machine import last_cache_bytes, measure_roof
from bittrue.bench.ops import bench_cases
from bittrue.bench.result import decode_result
from bittrue.bench.timing import time_call, time_in_turn
from bittrue.cli.bench import ops
from bittrue.cli.ops import chosen_cases
from bittrue.ops.dispatch import select


def test_every_timing_is_of_one_call_and_the_first_is_dropped() -> None:
    calls = []
    timings = time_call(lambda: calls.append(1), seconds=0.0)
    assert len(timings) == 5 and len(calls) == 6


def test_calls_are_timed_in_turn_and_every_second_round_backwards() -> None:
    calls: list[str] = []
    timings = time_in_turn({n: lambda n=n: calls.append(n) for n in "abc"}, seconds=0.0, least=3)  # type: ignore[misc]
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(values) for name, values in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_every_case_of_an_op_is_measured() -> None:
    cases = chosen_cases("rms_norm")
    found = list(bench_cases(select("cpu", threads=1), cases, seconds=0.0, seed=0))
    assert [m.labels["case"] for m in found] == [case.name for case in cases]
    assert all(m.median > 0 and m.repeats >= 5 for m in found)


def test_the_roof_counts_both_sides_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PEAK_SIZE", 512)
    roof = measure_roof(seconds=0.0)
    assert roof.copy.bytes == 2 * roof.read.bytes > 4 * last_cache_bytes()
    # A sum over memory cannot be ten times as fast as a copy of it: else it reads a cache.
    assert 0.1 < roof.read.bytes_per_s / roof.copy.bytes_per_s < 10
    assert roof.product.flops_per_s > 1e9


def test_linear_is_held_against_torch_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_bench, "MANY_SHAPE", (96, 64))
    monkeypatch.setattr(linear_bench, "COLD_SHAPE", (128, 128))
    monkeypatch.setattr(linear_bench, "last_cache_bytes", lambda: 1 << 15)
    table = select("cpu", threads=1)
    many = list(bench_many_rows(table, seconds=0.0, seed=0))
    shares = [(m.labels["format"], m.labels["rows"]) for m in many if m.labels.get("of") == "torch f32"]
    assert shares == [(form, rows) for form in ("f32", "bf16") for rows in (64, 128, 512)]
    one = [m for m in bench_one_row(table, seconds=0.0, seed=0) if m.name == "linear, one row"]
    assert [m.labels["format"] for m in one] == ["f32", "bf16", "fp8", "fp4"]
    assert all(m.bytes >= 4 << 15 for m in one)  # a rotation does not fit the (pretended) cache


@pytest.fixture
def small_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "PEAK_SIZE", 64)


@pytest.mark.usefixtures("small_roof")
def test_the_verb_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops(op="rope", seconds=0.0, threads=1, json=True) == 0
    result = decode_result(capsys.readouterr().out, source="stdout")
    assert result.benchmark == "ops" and result.config["threads"] == 1
    assert [m.name for m in result.measurements[:3]] == ["copy", "read", "torch product"]
    assert {m.name for m in result.measurements[3:]} == {"rope"}


@pytest.mark.usefixtures("small_roof")
def test_the_verb_prints_shares_of_the_roof(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops(op="rms_norm", seconds=0.0, threads=1) == 0
    printed = capsys.readouterr().out
    assert "of copy" in printed and "of peak" in printed
    copy_line = next(line for line in printed.splitlines() if "1 MiB" in line and "copy" in line)
    assert "100%" in copy_line
