import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bittrue.model.presets import preset_config
from bittrue.train.config import train_config
from bittrue.train.plot import Line, Plot, binned, short, svg
from bittrue.train.report import report_html, write_report

MODEL = preset_config("tiny", "fp4", draft="mtp")
SPIKES = [{"step": 30, "reason": "loss 9 < median", "back_to": 20}]


def row(step: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "step": step,
        "main": 6.0 / (1 + step),
        "mtp": 7.0 / (1 + step),
        "index": 0.1,
        "balance": 1.1,
        "grad_norm": 2.0,
        "lr": 1e-3,
        "tokens": 1000,
        "targets": 200,
        "seconds": 0.5,
        "tasks": {"sort": [100.0, 150], "a<b": [20.0, 50]},
        "load": {"layers.2.ffn.gate.bias": [1.5, 0.5], "mtp.0.ffn.gate.bias": [1.2, 0.8]},
        "anticipating": step in (20, 21),
    }
    return {**values, **changes}


def page(rows: list[dict[str, Any]], spikes: list[dict[str, Any]] = SPIKES) -> str:
    config = train_config({"data": {"tasks": {"sort": 1.0}}, "run": {"steps": 50}})
    return report_html("a & b", config, MODEL, rows, spikes, threads=2)


def test_a_page_needs_no_other_file_and_is_well_formed() -> None:
    text = page([row(step) for step in range(40)])
    links = [link for link in re.findall(r"(?:href|src)=\"?([^\" >]+)", text)]
    assert links == [] and "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(pictures) == 9
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert "<h1>Training run a &amp; b</h1>" in text and "a&lt;b" in text


def test_a_page_states_the_facts() -> None:
    text = page([row(step) for step in range(40)])
    for name, value in {
        "steps": "40 of 50",
        "tokens": "40,000",
        "tokens/s": "2,000",
        "CPU threads": "2",
        "steps anticipated": "2",
        "task sort": "0.6667",
        "experts": "2 of 8, hidden 32",
    }.items():
        assert re.search(rf"<td>{name}</td><td[^>]*>{value}</td>", text), name
    assert "<td>30</td><td>loss 9 &lt; median</td><td>20</td>" in text
    assert text.count('stroke-dasharray="3 3"') == 9  # the spike, in every picture


def test_a_page_without_a_step_is_a_page() -> None:
    text = page([], [])
    assert "nothing measured yet" in text and "No step yet" in text


def test_a_page_of_one_step_has_a_dot() -> None:
    assert "<circle" in page([row(0)], [])


def test_long_runs_are_drawn_as_means() -> None:
    line = Line("x", list(range(28_000)), [float(step % 2) for step in range(28_000)])
    points = binned(line, 0, 27_999)
    assert len(points) == 280
    assert all(mean == pytest.approx(0.5) for _, mean in points)
    assert points[0][0] == pytest.approx(49.5)


def test_a_mean_counts_targets_not_steps() -> None:
    (point,) = binned(Line("x", [0, 0], [1.0, 4.0], [3.0, 1.0]), 0, 0)
    assert point == (0.0, 1.75)


def heights(picture: str) -> list[float]:
    points = re.findall(r'polyline points="([^"]+)"', picture)[0]
    return [float(point.split(",")[1]) for point in points.split()]


def test_a_logarithmic_axis_spaces_by_ratio_and_a_linear_one_by_difference() -> None:
    line = Line("x", [0, 1, 2], [1.0, 10.0, 100.0])
    first, second, third = heights(svg(Plot("t", [line], is_logarithmic=True)))
    assert first - second == pytest.approx(second - third, abs=0.2)
    first, second, third = heights(svg(Plot("t", [line])))
    assert (second - third) / (first - second) == pytest.approx(10, rel=0.05)


def test_flat_and_zero_values_are_drawn() -> None:
    for values in ([0.0, 0.0], [3.0, 3.0], [0.0, 1e-3], [-1.0, 1.0]):
        for logarithmic in (True, False):
            ElementTree.fromstring(svg(Plot("t", [Line("x", [5, 6], values)], logarithmic)))


def test_numbers_on_axes_are_short() -> None:
    assert [short(value) for value in (0.0005, 20, 9999, 20_000, 3_500_000)] == [
        "0.0005",
        "20",
        "9999",
        "20k",
        "3.5M",
    ]


def test_a_report_is_written_from_the_metrics(tmp_path: Path) -> None:
    config = train_config({"data": {"tasks": {"sort": 1.0}}})
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "half')
    path = write_report(tmp_path, config, MODEL, [], threads=1)
    assert "No step yet" in path.read_text()
