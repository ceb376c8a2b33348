"""A result is stored as JSON and read back equal; what is not one is refused by name."""

import json
from pathlib import Path

import pytest

from bittrue.bench.result import (
    Measurement,
    Result,
    decode_result,
    encode_result,
    measured,
    new_result,
    read_results,
    write_result,
)
from bittrue.errors import UsageError


def sample() -> Result:
    found = [
        measured("decode", "tokens/s", [3.0, 1.0, 2.0], {"context": 256, "filled": False, "share": 0.5}),
        measured("linear", "s", [0.25], {"case": '1x2, "quoted" ü'}, num_bytes=10, flops=20),
    ]
    return new_result("ops", "bittrue bench ops --json", {"threads": 2, "model": "tiny"}, found)


def test_a_measurement_is_the_median_with_its_spread_and_rates() -> None:
    values = [0.001 * i for i in range(11, 0, -1)]
    m = measured("x", "s", values, {}, num_bytes=6_000_000, flops=12_000_000)
    assert (m.median, m.low, m.high, m.repeats) == (0.006, 0.002, 0.010, 11)
    assert m.bytes_per_s == pytest.approx(1e9)
    assert m.flops_per_s == pytest.approx(2e9)


def test_a_result_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    result = sample()
    write_result(tmp_path / "deep" / "a.json", result)
    assert read_results(tmp_path / "deep") == {"a.json": result}
    assert result.machine and result.cores >= 1 and result.date.endswith("+00:00")


def test_the_document_has_one_line_per_measurement() -> None:
    text = encode_result(sample())
    assert json.loads(text)["config"] == {"threads": 2, "model": "tiny"}
    lines = [line for line in text.splitlines() if line.startswith("  {")]
    assert [json.loads(line.rstrip(","))["name"] for line in lines] == ["decode", "linear"]


def test_measurements_are_found_by_name_and_labels() -> None:
    result = sample()
    assert result.find("decode", context=256, filled=False) == result.measurements[0]
    assert result.find("decode", context=4096) is None
    assert result.find("decode", batch=1) is None
    assert isinstance(result.find("linear"), Measurement)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"benchmark": "ops"}', encode_result(sample())[:-9]])
def test_what_is_not_a_result_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"somewhere\.json"):
        decode_result(text, source="somewhere.json")


def test_a_field_of_the_wrong_type_is_refused() -> None:
    wrong = encode_result(sample()).replace('"repeats": 3', '"repeats": "3"')
    with pytest.raises(UsageError, match="repeats"):
        decode_result(wrong, source="x")
