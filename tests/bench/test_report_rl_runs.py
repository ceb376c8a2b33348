"""Runs of reinforcement learning on the page: what the stored numbers add up to, and their curves."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import pytest

from bittrue.bench.pictures import pictures
from bittrue.bench.report import page
from bittrue.bench.result import Benchmark, Label, Measurement, Result, measured
from bittrue.bench.targets import targets
from bittrue.bench.tasks import wilson

SPACE = {"s": "http://www.w3.org/2000/svg"}


def stored(benchmark: Benchmark, found: list[Measurement], **config: Label) -> dict[str, Result]:
    result = Result(benchmark, "CPU", 2, "abc", "2026-01-02T03:04:05+00:00", "make", config, tuple(found))
    return {f"{benchmark}.json": result}


def share(name: str, right: int, **labels: Label) -> Measurement:
    return Measurement(name, "ratio", right / 100, *wilson(right, 100), 100, dict(labels))


def verdicts(results: dict[str, Result]) -> dict[str, bool | None]:
    return {target.measure: target.is_met for target in targets(results)}


def rows_of(results: dict[str, Result]) -> list[list[str]]:
    lines = page(results).splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]


# ---- what rewards add --------------------------------------------------------------------------------


def curves(at_end: dict[str, list[int]]) -> Iterator[Measurement]:
    """Two points of every arm and seed; all begin at 50 of 100."""
    for arm, ends in at_end.items():
        for seed, end in enumerate(ends):
            for updates, right in ((0, 50), (60, end)):
                labels: dict[str, Label] = {"arm": arm, "seed": seed, "updates": updates}
                yield share("eval/brackets/greedy", right, **labels)
                yield measured("eval/brackets/pass@1", "ratio", [right / 200], labels)


def gained(at_end: dict[str, list[int]], **config: Label) -> dict[str, Result]:
    return stored("rl-gain", list(curves(at_end)), task="brackets", threads=2, **config)


def test_the_gain_is_over_the_control_that_ends_highest() -> None:
    results = gained({"rl": [90, 80], "random": [52, 48], "continued": [55, 65]})
    (over, touching) = [t for t in targets(results) if t.file == "rl-gain.json"]
    assert over.seen is not None and over.seen.labels == {"control": "continued"}
    assert (over.seen.median, over.seen.low, over.seen.high) == pytest.approx((0.25, 0.15, 0.35))
    assert over.is_met is True
    # 80 of 100 goes down to 71, 65 of 100 up to 74: the intervals of one seed touch.
    assert touching.seen is not None and touching.seen.median == 1 and touching.is_met is False
    text = page(results)
    assert "rl ends +25.0 points from the best control, continued (+15.0 to +35.0 by seed)" in text
    assert "its interval touches a control's in 1 of 2 seeds." in text
    rows = rows_of(results)
    low, high = wilson(170, 200)
    all_seeds = f"85.0% ({low:.1%} to {high:.1%})"
    assert next(row for row in rows if row[0] == "rl")[-1] == all_seeds
    assert next(row for row in rows if row[0] == "the start")[1].startswith("50.0% (")
    assert ["random", "26.0%", "24.0%", "25.0%"] in rows  # at temperature 1


def test_a_gain_below_the_target_is_told_with_what_was_tried() -> None:
    results = gained({"rl": [64], "rejection": [55]}, note="Tried: lower rates, more answers.")
    found = verdicts(results)
    assert found["rewards over the best control, mean over seeds (brackets)"] is False
    assert "\nTried: lower rates, more answers.\n" in page(results)


def test_every_arm_and_seed_has_its_line_and_arms_their_colour() -> None:
    drawn = pictures(gained({"rl": [90, 80], "random": [52, 48]}))
    root = ElementTree.fromstring(drawn["benchmarks-rl-gain.svg"])
    lines = root.findall(".//s:polyline", SPACE)
    colours = [line.get("stroke") for line in lines]
    assert len(lines) == 2 * 4 and colours == 4 * colours[:2] and colours[0] != colours[1]
    names = [text.text for text in root.findall(".//s:text", SPACE)]
    assert [name for name in names if name in ("rl 0", "random 0", "rl 1", "random 1")] == 2 * [
        *("rl 0", "random 0", "rl 1", "random 1")
    ]
    # The second picture begins below the first one.
    first, second = (float(part.attrib["y"]) for part in root.findall("s:svg", SPACE))
    assert first == 0 and second >= 300
    assert "![curves of rl-gain.json](benchmarks-rl-gain.svg)" in page(gained({"rl": [90]}))


# ---- exactness ---------------------------------------------------------------------------------------


def fired_at(differing: int = 0, compared: int = 100, same: int = 1) -> dict[str, Result]:
    counts = {
        "steps": 100,
        "steps compared": compared,
        "tokens compared": 123456,
        "tokens that differ": 0,
        "preemptions": 7,
        "engine restarts": 1,
    }
    found = [measured(name, "count", [n], {"run": "exact"}) for name, n in counts.items()]
    found.append(measured("difference, largest", "nats", [0.0], {"run": "exact"}))
    found.append(measured("tokens that differ", "count", [differing], {"run": "ppo"}))
    again = (("exact", 9, 1), ("exact", 3, same), ("ppo", 5, 1))
    found += [
        measured("step replayed, same bytes", "count", [is_same], {"run": run, "step": step})
        for run, step, is_same in again
    ]
    return stored("rl-exact", found, model="mini")


def test_exactness_asks_for_every_step_every_bit_and_every_byte() -> None:
    assert set(exact_verdicts(fired_at()).values()) == {True} and len(exact_verdicts(fired_at())) == 5
    name = "trainer against engine, log-probabilities that differ (mini)"
    assert exact_verdicts(fired_at(differing=1))[name] is False  # of any run
    assert exact_verdicts(fired_at(compared=99))["steps under fire that were not compared (mini)"] is False
    assert (
        exact_verdicts(fired_at(same=0))["recorded steps that give other bytes when run again (mini)"]
        is False
    )


def exact_verdicts(results: dict[str, Result]) -> dict[str, bool | None]:
    return {target.measure: target.is_met for target in targets(results) if target.file}


def test_the_page_tells_what_was_compared_and_run_again() -> None:
    rows = rows_of(fired_at())
    assert ["exact", "100", "100", "123,456", "0", "", "7", "1", "0", "", ""] in rows
    same = "Computed again from their records, {} of 3 steps gave the same bytes: exact 3, 9; ppo 5."
    assert same.format(3) in page(fired_at()) and same.format(2) in page(fired_at(same=0))


# ---- older weights -----------------------------------------------------------------------------------


@pytest.fixture
def stale() -> dict[str, Result]:
    found: list[Measurement] = [
        measured("refused without a correction", "count", [1.0], {"kind": "async", "error": "choose tis"}),
        measured("refused without a correction", "count", [0.0], {"kind": "pipelined", "error": ""}),
    ]
    for arm, age, seconds in (("sync", 0.0, 2.0), ("async 2", 1.5, 4.0)):
        labels: dict[str, Label] = {"arm": arm, "staleness": int(age)}
        values = {"reward/mean": 0.5 + age, "train/ppo_kl": -age / 1000, "is/ess_ratio": 1 - age / 10}
        values |= {"rollout/staleness/mean": age, "rollout/staleness/max": 2 * age}
        for step in range(12):
            own = {**labels, "step": step}
            found += [measured(name, "ratio", [v * (step > 1)], own) for name, v in values.items()]
            found.append(measured("step", "s", [seconds], own))
        found += [share("eval/brackets/greedy", n, **labels, updates=u) for u, n in ((0, 50), (12, 80))]
        counts = {"tokens sampled": 3000, "tokens compared": 2999, "tokens that differ": 0}
        found += [measured(name, "count", [n], labels) for name, n in counts.items()]
    return stored("rl-staleness", found, task="brackets", steps=12)


def test_staleness_is_told_arm_by_arm(stale: dict[str, Result]) -> None:
    rows = rows_of(stale)
    assert ["async 2", "1.25", "3", "2.000", "-1.25e-03", "-1.50e-03", "0.7083", "0.0000", "4.00 s",
            "2,999 of 3,000", "0"] in rows  # fmt: skip
    assert next(row for row in rows if row[0] == "sync")[:6] == ["sync", "0.00", "0", "0.500", "0", "0"]
    low, high = wilson(80, 100)
    assert next(row for row in rows if row[0] == "sync" and len(row) == 3)[2] == (
        f"80.0% ({low:.1%} to {high:.1%})"
    )
    text = page(stale)
    assert "The async loop without a correction is refused: `choose tis`." in text
    assert "The pipelined loop without a correction is **not refused**." in text
    root = ElementTree.fromstring(pictures(stale)["benchmarks-rl-staleness.svg"])
    assert len(root.findall("s:svg", SPACE)) == 3 and len(root.findall(".//s:polyline", SPACE)) == 6


# ---- one student of two specialists ------------------------------------------------------------------


def distilled(student: int) -> dict[str, Result]:
    found = [
        share("right answers", right, of=of, task=task, temperature=0.0)
        for of, rights in (
            ("start", (40, 80)),
            ("countdown", (80, 70)),
            ("sub-think", (30, 80)),
            ("student", (student, 80)),
        )
        for task, right in zip(("countdown", "sub-think"), rights, strict=True)
    ]
    labels: dict[str, Label] = {"task": "countdown"}
    found.append(measured("student over specialist", "ratio", [student / 80], labels))
    counts = {"steps": 3, "steps compared": 3, "tokens compared": 5000, "tokens that differ": 0}
    found += [measured(name, "count", [n], {"of": "student"}) for name, n in counts.items()]
    for lr, apart in ((3e-4, 0.25), (1e-3, 0.125)):
        trial: dict[str, Label] = {"lr": lr, "chosen": lr == 1e-3}
        found.append(measured("divergence of a trial", "nats", [apart], trial))
    found += [
        measured("train/teacher_kl", "nats", [0.5**step], {"of": "student", "step": step})
        for step in range(3)
    ]
    return stored("rl-distill", found, model="mini")


def test_the_student_is_held_against_each_specialist() -> None:
    found = verdicts(distilled(student=78))
    assert found["student of two over the specialist of countdown (mini)"] is True
    assert found["student of two over the specialist of sub-think"] is None
    assert verdicts(distilled(72))["student of two over the specialist of countdown (mini)"] is False
    rows = rows_of(distilled(72))
    assert ["student over specialist", "0.90", ""] in rows
    # Of 40 points that the specialist gained, 32; on the other task there was nothing to gain.
    assert ["kept of what the specialist gained", "0.80", ""] in rows
    assert ["student", "3", "3", "", "5,000", "0"] in rows
    assert "3e-04: 0.2500, 0.001 (chosen): 0.1250." in page(distilled(72)).replace("0.0003", "3e-04")
    root = ElementTree.fromstring(pictures(distilled(72))["benchmarks-rl-distill.svg"])
    assert len(root.findall(".//s:polyline", SPACE)) == 1
