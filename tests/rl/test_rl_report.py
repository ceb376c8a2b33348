"""The report of an RL run: one page that says what its certificate says, beside the curves of controls."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bittrue.errors import CheckpointError, UsageError
from bittrue.rl.certificate import make_certificate
from bittrue.rl.report import Curves, plots, write_report
from bittrue.train.plot import COLOURS, DARK_STYLE, bars
from tests.support.rl_runs import edit_line, metrics_of, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a & b")


def pictures_of(text: str) -> dict[str, str]:
    """Every picture by its title; each is well-formed."""
    found = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    for picture in found:
        ElementTree.fromstring(picture)
    return {re.findall(r"<title>(.*?)</title>", picture)[0]: picture for picture in found}


def cells_of(text: str) -> dict[str, str]:
    """The tables of two columns."""
    return dict(re.findall(r"<tr><td>([^<]*)</td><td[^>]*>([^<]*)</td>", text))


def test_a_report_needs_no_other_file_and_no_script(run: Path) -> None:
    text = write_report(run).read_text()
    assert re.findall(r"(?:href|src)=|<script|url\(|@import", text) == []
    assert "http" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "<h1>RL run a &amp; b</h1>" in text and "a &lt;fast&gt; one" in text
    assert "prefers-color-scheme: dark" in text
    assert len(pictures_of(text)) >= 12


def test_a_report_says_what_the_certificate_says(run: Path) -> None:
    text, made = write_report(run).read_text(), make_certificate(run)
    assert f'<p class="verdict good">{made.verdict}</p>' in text
    assert "5 of 5 steps, begun" in text and "without an answer to learn from: 1;" in text
    assert "taken on at step 2; restarts of an engine: 2" in text
    cells = cells_of(text)
    for name, value in {
        "asked for": "exact, compared before each gradient",
        "steps compared": "4",
        "tokens with a differing bit": "0",
        "answers judged": "60",
        "before the first step": made.weights.start,
        "after the last": made.weights.end,
        "data source": made.data["source"],
        "sources": made.code.sources,
        "threads": "2 of 2 processors",
        "rollout.group": "8",
        "optim.lr": "0.0001",
    }.items():
        assert cells[name] == value, name
    assert made.digest in text and all(digest in text for digest in made.files.values())
    assert "Problems" not in text


def test_histograms_show_every_outcome_and_every_reason(run: Path) -> None:
    pictures = pictures_of(write_report(run).read_text())
    outcomes = pictures["Answers by what their verifier said"]
    assert "right" in outcomes and outcomes.count("30 (50.0%)") == 2
    assert "7 (100.0%)" in pictures["Groups not learned from, by reason"]


def test_a_run_with_problems_says_each_of_them_at_the_top(run: Path) -> None:
    edit_line(run / "steps.jsonl", 4, weights_before="0" * 64, versions={})
    text = write_report(run).read_text()
    (problem,) = make_certificate(run).problems
    assert f'<ul class="bad"><li>{problem}</li></ul>' in text
    assert 'class="verdict bad">difference 0 at every of 4 steps over 400 tokens; 1 problem<' in text
    assert text.index("Problems") < text.index("<svg")


def test_a_run_that_goes_on_says_so_and_one_without_steps_is_a_page(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "half", run={"steps": 9})).read_text()
    assert "over 400 tokens; not at its end yet" in text
    text = write_report(write_run(tmp_path / "none", steps=0)).read_text()
    assert "no step compared a token" in text and "<svg" in text


def test_curves_of_controls_are_beside_and_dashed(run: Path, tmp_path: Path) -> None:
    controls = [
        write_run(tmp_path / "random", policy={"objective": "reinforce"}),
        write_run(tmp_path / "still", optim={"lr": 1e-6}),
    ]
    text = write_report(run, controls).read_text()
    pictures = pictures_of(text)
    reward = pictures["Reward of the answers sampled, mean"]
    curves = re.findall(r"<polyline[^>]*>", reward)
    assert ["stroke-dasharray" in curve for curve in curves] == [False, True, True]
    assert all(name in reward for name in ("a &amp; b", "random", "still"))
    held_out = pictures["Held-out share solved"]
    assert len(re.findall("<polyline", held_out)) == 3 and "random" in held_out
    assert "<td>random: eval/countdown/greedy</td>" in text
    cells = re.findall(r"<tr><td>(random|still)</td><td>([^<]*)</td></tr>", text)
    assert cells == [
        ("random", "policy.objective: clipped here, reinforce there"),
        ("still", "optim.lr: 0.0001 here, 1e-06 there"),
    ]


def test_a_control_that_is_no_run_or_has_the_runs_name_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is not what an RL run writes"):
        write_report(run, [tmp_path])
    with pytest.raises(UsageError, match="two runs of the report are called a & b"):
        write_report(run, [write_run(tmp_path / "other" / "a & b")])


def test_values_that_are_no_numbers_leave_gaps(run: Path) -> None:
    edit_line(run / "metrics.jsonl", 1, **{"reward/mean": float("nan"), "train/grad_norm": float("inf")})
    text = write_report(run).read_text()
    assert "nan" not in re.sub(r"<p.*?</p>", "", text).lower().replace("nats", "")
    (points,) = re.findall(r'points="([^"]*)"', pictures_of(text)["Reward of the answers sampled, mean"])
    assert len(points.split()) == 4


def test_a_scale_of_ratios_is_taken_only_where_no_value_is_zero() -> None:
    metrics = [metrics_of(step) for step in range(5)]
    title = "KL of engine to trainer, k3, nats a token"

    def is_logarithmic() -> bool:
        drawn = plots([Curves("run", metrics, {}, is_control=False)])
        return next(plot.is_logarithmic for plot in drawn if plot.title == title)

    assert not is_logarithmic()
    for line in metrics:
        line["parity/k3"] = 1e-4
    assert is_logarithmic()


def test_resumptions_are_marked(run: Path) -> None:
    metrics = pictures_of(write_report(run).read_text())
    assert all('stroke="#b00020"' in picture for title, picture in metrics.items() if "by " not in title)


def test_every_colour_of_a_curve_has_one_for_a_dark_page() -> None:
    assert all(f'[stroke="{colour}"]' in DARK_STYLE for colour in COLOURS)


def test_bars_without_anything_to_count_say_so() -> None:
    for counts in ({}, {"timeout": 0}):
        picture = bars("Outcomes", counts)
        ElementTree.fromstring(picture)
        assert ">none<" in picture and "<rect" not in picture


def test_the_largest_bar_is_the_longest() -> None:
    widths = [
        float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', bars("t", {"a": 30, "b": 60}))
    ]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.1)
