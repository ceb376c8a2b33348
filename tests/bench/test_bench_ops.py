"""Timings are summarised as they were taken, and every case of an op is measured once."""

import json

import pytest

from bittrue.bench.ops import bench_cases, summarise, time_call
from bittrue.cli.bench import ops
from bittrue.cli.ops import chosen_cases
from bittrue.ops.dispatch import select


def test_a_result_is_the_median_with_its_spread_and_rates() -> None:
    timings = [0.001 * i for i in range(1, 12)]
    result = summarise("x", "y", timings, num_bytes=6_000_000, flops=12_000_000)
    assert (result.median_s, result.low_s, result.high_s, result.repeats) == (0.006, 0.002, 0.010, 11)
    assert result.gigabytes_per_s == pytest.approx(1.0)
    assert result.gigaflops_per_s == pytest.approx(2.0)


def test_every_timing_is_of_one_call_and_the_first_is_dropped() -> None:
    calls = []
    timings = time_call(lambda: calls.append(1), seconds=0.0)
    assert len(timings) == 5 and len(calls) == 6
    assert timings == sorted(timings)


def test_every_case_of_an_op_is_measured() -> None:
    cases = chosen_cases("rms_norm")
    results = list(bench_cases(select("cpu", threads=1), cases, seconds=0.0, seed=0))
    assert [r.variant for r in results] == [case.name for case in cases]
    assert all(r.median_s > 0 for r in results)


def test_the_verb_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops(op="rope", seconds=0.0, json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"machine", "cores", "commit", "command", "date"} <= set(document["setting"])
    assert document["results"][0]["name"] == "copy"
    assert {r["name"] for r in document["results"][1:]} == {"rope"}
